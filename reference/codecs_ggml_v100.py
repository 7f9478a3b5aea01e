"""Block formats of rwkv.cpp files of version 100, as the library of April 2023 writes them.

Source: ``ggml.c`` of https://pypi.org/project/rwkv-cpp-python/0.0.1 for blocks of 32; for blocks of 16, that of
https://github.com/saharNooby/ggml, which rwkv.cpp was built with: Q4_2 of a0687a3a (rwkv.cpp 11988923, 2023-04-29,
the same in the ggml of every later rwkv.cpp that has it), Q4_3 of bfa8d5b5 (rwkv.cpp 3587ff9, 2023-04-22; gone a week
later). Bit for bit for finite weights. ggml broke these layouts in May 2023; what bears the same names since then is
in :mod:`reference.codecs_ggml`. Two weights that are neighbours share a byte, the first in its low four bits.

    Q4_0_v100  float32 scale, codes 1..15 that stand for -7..7
    Q4_1_v100  float32 scale, float32 minimum, codes 0..15
    Q4_1_O     float16 scale, minimum, index and value of the largest weight, which is left out of the
               other two; codes 0..15. A block of zeros has the index 65535
    Q4_2       16 weights: float16 scale, codes 0..15 that stand for -8..7; the largest weight gets -8. Until
               2023-04-29 files were written with a scale searched for, of either sign; they read the same
    Q4_3       16 weights: float16 scale, float16 minimum, codes 0..15

Deliberate difference: a block that holds NaN or Inf is NaN as a whole; ggml steps over NaN.
"""

from __future__ import annotations

import numpy as np

from reference.codecs_ggml import BLOCK, GgmlBlocks, round_half_away, scaled

#: Weights of a block of Q4_2 and Q4_3.
HALF_BLOCK = 16

_F16, _F32 = np.dtype("<f2"), np.dtype("<f4")
_NO_OUTLIER = 65535


def _bytes(values: np.ndarray, kind: np.dtype[np.floating]) -> np.ndarray:
    """Values ``(n, 1)`` as their bytes; what is not finite is NaN."""
    return np.where(np.isfinite(values), values, np.float32(np.nan)).astype(kind).view(np.uint8)


def _values(blocks: np.ndarray, at: int, kind: np.dtype[np.floating]) -> np.ndarray:
    """The number at byte ``at`` of every block, float32 ``(n, 1)``."""
    part = np.ascontiguousarray(blocks[:, at : at + kind.itemsize])
    return np.asarray(part.view(kind).astype(np.float32))


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Codes ``(n, k)`` as bytes ``(n, k / 2)``, weights 2i and 2i + 1 in byte i."""
    codes = codes.astype(np.uint8)
    return np.asarray(codes[:, 0::2] | codes[:, 1::2] << 4)


def _from_pairs(packed: np.ndarray) -> np.ndarray:
    """Codes ``(n, k)`` of bytes ``(n, k / 2)``, as float32."""
    codes = np.stack([packed & 15, packed >> 4], axis=2)
    return codes.reshape(len(packed), 2 * packed.shape[1]).astype(np.float32)


def _above(low: np.ndarray, blocks: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Codes 0..15 counted from the minimum."""
    return np.asarray(np.clip(round_half_away(scaled(blocks - low, d)), 0, 15))


def _encode_q4_0(blocks: np.ndarray) -> np.ndarray:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    codes = round_half_away(scaled(blocks, d)) + np.float32(8)
    return np.concatenate([_bytes(d, _F32), _pairs(codes)], axis=1)


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_values(blocks, 0, _F32) * (_from_pairs(blocks[:, 4:]) - np.float32(8)))


def _encode_q4_1(blocks: np.ndarray) -> np.ndarray:
    low = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - low) / np.float32(15)
    return np.concatenate([_bytes(d, _F32), _bytes(low, _F32), _pairs(_above(low, blocks, d))], axis=1)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_from_pairs(blocks[:, 8:]) * _values(blocks, 0, _F32) + _values(blocks, 4, _F32))


def _encode_q4_1_o(blocks: np.ndarray) -> np.ndarray:
    size = np.abs(blocks)
    index = size.argmax(axis=1)[:, None]  # the first of equals; NaN wins
    outlier = np.take_along_axis(blocks, index, axis=1)
    has_outlier = size.max(axis=1, keepdims=True) != 0
    is_outlier = (np.arange(BLOCK) == index) & has_outlier
    low = np.where(is_outlier, np.inf, blocks).min(axis=1, keepdims=True).astype(np.float32)
    high = np.where(is_outlier, -np.inf, blocks).max(axis=1, keepdims=True).astype(np.float32)
    d = (high - low) / np.float32(15)
    codes = np.where(is_outlier, np.float32(0), _above(low, blocks, d))
    # Of a block with NaN or Inf, that one is the outlier; the scale must say so for the others.
    d = np.where(np.isfinite(outlier), d, np.float32(np.nan))
    stored_index = np.where(has_outlier, index, _NO_OUTLIER).astype("<u2").view(np.uint8)
    outlier = np.where(has_outlier, outlier, np.float32(0))
    header = [_bytes(d, _F16), _bytes(low, _F16), stored_index, _bytes(outlier, _F16)]
    return np.concatenate([*header, _pairs(codes)], axis=1)


def _decode_q4_1_o(blocks: np.ndarray) -> np.ndarray:
    values = _from_pairs(blocks[:, 8:]) * _values(blocks, 0, _F16) + _values(blocks, 2, _F16)
    index = np.ascontiguousarray(blocks[:, 4:6]).view("<u2")
    return np.where(np.arange(BLOCK) == index, _values(blocks, 6, _F16), values)


def _encode_q4_2(blocks: np.ndarray) -> np.ndarray:
    largest = np.abs(blocks).argmax(axis=1)[:, None]  # the first of equals; NaN wins
    d = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    codes = np.minimum(np.trunc(scaled(blocks, d) + np.float32(8.5)), np.float32(15))
    return np.concatenate([_bytes(d, _F16), _pairs(codes)], axis=1)


def _decode_q4_2(blocks: np.ndarray) -> np.ndarray:
    return np.asarray((_from_pairs(blocks[:, 2:]) - np.float32(8)) * _values(blocks, 0, _F16))


def _encode_q4_3(blocks: np.ndarray) -> np.ndarray:
    # The first of equals: of zeros, the one whose sign is stored. NaN wins.
    low = np.take_along_axis(blocks, blocks.argmin(axis=1)[:, None], axis=1)
    d = (blocks.max(axis=1, keepdims=True) - low) / np.float32(15)
    codes = np.trunc(scaled(blocks - low, d) + np.float32(0.5))
    return np.concatenate([_bytes(d, _F16), _bytes(low, _F16), _pairs(np.minimum(codes, np.float32(15)))], axis=1)


def _decode_q4_3(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_from_pairs(blocks[:, 4:]) * _values(blocks, 0, _F16) + _values(blocks, 2, _F16))


Q4_0_V100 = GgmlBlocks(file_type=2, block_bytes=20, encode=_encode_q4_0, decode=_decode_q4_0)
Q4_1_V100 = GgmlBlocks(file_type=3, block_bytes=24, encode=_encode_q4_1, decode=_decode_q4_1)
Q4_1_O = GgmlBlocks(file_type=4, block_bytes=24, encode=_encode_q4_1_o, decode=_decode_q4_1_o)
Q4_2 = GgmlBlocks(file_type=5, block_bytes=10, encode=_encode_q4_2, decode=_decode_q4_2, group=HALF_BLOCK)
Q4_3 = GgmlBlocks(file_type=6, block_bytes=12, encode=_encode_q4_3, decode=_decode_q4_3, group=HALF_BLOCK)
