"""ggml's block formats: blocks of 32 weights along a row, each a float16 scale followed by its codes.

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
        """Pack ``w (..., K)`` into uint8 ``(..., K / 32 * block_bytes)``, the bytes of a ggml file.

        Raises :class:`ConfigError` if K is not a multiple of 32.
        """
        if w.shape[-1] % BLOCK:
            raise ConfigError(f"rows of {w.shape[-1]} weights do not divide into groups of {BLOCK}")
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            blocks = self.encode(w.astype(np.float32, copy=False).reshape(-1, BLOCK))
        return blocks.reshape(*w.shape[:-1], w.shape[-1] // BLOCK * self.block_bytes)

    def dequantize(self, packed: np.ndarray) -> np.ndarray:
        """Float32 ``(..., K)``."""
        with np.errstate(invalid="ignore"):
            values = self.decode(packed.reshape(-1, self.block_bytes))
        return values.reshape(*packed.shape[:-1], packed.shape[-1] // self.block_bytes * BLOCK)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of ``shape``, scales included."""
        return math.prod(shape) // BLOCK * self.block_bytes


def _scaled(blocks: np.ndarray, d: np.ndarray) -> np.ndarray:
    """``blocks / d`` as ggml computes it, by the reciprocal; 0 where a block is all zero, tiny or not finite.

    Where the reciprocal overflows, the float16 scale is zero anyway and the codes mean nothing.
    """
    inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    return np.where(np.isfinite(inverse) & np.isfinite(d), blocks * inverse, np.float32(0))


def _block_bytes(d: np.ndarray, *codes: np.ndarray) -> np.ndarray:
    """Scales ``(n, 1)`` as float16, then the codes, as bytes ``(n, block_bytes)``."""
    scale = np.where(np.isfinite(d), d, np.float32(np.nan)).astype(_F16)
    return np.concatenate([scale.view(np.uint8), *(c.view(np.uint8) for c in codes)], axis=1)


def _scale(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, :2]).view(_F16).astype(np.float32)


def _encode_q4_0(blocks: np.ndarray) -> np.ndarray:
    largest = np.abs(blocks).argmax(axis=1)[:, None]  # NaN wins
    d = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    codes = np.minimum(_scaled(blocks, d) + np.float32(8.5), np.float32(15)).astype(np.uint8)
    return _block_bytes(d, codes[:, :16] | codes[:, 16:] << 4)


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return np.asarray(_scale(blocks) * (codes.astype(np.float32) - np.float32(8)))


def _encode_q8_0(blocks: np.ndarray) -> np.ndarray:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    return _block_bytes(d, _round_half_away(_scaled(blocks, d)).astype(np.int8))


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(_scale(blocks) * blocks[:, 2:].view(np.int8).astype(np.float32))


def _round_half_away(x: np.ndarray) -> np.ndarray:
    """C's ``roundf``. Adding 0.5 and truncating would round 0.49999997 up."""
    whole = np.trunc(x)
    return np.asarray(whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), np.float32(0)))


Q4_0 = GgmlBlocks(file_type=2, block_bytes=18, encode=_encode_q4_0, decode=_decode_q4_0)
Q8_0 = GgmlBlocks(file_type=9, block_bytes=34, encode=_encode_q8_0, decode=_decode_q8_0)
