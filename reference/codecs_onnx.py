"""What ONNX Runtime's ``MatMulNBits`` computes with: codes of 4 or 8 bits, float32 scales, in blocks along a row.

Source: the operator's documentation (com.microsoft, onnxruntime/docs/ContribOperators.md):
``weight = (code - zero point) * scale``, codes packed along the row, the first of a byte in its lower half;
zero points packed the same way, and ``2 ** (bits - 1)`` where there are none.

How codes and scales are chosen is not the operator's matter but ours. From the range of a block:

    symmetric   scale = the value of largest magnitude / -2^(bits-1), so that this value is exact (ggml's Q4_0 and
                ONNX Runtime's own quantizer choose so)
    asymmetric  scale = (max - min) / (2^bits - 1) over the block and zero, zero point = round(-min / scale)

8 bits stop there. 4 bits try the scales of CANDIDATES as well, which clip the ends of the range for smaller steps
between; fit the scale of each to its codes by least squares, sum((code - zero) w) / sum((code - zero)^2); and keep
the candidate of the smallest squared error, the first of equals. Sums run in one order everywhere (:func:`_sum`),
so that codes do not depend on the machine or on numpy's version.

A block that holds NaN or Inf gets the scale NaN, so that the fault stays visible in all of it. A block whose
scale is not a normal float32 is all zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np

from reference.errors import ConfigError

_TINY = np.finfo(np.float32).tiny

#: What the scale that follows from the range is multiplied by, asymmetric or not. Symmetric codes reach -8 but only
#: 7: 8 / -7 puts the value of largest magnitude at that end.
CANDIDATES = {False: (1.0, -8 / 7, 8 / 9), True: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}


class OnnxPacked(NamedTuple):
    """A matrix ``(N, K)`` as the operator's inputs hold it.

    codes   uint8 ``(N, K / group, group * bits / 8)``
    scales  float32 ``(N, K / group)``
    zeros   uint8 ``(N, ceil(K / group * bits / 8))``, or ``None``: symmetric
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: Optional[np.ndarray]  # noqa: UP045 - evaluated at run time, on Python 3.9 too


@dataclass(frozen=True)
class OnnxBlocks:
    """Blocks of ``group`` weights along the input axis, with or without a zero point of their own."""

    bits: int
    group: int
    asymmetric: bool = False

    def quantize(self, w: np.ndarray) -> OnnxPacked:
        """Pack float32 ``w (..., K)``; raises :class:`ConfigError` if K is not a multiple of the group."""
        if w.shape[-1] % self.group:
            raise ConfigError(f"rows of {w.shape[-1]} weights do not divide into groups of {self.group}")
        blocks = w.astype(np.float32, copy=False).reshape(*w.shape[:-1], w.shape[-1] // self.group, self.group)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scale, zero = self._range(blocks)
            if self.bits == 4:
                codes, scale = self._searched(blocks, scale, zero)
            else:
                codes = self._coded(blocks, scale, zero)
        zeros = self._pack(zero[..., 0].astype(np.uint8)) if self.asymmetric else None
        return OnnxPacked(self._pack(codes), scale[..., 0], zeros)

    def dequantize(self, packed: OnnxPacked) -> np.ndarray:
        """``(code - zero point) * scale``, float32 ``(..., K)``."""
        codes = self._unpack(packed.codes, self.group).astype(np.float32)
        zero = np.float32(2 ** (self.bits - 1))
        if packed.zeros is not None:
            codes -= self._unpack(packed.zeros, packed.scales.shape[-1]).astype(np.float32)[..., None]
        else:
            codes -= zero
        with np.errstate(invalid="ignore", over="ignore"):
            values = codes * packed.scales[..., None]
        return np.asarray(values.reshape(*values.shape[:-2], values.shape[-2] * self.group))

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of ``shape``, scales and zero points included."""
        rows, groups = math.prod(shape[:-1]), shape[-1] // self.group
        zeros = -(-groups * self.bits // 8) if self.asymmetric else 0
        return rows * (shape[-1] * self.bits // 8 + 4 * groups + zeros)

    def _searched(self, blocks: np.ndarray, whole: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scale of the best candidate of every block; ``whole`` is the scale of its range."""
        kept: tuple[np.ndarray, ...] = ()
        for factor in CANDIDATES[self.asymmetric]:
            scale = _normal(whole * np.float32(factor))
            codes = self._coded(blocks, scale, zero)
            steps = codes.astype(np.float32) - zero
            used = steps.any(axis=-1, keepdims=True)
            fitted = _normal(np.divide(_sum(steps * blocks), _sum(steps * steps), out=scale.copy(), where=used))
            scale = np.where(np.isfinite(fitted) & (fitted != 0), fitted, scale)
            off = steps * scale - blocks
            found = (codes, scale, _sum(off * off))
            kept = tuple(np.where(found[2] < kept[2], *pair) for pair in zip(found, kept)) if kept else found
        return kept[0], kept[1]

    def _coded(self, blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """The uint8 codes nearest to ``blocks``, of the same shape."""
        steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=np.isfinite(scale) & (scale != 0))
        return np.asarray(np.clip(np.rint(steps + zero), 0, 2**self.bits - 1).astype(np.uint8))

    def _range(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of every block, float32 ``(..., groups, 1)``; the scale is NaN, zero or normal."""
        low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)  # NaN wins
        if self.asymmetric:
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
            scale = high / np.float32(2**self.bits - 1) - low / np.float32(2**self.bits - 1)
        else:
            scale = np.where(high > -low, high, low) / np.float32(-(2 ** (self.bits - 1)))
        scale = np.where(np.isfinite(low) & np.isfinite(high), scale, np.float32(np.nan))
        scale = _normal(scale)
        zero = np.full_like(scale, 2 ** (self.bits - 1))
        if self.asymmetric:
            np.divide(-low, scale, out=zero, where=scale > 0)
            zero = np.clip(np.rint(zero), 0, 2**self.bits - 1)
        return scale, zero

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``(..., n)`` -> bytes ``(..., ceil(n * bits / 8))``."""
        if self.bits == 8:
            return codes
        if codes.shape[-1] % 2:
            codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
        return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4)))

    def _unpack(self, packed: np.ndarray, n: int) -> np.ndarray:
        if self.bits == 8:
            return packed
        pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
        return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :n]


def _normal(scale: np.ndarray) -> np.ndarray:
    """Zero where it is not a normal float32; NaN stays."""
    return np.asarray(np.where(np.abs(scale) < _TINY, np.float32(0), scale))


def _sum(x: np.ndarray) -> np.ndarray:
    """Over the last axis, which stays as one: halves added to each other until one element is left."""
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        folded = x[..., :half].copy()
        folded[..., : x.shape[-1] - half] += x[..., half:]
        x = folded
    return x


INT4_G32, INT4_G128 = OnnxBlocks(4, 32), OnnxBlocks(4, 128)
INT4_G32_ASYM, INT4_G128_ASYM = OnnxBlocks(4, 32, asymmetric=True), OnnxBlocks(4, 128, asymmetric=True)
INT8_G32, INT8_G128 = OnnxBlocks(8, 32), OnnxBlocks(8, 128)


class OnnxScheme(NamedTuple):
    """How the matrices of the layers are kept, the head, and those of time mixing (``None``: like the others)."""

    matrices: OnnxBlocks
    head: OnnxBlocks
    att: Optional[OnnxBlocks] = None  # noqa: UP045 - evaluated at run time, on Python 3.9 too

    def blocks(self, name: str) -> OnnxBlocks:
        """How the matrix of a canonical name is kept."""
        if name == "head.weight":
            return self.head
        return self.att if self.att is not None and ".att." in name else self.matrices


#: Scheme name -> what is kept. The embedding is not quantized. The head is quantized like the layers, or to 8 bits
#: (``_head8``), and so are the four matrices of time mixing (``_att8``): of all ways to spend bytes on 8 bits these
#: four lower the KL divergence most per byte. A name that ends in ``_int8act`` says how is computed and keeps what
#: the name before it says.
ONNX_SCHEMES = {
    "ort_int4_g32": OnnxScheme(INT4_G32, INT4_G32),
    "ort_int4_g32_asym": OnnxScheme(INT4_G32_ASYM, INT4_G32_ASYM),
    "ort_int4_g128": OnnxScheme(INT4_G128, INT4_G128),
    "ort_int4_g128_asym": OnnxScheme(INT4_G128_ASYM, INT4_G128_ASYM),
    "ort_int4_g32_int8act": OnnxScheme(INT4_G32, INT4_G32),
    "ort_int4_g32_asym_int8act": OnnxScheme(INT4_G32_ASYM, INT4_G32_ASYM),
    "ort_int4_g128_int8act": OnnxScheme(INT4_G128, INT4_G128),
    "ort_int4_g128_asym_int8act": OnnxScheme(INT4_G128_ASYM, INT4_G128_ASYM),
    "ort_int4_g32_asym_head8_int8act": OnnxScheme(INT4_G32_ASYM, INT8_G32),
    "ort_int4_g32_asym_att8_int8act": OnnxScheme(INT4_G32_ASYM, INT4_G32_ASYM, INT8_G32),
    "ort_int4_g128_asym_att8_int8act": OnnxScheme(INT4_G128_ASYM, INT4_G128_ASYM, INT8_G128),
    "ort_int8_g32": OnnxScheme(INT8_G32, INT8_G32),
    "ort_int8_g32_int8act": OnnxScheme(INT8_G32, INT8_G32),
    "ort_int8_g128_int8act": OnnxScheme(INT8_G128, INT8_G128),
}
