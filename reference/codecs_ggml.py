"""ggml's block formats: blocks of 32 weights along a row, each a float16 scale, in Q4_1 and Q5_1 the
block's minimum, and then the codes.

Source: ``ggml/src/ggml-quants.c`` of https://github.com/ggml-org/ggml, bit for bit for finite weights.

Deliberate difference: a block that holds NaN or Inf gets the scale NaN, so that the fault stays
visible in all of it; ggml's search for the largest weight steps over NaN and casts it to any code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reference.errors import ConfigError

BLOCK = 32

_F16 = np.dtype("<f2")

#: Blocks ``(n, 32)`` float32 -> their bytes; the bytes of blocks ``(n, bytes)`` -> float32 ``(n, 32)``.
Encode = Callable[[np.ndarray], np.ndarray]
Decode = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GgmlBlocks:
    """One block format. ``file_type`` is its number in a ggml file of rwkv.cpp."""

    file_type: int
    block_bytes: int
    encode: Encode
    decode: Decode
    group: int = BLOCK

    def quantize(self, w: np.ndarray) -> np.ndarray:
        """Pack ``w (..., K)`` into uint8 ``(..., K / group * block_bytes)``, the bytes of a ggml file.

        Raises :class:`ConfigError` if K is not a multiple of the group.
        """
        if w.shape[-1] % self.group:
            raise ConfigError(f"rows of {w.shape[-1]} weights do not divide into groups of {self.group}")
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            blocks = self.encode(w.astype(np.float32, copy=False).reshape(-1, self.group))
        return blocks.reshape(*w.shape[:-1], w.shape[-1] // self.group * self.block_bytes)

    def dequantize(self, packed: np.ndarray) -> np.ndarray:
        """Float32 ``(..., K)``."""
        with np.errstate(invalid="ignore"):
            values = self.decode(packed.reshape(-1, self.block_bytes))
        return values.reshape(*packed.shape[:-1], packed.shape[-1] // self.block_bytes * self.group)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of ``shape``, scales included."""
        return math.prod(shape) // self.group * self.block_bytes


def scaled(blocks: np.ndarray, d: np.ndarray) -> np.ndarray:
    """``blocks / d`` as ggml computes it, by the reciprocal; 0 where a block is all zero, tiny or not finite.

    Where the reciprocal overflows, the float16 scale is zero anyway and the codes mean nothing.
    """
    inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    return np.where(np.isfinite(inverse) & np.isfinite(d), blocks * inverse, np.float32(0))


def _block_bytes(d: np.ndarray, *codes: np.ndarray) -> np.ndarray:
    """Scales ``(n, 1)`` as float16, then the codes, as bytes ``(n, block_bytes)``."""
    scale = np.where(np.isfinite(d), d, np.float32(np.nan)).astype(_F16)
    return np.concatenate([scale.view(np.uint8), *(c.view(np.uint8) for c in codes)], axis=1)


def _scale(blocks: np.ndarray, at: int = 0) -> np.ndarray:
    """The float16 at byte ``at`` of every block: its scale, or its minimum. Float32 ``(n, 1)``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(_F16).astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """The low four bits of codes ``(n, 32)`` as bytes ``(n, 16)``: weight i beside weight i + 16."""
    half = codes.shape[1] // 2
    return np.asarray(codes[:, :half] & 15 | codes[:, half:] << 4)


def _from_nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """The fifth bit of codes ``(n, 32)`` as bytes ``(n, 4)``: a little-endian word, weight i at bit i."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _five_bits(packed: np.ndarray) -> np.ndarray:
    """Codes 0..31 ``(n, 32)`` of the fifth bits ``(n, 4)`` followed by the nibbles ``(n, 16)``."""
    fifth = packed.shape[1] // 5
    high = np.unpackbits(packed[:, :fifth], axis=1, bitorder="little") << 4
    return np.asarray(_from_nibbles(packed[:, fifth:]) | high)


def _symmetric(blocks: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales, and codes 0..2 levels - 1 that stand for -levels..levels - 1; the largest weight gets -levels."""
    largest = np.abs(blocks).argmax(axis=1)[:, None]  # NaN wins
    d = np.take_along_axis(blocks, largest, axis=1) / np.float32(-levels)
    codes = np.minimum(scaled(blocks, d) + np.float32(levels + 0.5), np.float32(2 * levels - 1))
    return d, codes.astype(np.uint8)


def _above_minimum(blocks: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, minima as float16 bytes, and codes 0..top counted from the minimum."""
    low = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - low) / np.float32(top)
    codes = np.minimum(scaled(blocks - low, d) + np.float32(0.5), np.float32(top)).astype(np.uint8)
    return d, low.astype(_F16).view(np.uint8), codes


def _encode_q4_0(blocks: np.ndarray) -> np.ndarray:
    d, codes = _symmetric(blocks, 8)
    return _block_bytes(d, _nibbles(codes))


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_scale(blocks) * (_from_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)))


def _encode_q4_1(blocks: np.ndarray) -> np.ndarray:
    d, low, codes = _above_minimum(blocks, 15)
    return _block_bytes(d, low, _nibbles(codes))


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_scale(blocks) * _from_nibbles(blocks[:, 4:]).astype(np.float32) + _scale(blocks, 2))


def _encode_q5_0(blocks: np.ndarray) -> np.ndarray:
    d, codes = _symmetric(blocks, 16)
    return _block_bytes(d, _fifth_bits(codes), _nibbles(codes))


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_scale(blocks) * (_five_bits(blocks[:, 2:]).astype(np.float32) - np.float32(16)))


def _encode_q5_1(blocks: np.ndarray) -> np.ndarray:
    d, low, codes = _above_minimum(blocks, 31)
    return _block_bytes(d, low, _fifth_bits(codes), _nibbles(codes))


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_scale(blocks) * _five_bits(blocks[:, 4:]).astype(np.float32) + _scale(blocks, 2))


def _encode_q8_0(blocks: np.ndarray) -> np.ndarray:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    return _block_bytes(d, round_half_away(scaled(blocks, d)).astype(np.int8))


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_scale(blocks) * blocks[:, 2:].view(np.int8).astype(np.float32))


def round_half_away(x: np.ndarray) -> np.ndarray:
    """C's ``roundf``. Adding 0.5 and truncating would round 0.49999997 up."""
    whole = np.trunc(x)
    return np.asarray(whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), np.float32(0)))


Q4_0 = GgmlBlocks(file_type=2, block_bytes=18, encode=_encode_q4_0, decode=_decode_q4_0)
Q4_1 = GgmlBlocks(file_type=3, block_bytes=20, encode=_encode_q4_1, decode=_decode_q4_1)
Q5_0 = GgmlBlocks(file_type=7, block_bytes=22, encode=_encode_q5_0, decode=_decode_q5_0)
Q5_1 = GgmlBlocks(file_type=8, block_bytes=24, encode=_encode_q5_1, decode=_decode_q5_1)
Q8_0 = GgmlBlocks(file_type=9, block_bytes=34, encode=_encode_q8_0, decode=_decode_q8_0)
