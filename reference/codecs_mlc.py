"""MLC-LLM's group quantization: packed codes in uint32 words and one scale per group, row by row.

    scale = max|w| / z        code = clip(round(w / scale + z), 0, 2 z)        w = (code - z) * scale

with z = 2^(bits-1) - 1, every step in the model's type, halves to even. A word holds 32 // bits codes, the
first in its lowest bits; the two highest bits of a word of ten 3-bit codes are 0.

Source: ``python/mlc_llm/quantization/group_quantization.py`` of https://github.com/mlc-ai/mlc-llm,
commit 20efccb7 of 2024-03-11, the same in 79d603f0 of 2026-07-23. Rows that groups do not divide: the last
group is short, its scale is that of the weights there are, and its words are filled up with code 0, which
no weight of the row reads.

Names that this source does not have: ``q4f32_0`` and ``q8f16_0`` are here the same format in the other
layout. In MLC-LLM they were something else: ``q4f32_0``, and ``q4f32_1`` of the time, had a minimum per group,
stored with the scale as a pair of bfloat16 (the older ``mlc_llm/quantization/group_quantization.py``, gone with
20efccb7); ``q8f16_0`` of June 2023 was ChatRWKV's int8 (``mlc_llm/transform/rwkv_quantization.py``). The older
package also put 3-bit codes five to a uint16 word, and took 1e-4 for a smaller max|w|; where neither matters, its
codes and scales are these.

Deliberate differences: a group whose scale is zero gets the code of zero, where MLC divides by
zero; a group that holds NaN or Inf gets the scale NaN, so that the fault stays visible in all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LAYOUTS = ("NK", "KN")


class MlcPacked(NamedTuple):
    """A matrix ``(N, K)`` packed row by row (layout NK).

    q_weight  uint32 ``(N, groups * group / codes per word)``
    q_scale   the model's type ``(N, groups)``, ``groups = ceil(K / group)``
    columns   K
    """

    q_weight: np.ndarray
    q_scale: np.ndarray
    columns: int


@dataclass(frozen=True)
class MlcGroups:
    """Symmetric codes of ``bits`` bits, offset to be unsigned, in groups along the input axis.

    model_type  numpy type of the scales; weights are rounded to it and quantized in it, as MLC
                does: float16 arithmetic moves one 8-bit code in twenty, so it must be the same
    layout      of the stored arrays (:meth:`arrays`): ``NK`` by rows, ``KN`` their transposes
    """

    bits: int
    model_type: Any
    group: int = 32
    layout: str = "NK"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r}; layouts: {', '.join(LAYOUTS)}")
        if not 2 <= self.bits <= 8 or self.group % self.per_word:
            raise ValueError(f"groups of {self.group} codes of {self.bits} bits do not fill whole words")

    @property
    def zero(self) -> int:
        """The code of zero, which is also the largest magnitude: 3 for 3 bits, 7 for 4, 127 for 8."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def per_word(self) -> int:
        """Codes in one uint32."""
        return 32 // self.bits

    def quantize(self, w: np.ndarray) -> MlcPacked:
        """Pack ``w (..., K)``, any K of at least 1."""
        columns = w.shape[-1]
        n_groups = self._groups(columns)
        padding = n_groups * self.group - columns
        with np.errstate(over="ignore", under="ignore"):
            rows = np.pad(self._round(w), [(0, 0)] * (w.ndim - 1) + [(0, padding)])
            groups = rows.reshape(*w.shape[:-1], n_groups, self.group)
            largest = np.abs(groups).max(axis=-1, keepdims=True)  # NaN wins
            scale = self._round(np.where(np.isfinite(largest), largest / np.float32(self.zero), np.float32(np.nan)))
            scaled = self._round(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
            codes = np.clip(np.rint(self._round(scaled + np.float32(self.zero))), 0, 2 * self.zero)
        codes = codes.reshape(rows.shape)
        codes[..., columns:] = 0
        return MlcPacked(self.pack(codes), scale[..., 0].astype(self.model_type), columns)

    def dequantize(self, packed: MlcPacked) -> np.ndarray:
        """``(code - zero) * scale`` as float32 ``(..., K)``, which holds every product with a float16 scale exactly."""
        codes = self.unpack(packed.q_weight).reshape(*packed.q_scale.shape, self.group)
        values = (codes.astype(np.float32) - np.float32(self.zero)) * packed.q_scale.astype(np.float32)[..., None]
        return values.reshape(*values.shape[:-2], values.shape[-2] * self.group)[..., : packed.columns]

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of ``shape``, scales and padding included."""
        groups = math.prod(shape[:-1]) * self._groups(shape[-1])
        return groups * (4 * self.group // self.per_word + int(np.dtype(self.model_type).itemsize))

    def arrays(self, packed: MlcPacked) -> dict[str, np.ndarray]:
        """``q_weight`` and ``q_scale`` of a matrix as MLC stores them, C order.

        Layout NK: uint32 ``(N, groups * group / per_word)`` and ``(N, groups)``; KN: both transposed.
        """
        turned = np.transpose if self.layout == "KN" else np.asarray
        parts = {"q_weight": packed.q_weight, "q_scale": packed.q_scale}
        return {name: np.ascontiguousarray(turned(part)) for name, part in parts.items()}

    def from_arrays(self, q_weight: np.ndarray, q_scale: np.ndarray, columns: int) -> MlcPacked:
        """The matrix of ``columns`` inputs that stored arrays hold; raises ``ValueError`` for shapes of no such one."""
        words, scales = (part.T if self.layout == "KN" else part for part in (q_weight, q_scale))
        groups = self._groups(columns)
        rows = scales.shape[0]
        if words.shape != (rows, groups * self.group // self.per_word) or scales.shape != (rows, groups):
            raise ValueError(
                f"q_weight {q_weight.shape} and q_scale {q_scale.shape} are not a matrix of {columns} inputs "
                f"in groups of {self.group} codes of {self.bits} bits, layout {self.layout}"
            )
        return MlcPacked(words, scales, columns)

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

    def _groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def _round(self, x: np.ndarray) -> np.ndarray:
        """To the model's type and back: a float32 operation so rounded is that of float16 hardware."""
        return np.asarray(x.astype(self.model_type, copy=False).astype(np.float32, copy=False))
