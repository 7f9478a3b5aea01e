"""MLC-LLM's group quantization: packed codes in uint32 words and one scale per group, row by row.

Source: ``python/mlc_llm/quantization/group_quantization.py`` of https://github.com/mlc-ai/mlc-llm.

Deliberate differences: a group whose scale is zero gets the code of zero, where MLC divides by
zero; a group that holds NaN or Inf gets the scale NaN, so that the fault stays visible in all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from reference.errors import ConfigError


class MlcPacked(NamedTuple):
    """A matrix ``(N, K)`` as MLC stores it under ``NAME.q_weight`` and ``NAME.q_scale`` (layout NK).

    q_weight  uint32 ``(N, K * bits / 32)``, the first code in the lowest bits
    q_scale   the model's type ``(N, K / group)``
    """

    q_weight: np.ndarray
    q_scale: np.ndarray


@dataclass(frozen=True)
class MlcGroups:
    """Symmetric codes of ``bits`` bits, offset to be unsigned, in groups along the input axis.

    model_type  numpy type of the scales; weights are rounded to it and quantized in it, as MLC
                does: float16 arithmetic moves one 8-bit code in twenty, so it must be the same
    """

    bits: int
    model_type: Any
    group: int = 32

    @property
    def zero(self) -> int:
        """The code of zero, which is also the largest magnitude: 7 for 4 bits, 127 for 8."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def per_word(self) -> int:
        """Codes in one uint32."""
        return 32 // self.bits

    def quantize(self, w: np.ndarray) -> MlcPacked:
        """Pack ``w (..., K)``; raises :class:`ConfigError` if K is not a multiple of the group."""
        if w.shape[-1] % self.group:
            raise ConfigError(f"rows of {w.shape[-1]} weights do not divide into groups of {self.group}")
        with np.errstate(over="ignore", under="ignore"):
            groups = self._round(w).reshape(*w.shape[:-1], w.shape[-1] // self.group, self.group)
            largest = np.abs(groups).max(axis=-1, keepdims=True)  # NaN wins
            scale = self._round(np.where(np.isfinite(largest), largest / np.float32(self.zero), np.float32(np.nan)))
            scaled = self._round(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
            codes = np.clip(np.rint(self._round(scaled + np.float32(self.zero))), 0, 2 * self.zero)
        return MlcPacked(self.pack(codes.reshape(w.shape)), scale[..., 0].astype(self.model_type))

    def dequantize(self, packed: MlcPacked) -> np.ndarray:
        """``(code - zero) * scale`` as float32 ``(..., K)``, which holds every product with a float16 scale exactly."""
        codes = self.unpack(packed.q_weight).reshape(*packed.q_scale.shape, self.group)
        values = (codes.astype(np.float32) - np.float32(self.zero)) * packed.q_scale.astype(np.float32)[..., None]
        return values.reshape(*values.shape[:-2], values.shape[-2] * self.group)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of ``shape``, scales included."""
        size = math.prod(shape)
        return 4 * size // self.per_word + int(np.dtype(self.model_type).itemsize) * size // self.group

    def _round(self, x: np.ndarray) -> np.ndarray:
        """To the model's type and back: a float32 operation so rounded is that of float16 hardware."""
        return np.asarray(x.astype(self.model_type, copy=False).astype(np.float32, copy=False))

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``(..., K)`` -> uint32 words ``(..., K / per_word)``, the first code in the lowest bits."""
        lanes = codes.astype(np.uint32).reshape(*codes.shape[:-1], codes.shape[-1] // self.per_word, self.per_word)
        words = np.zeros(lanes.shape[:-1], dtype=np.uint32)
        for lane in range(self.per_word):
            words |= lanes[..., lane] << np.uint32(lane * self.bits)
        return words

    def unpack(self, words: np.ndarray) -> np.ndarray:
        """Words ``(..., W)`` -> codes, uint32 ``(..., W, per_word)``."""
        shifts = np.arange(self.per_word, dtype=np.uint32) * np.uint32(self.bits)
        return np.asarray((words[..., None] >> shifts) & np.uint32(2**self.bits - 1))
