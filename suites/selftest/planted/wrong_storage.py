"""Faults of quantized storage: right bytes that are read wrongly. How to plant one, and those of MLC-LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from reference.codecs_mlc import MlcGroups, MlcPacked
from reference.codecs_rwkv_int8 import RwkvInt8
from reference.operations import steps
from reference.schemes import codec_of
from reference.stored_formats import Packed
from reference.weights import bf16_to_f32, f32_to_bf16
from suites.selftest.planted.fault import Fault, Patch, Planted, Site, changed, rounded
from suites.selftest.planted.wrong_products import PRODUCTS

#: ``misread(packing, packed)`` -> the matrix ``(N, K)`` as wrong code sees it.
Misread = Callable[[Any, Any], np.ndarray]


_MLC4 = {"fp32": "q4f32_1", "fp16": "q4f16_1", "int8x32": "q4f16_1"}


_MLC8 = {"fp32": "q8f16_1", "fp16": "q8f16_1"}


def _one_matrix(misread: Misread) -> Callable[[Site], Planted]:
    """The fault in one matrix of a layer, or in every packed matrix of the model where the site is all layers."""

    def plant(site: Site) -> Planted:
        codec = codec_of(site.scheme)
        points = {
            step.at + PRODUCTS[step.name][1]: step.point for step in steps(site.weights.config) if step.name in PRODUCTS
        }
        if not site.everywhere:
            chosen = str(site.rng.choice([name for name in points if name.startswith(f"blocks.{site.layers[0]}.")]))
            wanted = {chosen}
        else:
            wanted = {name for name in points if _packing(codec.format(name)) is not None}

        def change(name: str, a: np.ndarray) -> np.ndarray:
            if name not in wanted:
                return a
            packing = _packing(codec.format(name))
            return misread(packing, packing.quantize(site.original[name].array()))

        first = next(point for name, point in points.items() if name in wanted)
        return Planted(Patch(weights=changed(site.weights, change)), first)

    return plant


def _packing(format: Any) -> Any:
    if isinstance(format, RwkvInt8):
        return format
    return format.packing if isinstance(format, Packed) else None


def _codes(change: Callable[[np.ndarray, MlcGroups], np.ndarray]) -> Misread:
    """Codes ``(N, K)`` other than they were packed."""

    def misread(packing: MlcGroups, packed: MlcPacked) -> np.ndarray:
        lanes = packing.unpack(packed.q_weight)
        codes = change(lanes.reshape(*lanes.shape[:-2], -1), packing)
        return packing.dequantize(packed._replace(q_weight=packing.pack(codes)))

    return misread


def _scales(change: Callable[[np.ndarray], np.ndarray]) -> Misread:
    def misread(packing: MlcGroups, packed: MlcPacked) -> np.ndarray:
        return packing.dequantize(packed._replace(q_scale=change(packed.q_scale)))

    return misread


def _lanes_reversed(codes: np.ndarray, packing: MlcGroups) -> np.ndarray:
    return np.asarray(codes.reshape(*codes.shape[:-1], -1, packing.per_word)[..., ::-1].reshape(codes.shape))


def _pairs_swapped(codes: np.ndarray, packing: MlcGroups) -> np.ndarray:
    return np.asarray(codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape))


def _off_zero(packing: MlcGroups, packed: MlcPacked) -> np.ndarray:
    """Zero is taken for code 8, not 7."""
    shift = np.repeat(packed.q_scale.astype(np.float32), packing.group, axis=-1)[..., : packed.columns]
    return np.asarray(packing.dequantize(packed) - shift)


def _as_if_transposed(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a.T).reshape(a.shape)


def _words_transposed(packing: MlcGroups, packed: MlcPacked) -> np.ndarray:
    return packing.dequantize(packed._replace(q_weight=_as_if_transposed(packed.q_weight)))


def _scales_twice(packing: MlcGroups, packed: MlcPacked) -> np.ndarray:
    return np.asarray(packing.dequantize(packed) * np.repeat(packed.q_scale.astype(np.float32), packing.group, axis=-1))


def last_group_dropped(packing: Any, packed: Any) -> np.ndarray:
    """The last group of every row is zero."""
    w = packing.dequantize(packed).copy()
    w[:, -packing.group :] = 0
    return np.asarray(w)


def stored(name: str, says: str, schemes: Mapping[str, str], misread: Misread) -> Fault:
    """One packed matrix of a layer read wrongly, or all of them."""
    return Fault(name, says, _one_matrix(misread), schemes)


def _truncated(site: Site) -> Planted:
    """bfloat16 by cutting bits off instead of rounding."""

    def cut(name: str, a: np.ndarray) -> np.ndarray:
        original = np.ascontiguousarray(site.original[name].array(np.float32))
        return np.asarray((original.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))

    return Planted(Patch(weights=changed(site.weights, cut)), "emb")


def _bf16_for_fp16(site: Site) -> Planted:
    wanted = site.names("ffn.key.weight")

    def change(name: str, a: np.ndarray) -> np.ndarray:
        return bf16_to_f32(f32_to_bf16(a)) if name in wanted else a

    return Planted(Patch(weights=changed(site.weights, change)), site.names("ffn.k")[0])


def _fp16_decay(site: Site) -> Planted:
    wanted = site.names("att.time_decay")

    def change(name: str, a: np.ndarray) -> np.ndarray:
        return rounded(a, np.float16) if name in wanted else a

    return Planted(Patch(weights=changed(site.weights, change)), site.names("att.wkv")[0])


FAULTS = (
    stored(
        "words read from the high end",
        "The first of eight codes is taken for the last.",
        _MLC4,
        _codes(_lanes_reversed),
    ),
    stored("nibbles swapped", "Low and high half of every byte are exchanged.", _MLC4, _codes(_pairs_swapped)),
    stored(
        "codes one weight late",
        "The codes of a row begin one weight too late.",
        _MLC4,
        _codes(lambda c, p: np.roll(c, 1, axis=-1)),
    ),
    stored(
        "scale of the next group",
        "The index of the group is off by one.",
        _MLC4,
        _scales(lambda s: np.roll(s, -1, axis=-1)),
    ),
    stored(
        "scale of the row above",
        "The stride of the scales is off by a row.",
        _MLC4,
        _scales(lambda s: np.roll(s, 1, axis=0)),
    ),
    stored(
        "one scale for the row",
        "The first group's scale for all of a row.",
        _MLC4,
        _scales(lambda s: np.repeat(s[:, :1], s.shape[1], axis=1)),
    ),
    stored(
        "groups of 64",
        "Two groups share the first one's scale.",
        _MLC4,
        _scales(lambda s: np.repeat(s[:, ::2], 2, axis=1)[:, : s.shape[1]]),
    ),
    stored("scales transposed", "Scales of layout KN are read as NK.", _MLC4, _scales(_as_if_transposed)),
    stored("words transposed", "Words of layout KN are read as NK.", _MLC4, _words_transposed),
    stored("scale applied twice", "Weights are scaled when they are loaded and in the kernel.", _MLC4, _scales_twice),
    stored("zero point 8 for 7", "Code 8 is taken for zero.", _MLC4, _off_zero),
    stored("last group dropped", "The loop over groups ends one too early.", _MLC4, last_group_dropped),
    stored(
        "scales in bf16",
        "Scales are rounded to bfloat16.",
        _MLC8,
        _scales(lambda s: bf16_to_f32(f32_to_bf16(s.astype(np.float32)))),
    ),
    stored(
        "int8 codes as 2's complement",
        "Codes with an offset are read as signed bytes.",
        _MLC8,
        _codes(lambda c, p: (c.astype(np.int64) ^ 128).astype(np.uint32)),
    ),
    Fault(
        "bf16 by cutting bits off",
        "Weights are cut where they should be rounded.",
        _truncated,
        {"bf16": "bf16"},
        layered=False,
    ),
    Fault(
        "ffn.key in bf16",
        "One matrix is kept in fewer bits than the scheme says.",
        _bf16_for_fp16,
        {"fp32": "fp32", "fp16": "fp16"},
    ),
    Fault(
        "time_decay in fp16",
        "One vector is kept in fewer bits than the scheme says.",
        _fp16_decay,
        {"fp32": "fp32"},
    ),
)
