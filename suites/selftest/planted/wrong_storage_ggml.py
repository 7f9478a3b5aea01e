"""Faults of storage by ggml, ONNX Runtime and ChatRWKV: right bytes that are read wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from reference.codecs_ggml import GgmlBlocks
from reference.codecs_onnx import OnnxBlocks, OnnxPacked
from reference.codecs_rwkv_int8 import RwkvInt8
from suites.selftest.planted.wrong_storage import Misread, last_group_dropped, stored

_Q4_0, _Q4_1 = {"int8x32": "Q4_0", "fp32": "Q4_0"}, {"int8x32": "Q4_1", "fp32": "Q4_1"}
_Q5_0, _Q8_0 = {"int8x32": "Q5_0", "fp32": "Q5_0"}, {"int8x32": "Q8_0", "fp32": "Q8_0"}
_ORT = {"fp32": "ort_int4_g32_asym"}
_RWKV8 = {"fp32": "fp32i8", "fp16": "fp16i8"}


# ggml: bytes of blocks of 32


def _bytes(change: Callable[[np.ndarray], np.ndarray]) -> Misread:
    """``change`` is given the bytes as ``(N, blocks, bytes of a block)``."""

    def misread(packing: GgmlBlocks, packed: np.ndarray) -> np.ndarray:
        blocks = packed.reshape(*packed.shape[:-1], -1, packing.block_bytes).copy()
        return packing.dequantize(change(blocks).reshape(packed.shape))

    return misread


def _values(change: Callable[[np.ndarray], np.ndarray]) -> Misread:
    """``change`` is given what the blocks are worth, ``(N, blocks, 32)``."""

    def misread(packing: GgmlBlocks, packed: np.ndarray) -> np.ndarray:
        w = packing.dequantize(packed)
        return np.asarray(change(w.reshape(*w.shape[:-1], -1, packing.group)).reshape(w.shape))

    return misread


def _nibbles_swapped(first: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(blocks: np.ndarray) -> np.ndarray:
        codes = blocks[..., first:]
        blocks[..., first:] = codes >> 4 | codes << 4
        return blocks

    return change


def _neighbours(values: np.ndarray) -> np.ndarray:
    """As before May 2023: two weights that share a byte are neighbours, not 16 apart."""
    half = values.shape[-1] // 2
    return np.asarray(np.stack([values[..., :half], values[..., half:]], axis=-1).reshape(values.shape))


def _block_scales(blocks: np.ndarray) -> np.ndarray:
    """Each block has the scale of the block before."""
    blocks[..., :2] = np.roll(blocks[..., :2], 1, axis=-2)
    return blocks


def _zero_seven(packing: GgmlBlocks, packed: np.ndarray) -> np.ndarray:
    blocks = packed.reshape(*packed.shape[:-1], -1, packing.block_bytes)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    w = packing.dequantize(packed)
    return np.asarray(w + np.repeat(scale[..., 0], packing.group, axis=-1))


def _minimum(factor: float) -> Misread:
    """The minimum of a block times ``factor``."""

    def change(blocks: np.ndarray) -> np.ndarray:
        low = np.ascontiguousarray(blocks[..., 2:4]).view("<f2") * np.float16(factor)
        blocks[..., 2:4] = low.view(np.uint8)
        return blocks

    return _bytes(change)


def _no_fifth_bit(blocks: np.ndarray) -> np.ndarray:
    blocks[..., 2:6] = 0
    return blocks


def _fifth_bits_reversed(blocks: np.ndarray) -> np.ndarray:
    blocks[..., 2:6] = blocks[..., 5:1:-1].copy()
    return blocks


def _unsigned(packing: GgmlBlocks, packed: np.ndarray) -> np.ndarray:
    blocks = packed.reshape(*packed.shape[:-1], -1, packing.block_bytes)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    return np.asarray((scale * blocks[..., 2:].astype(np.float32)).reshape(*packed.shape[:-1], -1))


def _onnx_zeros(change: Callable[[np.ndarray], np.ndarray | None]) -> Misread:
    def misread(packing: OnnxBlocks, packed: OnnxPacked) -> np.ndarray:
        assert packed.zeros is not None
        return packing.dequantize(packed._replace(zeros=change(packed.zeros)))

    return misread


def _zeros_ignored(packing: OnnxBlocks, packed: OnnxPacked) -> np.ndarray:
    return replace(packing, asymmetric=False).dequantize(packed._replace(zeros=None))


def _rwkv(**change: Callable[[Any], np.ndarray]) -> Misread:
    def misread(packing: RwkvInt8, packed: Any) -> np.ndarray:
        return packing.dequantize(packed._replace(**{name: make(packed) for name, make in change.items()}))

    return misread


def _half_left_out(packing: RwkvInt8, packed: Any) -> np.ndarray:
    step = (packed.ry * packed.rx).astype(np.float32) / 2
    return np.ascontiguousarray(packing.dequantize(packed) - step.T)


FAULTS = (
    stored(
        "ggml nibbles swapped",
        "Weights 0..15 of a block are taken for 16..31.",
        _Q4_0,
        _bytes(_nibbles_swapped(2)),
    ),
    stored("ggml's old order", "Neighbours share a byte, as before May 2023.", _Q4_0, _values(_neighbours)),
    stored("scale of the block before", "The pointer to the scale is one block late.", _Q4_0, _bytes(_block_scales)),
    stored("zero point 7 for 8", "Code 7 is taken for zero.", _Q4_0, _zero_seven),
    stored("last block dropped", "The loop over blocks ends one too early.", _Q4_0, last_group_dropped),
    stored("minimum left out", "Blocks begin at zero.", _Q4_1, _minimum(0)),
    stored("minimum subtracted", "The minimum has the wrong sign.", _Q4_1, _minimum(-1)),
    stored("fifth bits left out", "Codes of five bits lose the highest.", _Q5_0, _bytes(_no_fifth_bit)),
    stored(
        "fifth bits in big-endian order",
        "The word of the highest bits is read the wrong way round.",
        _Q5_0,
        _bytes(_fifth_bits_reversed),
    ),
    stored("signed bytes as unsigned", "int8 codes are read as uint8.", _Q8_0, _unsigned),
    stored("zero points ignored", "Zero is code 8 in every block.", _ORT, _zeros_ignored),
    stored(
        "zero points swapped",
        "Two zero points of a byte are exchanged.",
        _ORT,
        _onnx_zeros(lambda z: z >> np.uint8(4) | z << np.uint8(4)),
    ),
    stored(
        "offsets left out",
        "The offset of every input is taken for zero.",
        _RWKV8,
        _rwkv(my=lambda p: np.zeros_like(p.my)),
    ),
    stored(
        "scale of the next output",
        "The scale of an output is that of the next.",
        _RWKV8,
        _rwkv(rx=lambda p: np.roll(p.rx, -1)),
    ),
    stored("half a step left out", "Codes stand for the lower edge of their step.", _RWKV8, _half_left_out),
)
