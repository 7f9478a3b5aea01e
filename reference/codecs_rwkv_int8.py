"""ChatRWKV's int8: one byte a weight, an offset and a scale for every input and for every output of a matrix.

    w = (code + 1/2) * ry * rx + my + mx        mx, rx one per output; my, ry one per input; scales over 16

Source: ``rwkv/model.py`` of the package ``rwkv`` 0.8.32 on PyPI (https://github.com/BlinkDL/ChatRWKV),
strategies ``fp32i8`` and ``fp16i8``, bit for bit what its CPU path quantizes at load and computes with.

Each offset and scale is found over a whole row or column, so a matrix is packed as a whole. A matrix with
an output (a column of what is left once the offsets are taken off) that is all zero divides by zero: its
weights are all NaN, in the package and here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from reference.weights import Tensor

#: In ``fp16`` strategies the package halves x after every so many layers, and divides what is added to x to match.
RESCALE_EVERY = 6
_RESCALED = re.compile(r"blocks\.(\d+)\.(att\.output|ffn\.value)\.weight")


class RwkvPacked(NamedTuple):
    """A matrix of ``K`` inputs and ``N`` outputs, laid out as the package holds it, with inputs first.

    codes   uint8 ``(K, N)``
    mx, rx  ``(N,)`` in the type of activations
    my, ry  ``(K, 1)``
    """

    codes: np.ndarray
    mx: np.ndarray
    rx: np.ndarray
    my: np.ndarray
    ry: np.ndarray


@dataclass(frozen=True)
class RwkvInt8:
    """A format of :mod:`reference.schemes` for matrices.

    kept  numpy type of the file, of activations, and so of offsets, scales and dequantized weights
    """

    kept: Any

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as the package computes with it, packed and unpacked when it is read."""
        halvings = self.halvings(name)

        def read() -> np.ndarray:
            w = self.dequantize(self.quantize(tensor.array(), halvings))
            return w * np.float32(2**halvings)  # the other half of the rescaling is in x

        return Tensor("f32", tensor.shape, read)

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        """Bytes of codes, offsets and scales."""
        return math.prod(shape) + 2 * sum(shape) * int(np.dtype(self.kept).itemsize)

    def halvings(self, name: str) -> int:
        """How often x is halved before the layer of this tensor; 0 for tensors that are not rescaled."""
        found = _RESCALED.fullmatch(name)
        return int(found.group(1)) // RESCALE_EVERY if found and self.kept is np.float16 else 0

    def quantize(self, w: np.ndarray, halvings: int = 0) -> RwkvPacked:
        """Pack float32 ``(N, K)``, divided by ``2 ** halvings`` first."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            x = (w.astype(self.kept) / self.kept(2**halvings)).astype(np.float32).T  # (K, N)
            if x.shape[0] > x.shape[1]:
                my = x.min(axis=1, keepdims=True)
                x = x - my
                mx = x.min(axis=0)
                x -= mx
            else:
                mx = x.min(axis=0)
                x = x - mx
                my = x.min(axis=1, keepdims=True)
                x -= my
            rx = x.max(axis=0)
            x /= rx
            ry = x.max(axis=1, keepdims=True)
            x /= ry
            codes = np.clip(np.floor(x * np.float32(256)), 0, 255).astype(np.uint8)
            sixteen = np.float32(16)
            scales = (mx, rx / sixteen, my, ry / sixteen)
            return RwkvPacked(codes, *(s.astype(self.kept) for s in scales))

    def dequantize(self, packed: RwkvPacked) -> np.ndarray:
        """Float32 ``(N, K)``, every operation rounded to ``kept``."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x = packed.codes.astype(self.kept) + self.kept(0.5)
            x *= packed.ry
            x *= packed.rx
            x += packed.my
            x += packed.mx
        return np.ascontiguousarray(x.T, dtype=np.float32)
