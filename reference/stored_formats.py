"""How one tensor is kept by a scheme, and the weights it is worth once kept so.

A format of floats converts; a packed one is quantized and dequantized again. Both are as lazy as the
checkpoint: a tensor is converted as it is read, a matrix block by block.

Rule for NaN and Inf: they are never lost. The float formats keep them, and turn what leaves their
range into Inf; a quantized group that holds one is NaN as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from reference.config import is_matrix
from reference.errors import ConfigError
from reference.packed_tensor import PackedTensor
from reference.weights import STORED_TYPES, Tensor, f32_to_bf16

Convert = Callable[[np.ndarray], np.ndarray]

#: Convert at most this many weights of a matrix at a time, which bounds the memory of what lies between.
_BLOCK_ELEMENTS = 1 << 20


class Packing(Protocol):
    """A way to pack rows of weights, every row by itself."""

    @property
    def group(self) -> int:
        """Weights that share a scale; rows must be a multiple of it unless the packing pads them."""

    def quantize(self, w: np.ndarray, /) -> Any:
        """Pack float32 ``(..., K)``."""

    def dequantize(self, packed: Any, /) -> np.ndarray:
        """Float32 ``(..., K)``."""

    def packed_bytes(self, shape: tuple[int, ...], /) -> int:
        """Bytes of a packed tensor of ``shape``, scales included."""


class Format(Protocol):
    """How one tensor is kept."""

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it comes out of storage, made as it is read; its own self where nothing changes."""

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        """Bytes it takes; ``source`` is the stored type it comes from."""


@dataclass(frozen=True)
class Floats:
    """Kept as ``f32``, ``f16`` or ``bf16``; ``source``: as it comes if that is f32 or f16, else as f32."""

    stored: str

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        stored = self._stored(tensor.stored)
        return tensor if tensor.stored == stored else _converted(tensor, stored, _FROM_F32[stored])

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        return math.prod(shape) * int(np.dtype(STORED_TYPES[self._stored(source)]).itemsize)

    def _stored(self, source: str) -> str:
        if self.stored != "source":
            return self.stored
        return source if source in ("f32", "f16") else "f32"


@dataclass(frozen=True)
class Packed:
    """Kept quantized, computed with as float32 dequantized values.

    pads  the packing fills up rows that groups do not divide; else such rows are refused
    """

    packing: Packing
    pads: bool = False

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        self._check(name, tensor.shape)
        if isinstance(tensor, PackedTensor) and tensor.read.packing is self.packing:
            return tensor  # of a file that holds it packed so: packing its values again could move them
        return _converted(tensor, "f32", lambda w: self.packing.dequantize(self.packing.quantize(w)))

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        self._check(name, shape)
        return self.packing.packed_bytes(shape)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if not self.pads and shape[-1] % self.packing.group:
            raise ConfigError(
                f"tensor {name} has rows of {shape[-1]} weights, which do not divide into groups of "
                f"{self.packing.group}; choose a scheme without groups, such as fp16"
            )


@dataclass(frozen=True)
class Codec:
    """The format of each kind of tensor: matrices of the layers, embedding, head, vectors.

    decay   ``time_decay`` and ``time_first``, where they are not kept like the other vectors
    """

    matrices: Format
    embedding: Format
    head: Format
    vectors: Format
    decay: Format | None = None

    def format(self, name: str) -> Format:
        """Format of the tensor of a canonical name."""
        if name == "emb.weight":
            return self.embedding
        if name == "head.weight":
            return self.head
        if name.endswith((".time_decay", ".time_first")):
            return self.decay or self.vectors
        return self.matrices if is_matrix(name) else self.vectors


@dataclass(frozen=True)
class _Converted(Tensor):
    """Another tensor, its rows converted from float32 as they are read."""

    source: Tensor
    convert: Convert

    def rows(self, index: Any, dtype: Any = np.float32) -> np.ndarray:
        return Tensor.of(_read(self.source, index, self.convert), self.stored).rows(..., dtype)


def _converted(source: Tensor, stored: str, convert: Convert) -> Tensor:
    return _Converted(stored, source.shape, lambda: _read(source, slice(None), convert), source, convert)


def _read(source: Tensor, index: Any, convert: Convert) -> np.ndarray:
    """``source[index]`` along the first axis, converted; a matrix block by block."""
    if len(source.shape) == 1:
        return np.asarray(convert(source.array())[index])
    rows = np.arange(source.shape[0])[index]
    step = max(1, _BLOCK_ELEMENTS // source.shape[1])
    if rows.ndim != 1 or rows.size <= step:
        return convert(source.rows(index))
    return np.concatenate([convert(source.rows(rows[a : a + step])) for a in range(0, rows.size, step)])


def _to_f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Inf is what such a weight becomes, and it is to be seen
        return np.asarray(x.astype(np.float16))


_FROM_F32: dict[str, Convert] = {"f32": lambda x: x, "f16": _to_f16, "bf16": f32_to_bf16}
