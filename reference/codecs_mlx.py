"""MLX's affine groups, as ``mx.quantize`` makes them and ``mx.quantized_matmul`` multiplies with them.

Source: the documentation of ``mlx.core.quantize`` and mlx/backend/cpu/quantized.cpp of MLX 0.32:
``weight = scale * code + bias``, codes packed along the row into uint32, the first in the lowest bits.

Of a group's minimum and maximum the one of larger magnitude becomes the bias. The scale is the range over
``2^bits - 1``, negative where the bias is the maximum, then moved a little so that zero falls on a code. All in
float32; scale and bias are rounded to the model's type once the codes are known.

Deliberate difference: a group that holds NaN or Inf gets the scale NaN, so that the fault stays visible in all of
it (MLX steps over NaN and gives the weight any code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from reference.errors import ConfigError

#: The smallest scale: of a group without spread.
_EPS = np.float32(1e-7)


class MlxPacked(NamedTuple):
    """A matrix ``(N, K)`` as MLX holds it.

    codes   uint32 ``(N, K * bits / 32)``
    scales, biases  ``(N, K / group)`` in the model's type
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


@dataclass(frozen=True)
class MlxGroups:
    """Groups of ``group`` weights along a row; ``bits`` is 4 or 8; ``model_type`` is what the model is kept in."""

    bits: int
    group: int
    model_type: Any = np.float16

    def quantize(self, w: np.ndarray) -> MlxPacked:
        """Pack ``w (..., K)``, rounded to the model's type first.

        Raises :class:`ConfigError` where groups do not divide K.
        """
        if w.shape[-1] % self.group:
            raise ConfigError(f"rows of {w.shape[-1]} weights do not divide into groups of {self.group}")
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            kept = w.astype(self.model_type).astype(np.float32)
            blocks = kept.reshape(*w.shape[:-1], w.shape[-1] // self.group, self.group)
            scale, bias = self._range(blocks)
            steps = np.rint((blocks - bias) / scale)
            codes = np.clip(np.nan_to_num(steps), 0, 2**self.bits - 1).astype(np.uint32)
            scale = np.where(np.isfinite(blocks).all(axis=-1, keepdims=True), scale, np.float32(np.nan))
            stored = (scale[..., 0].astype(self.model_type), bias[..., 0].astype(self.model_type))
        return MlxPacked(self._pack(codes.reshape(w.shape)), *stored)

    def dequantize(self, packed: MlxPacked) -> np.ndarray:
        """Float32 ``(..., K)``; the sum rounded once."""
        codes = self._unpack(packed.codes).astype(np.float32)
        blocks = codes.reshape(*packed.scales.shape, self.group)
        scale, bias = (np.asarray(x, np.float32)[..., None] for x in (packed.scales, packed.biases))
        with np.errstate(invalid="ignore"):
            return np.asarray(scale * blocks + bias).reshape(codes.shape)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of ``shape``, scales and biases included."""
        beside = 2 * int(np.dtype(self.model_type).itemsize)
        rows = math.prod(shape[:-1])
        return rows * (shape[-1] * self.bits // 8 + shape[-1] // self.group * beside)

    def _range(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and bias of every group, float32 ``(..., groups, 1)``, before they are rounded."""
        low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
        from_below = np.abs(low) > np.abs(high)
        scale = np.maximum((high - low) / np.float32(2**self.bits - 1), _EPS)
        scale = np.where(from_below, scale, -scale)
        edge = np.where(from_below, low, high)
        zero = np.rint(edge / scale)
        moved = np.divide(edge, zero, out=scale.copy(), where=zero != 0)
        return moved, np.where(zero != 0, edge, np.float32(0))

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``(..., K)`` -> uint32 words ``(..., K * bits / 32)``."""
        each = 32 // self.bits
        words = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
        return np.asarray(np.bitwise_or.reduce(words << self._shifts(), axis=-1))

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        codes = (words[..., None] >> self._shifts()) & np.uint32(2**self.bits - 1)
        return np.asarray(codes.reshape(*words.shape[:-1], words.shape[-1] * (32 // self.bits)))

    def _shifts(self) -> np.ndarray:
        return np.arange(0, 32, self.bits, dtype=np.uint32)


#: Scheme name -> groups. As mlx-community names its models (``...-4bit``), where groups of 64 are mlx-lm's default;
#: other groups say so.
MLX_SCHEMES = {
    "4bit": MlxGroups(4, 64),
    "4bit-g32": MlxGroups(4, 32),
    "8bit": MlxGroups(8, 64),
    "8bit-g32": MlxGroups(8, 32),
}
