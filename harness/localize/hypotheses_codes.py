"""Hypotheses about a stored matrix: decoded wrongly, rounded, rearranged.

All of them work on the values that a right decoder gives: see :mod:`harness.localize.stored_matrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from harness.localize.part import Unknown
from harness.localize.stored_matrix import Stored
from reference.numerics import ROUND


class Change(NamedTuple):
    """What is wrong with a matrix; raises :class:`Unknown` where it cannot be."""

    name: str
    sentence: str
    make: Callable[[Stored], np.ndarray]


def _permuted(order: Callable[[int], np.ndarray]) -> Callable[[Stored], np.ndarray]:
    return lambda s: s.flat(s.groups[..., order(s.group)])


def _in_words(order: list[int]) -> Callable[[int], np.ndarray]:
    def indices(group: int) -> np.ndarray:
        if group % len(order):
            raise Unknown("words")
        starts = np.arange(group) // len(order) * len(order)
        return np.asarray(starts + np.tile(order, group // len(order)))

    return indices


def _halves_to_pairs(group: int) -> np.ndarray:
    """A decoder that takes neighbours from one byte where the format has i beside i + half."""
    return np.arange(group).reshape(-1, 2).T.reshape(-1)


def _pairs_to_halves(group: int) -> np.ndarray:
    return np.arange(group).reshape(2, -1).T.reshape(-1)


def _rescaled(steps: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stored], np.ndarray]:
    """Codes times other steps; ``steps`` takes and gives ``(N, G, 1)``."""
    return lambda s: s.flat(s.groups / s.step * steps(s.step))


def _turned(step: np.ndarray) -> np.ndarray:
    n, g, _ = step.shape
    return step.reshape(-1).reshape(g, n).T[..., None]


def _turned_back(step: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(step[..., 0].T).reshape(step.shape)


def _without_groups(which: slice) -> Callable[[Stored], np.ndarray]:
    def make(s: Stored) -> np.ndarray:
        groups = s.groups.copy()
        groups[:, which] = 0
        return s.flat(groups)

    return make


def _signed(zero: int, n_codes: int = 16, kept: int = 0) -> Callable[[Stored], np.ndarray]:
    """Codes with an offset taken for two's complement; ``kept``: the offset is subtracted all the same."""

    def make(s: Stored) -> np.ndarray:
        codes = np.round(s.groups / s.step) + zero
        return s.flat(np.where(codes >= n_codes // 2, codes - n_codes, codes) * s.step - kept * s.step)

    return make


def _unsigned(s: Stored) -> np.ndarray:
    return s.flat(s.groups + np.where(s.groups / s.step < 0, 256 * s.step, 0))


def _codes_along(by: int) -> Callable[[Stored], np.ndarray]:
    """Codes begin elsewhere in the row, steps do not."""

    def make(s: Stored) -> np.ndarray:
        codes = (s.groups / s.step).reshape(len(s.groups), -1)
        return s.flat(np.roll(codes, by, axis=1).reshape(s.groups.shape) * s.step)

    return make


def _turned_words(per_word: int) -> Callable[[Stored], np.ndarray]:
    """Words of the transposed layout read by rows; ``per_word`` codes in each."""

    def make(s: Stored) -> np.ndarray:
        codes = (s.groups / s.step).reshape(len(s.groups), -1)
        if codes.shape[1] % per_word:
            raise Unknown("words")
        words = codes.reshape(len(codes), -1, per_word)
        turned = words.transpose(1, 0, 2).reshape(words.shape)
        return s.flat(turned.reshape(s.groups.shape) * s.step)

    return make


def _one_zero(zero: int) -> Callable[[Stored], np.ndarray]:
    return lambda s: s.flat(s.groups - s.low - zero * s.step)


def _zeros_exchanged(s: Stored) -> np.ndarray:
    zeros = np.round(-s.low / s.step)
    n = zeros.shape[1]
    partner = np.minimum(np.arange(n) ^ 1, n - 1)
    return s.flat(s.groups + (zeros - zeros[:, partner]) * s.step)


def _fifth_bit(order: Callable[[int], np.ndarray] | None, levels: int) -> Callable[[Stored], np.ndarray]:
    """Codes of five bits with the highest in another order, or left out; ``levels`` 0: counted from the minimum."""

    def make(s: Stored) -> np.ndarray:
        codes = np.round(s.groups / s.step) + levels if levels else np.round((s.groups - s.low) / s.step)
        if codes.max() > 31 or codes.min() < 0 or not (codes >= 16).any():
            raise Unknown("codes of five bits")
        high = (codes >= 16).astype(np.float64)
        wanted = 0 * high if order is None else high[..., order(s.group)]
        return s.flat(s.groups + 16 * (wanted - high) * s.step)

    return make


def _blocks_exchanged(size: int) -> Callable[[Stored], np.ndarray]:
    def make(s: Stored) -> np.ndarray:
        k = s.values.shape[1]
        if k < 2 * size or k % size:
            raise Unknown("blocks")
        order = np.arange(k).reshape(-1, size)
        order[[0, 1]] = order[[1, 0]]
        return s.values[:, order.reshape(-1)]

    return make


def _column(at: int, factor: float) -> Callable[[Stored], np.ndarray]:
    def make(s: Stored) -> np.ndarray:
        changed = s.values.copy()
        changed[:, at] *= factor
        return changed

    return make


def _cut_off(s: Stored) -> np.ndarray:
    """bfloat16 by cutting bits off."""
    return (s.original.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _in_int8(axis: int | None) -> Callable[[Stored], np.ndarray]:
    def make(s: Stored) -> np.ndarray:
        scale = np.abs(s.values).max(axis=axis, keepdims=True) / np.float32(127)
        return np.asarray(np.round(s.values / np.where(scale == 0, 1, scale)) * scale)

    return make


def _half_as_long(s: Stored) -> np.ndarray:
    """The scale's index advances twice as fast, and runs into the next row's."""
    n, g, _ = s.step.shape
    rows, columns = np.indices((n, g * s.group))
    taken = s.step.reshape(-1)[(rows * g + columns // max(1, s.group // 2)) % (n * g)]
    return s.flat(s.groups / s.step * taken.reshape(s.groups.shape))


def _shifted(by: float) -> Callable[[Stored], np.ndarray]:
    return lambda s: s.flat(s.groups + by * s.step)


def _reread(s: Stored) -> np.ndarray:
    """The buffer read in the other order: (K, N) by rows, then turned; of a square matrix, its transpose."""
    n, k = s.values.shape
    if n == k:
        raise Unknown("transposed, which is a hypothesis of its own")
    return np.ascontiguousarray(s.values).reshape(k, n).T


def _rounded(kind: str) -> Callable[[Stored], np.ndarray]:
    return lambda s: ROUND[kind](s.values.astype(np.float32))


def _of_next(s: Stored) -> np.ndarray:
    return s.flat(np.roll(s.groups / s.step, -1, axis=1) * s.step)


def _interleaved(s: Stored) -> np.ndarray:
    k = s.values.shape[1]
    return s.values[:, np.concatenate([np.arange(0, k, 2), np.arange(1, k, 2)])]


def _rolled(by: int, axis: int = 1) -> Callable[[Stored], np.ndarray]:
    return lambda s: np.roll(s.values, by, axis=axis)


def _half_turned(s: Stored) -> np.ndarray:
    return np.roll(s.values, s.values.shape[1] // 2, axis=1)


_WHOLE: tuple[Change, ...] = (
    Change("bf16 weights", "its weights are rounded to bf16", _rounded("bf16")),
    Change("fp16 weights", "its weights are rounded to fp16", _rounded("fp16")),
    Change("not quantized", "its weights are the checkpoint's, not those of the scheme", lambda s: s.original),
    Change("other order", "its buffer is read in the other order (rows for columns)", _reread),
    Change("columns by one", "its columns are off by one", _rolled(1)),
    Change("columns by one back", "its columns are off by one, backwards", _rolled(-1)),
    Change("rows by one", "its rows are off by one", _rolled(1, 0)),
    Change("rows by one back", "its rows are off by one, backwards", _rolled(-1, 0)),
    Change("columns reversed", "its columns are in reverse order", lambda s: s.values[:, ::-1]),
    Change("rows reversed", "its rows are in reverse order", lambda s: s.values[::-1]),
    Change("column halves", "the halves of its columns are exchanged", _half_turned),
    Change("columns interleaved", "its columns are interleaved", _interleaved),
    Change("bf16 cut off", "its weights are cut off to bf16, not rounded", _cut_off),
    Change("int8 by rows", "its weights are rounded to int8, a scale for a row", _in_int8(1)),
    Change("int8 by columns", "its weights are rounded to int8, a scale for a column", _in_int8(0)),
    Change("int8", "its weights are rounded to int8, one scale for all", _in_int8(None)),
    *(
        Change(f"first blocks of {n}", f"its first two blocks of {n} columns are exchanged", _blocks_exchanged(n))
        for n in (8, 16, 32, 64)
    ),
    Change("first column", "its first column is dropped", _column(0, 0)),
    Change("first column twice", "its first column counts twice", _column(0, 2)),
    Change("last column twice", "its last column counts twice", _column(-1, 2)),
    Change("last column", "its last column is dropped", _column(-1, 0)),
)

_NIBBLES = "nibbles are in the wrong order: "

_ORDER: tuple[Change, ...] = (
    Change("nibbles", _NIBBLES + "the two of a byte are exchanged", _permuted(_in_words([1, 0]))),
    Change(
        "word reversed", _NIBBLES + "a word of eight is read from its high end", _permuted(_in_words([*range(8)][::-1]))
    ),
    Change("half word reversed", _NIBBLES + "four at a time are reversed", _permuted(_in_words([3, 2, 1, 0]))),
    Change(
        "bytes of a word", "the bytes of a word are in the wrong order", _permuted(_in_words([6, 7, 4, 5, 2, 3, 0, 1]))
    ),
    Change(
        "halves exchanged",
        _NIBBLES + "low ones are the second half of a group",
        _permuted(lambda g: np.roll(np.arange(g), g // 2)),
    ),
    Change("pairs", _NIBBLES + "the two of a byte are taken for neighbours", _permuted(_halves_to_pairs)),
    Change("halves", _NIBBLES + "the two of a byte are taken for half a group apart", _permuted(_pairs_to_halves)),
    Change("group reversed", "the codes of a group are in reverse order", _permuted(lambda g: np.arange(g)[::-1])),
    Change("codes by one", "codes are off by one within a group", _permuted(lambda g: np.roll(np.arange(g), 1))),
    Change("codes late", "the codes of a row begin one weight too late", _codes_along(-1)),
    Change("codes early", "the codes of a row begin one weight too early", _codes_along(1)),
    Change("words of 8 turned", "words of the transposed layout are read by rows", _turned_words(8)),
    Change("words of 4 turned", "words of the transposed layout are read by rows", _turned_words(4)),
    Change("words of 10 turned", "words of the transposed layout are read by rows", _turned_words(10)),
    Change("codes of the group after", "groups are off by one: codes are those of the next", _of_next),
)

_GROUP = "groups are off by one: "

_SCALES: tuple[Change, ...] = (
    Change("scale before", _GROUP + "scales are those of the group before", _rescaled(lambda s: np.roll(s, 1, axis=1))),
    Change("scale after", _GROUP + "scales are those of the group after", _rescaled(lambda s: np.roll(s, -1, axis=1))),
    Change("row before", "scales are those of the row before", _rescaled(lambda s: np.roll(s, 1, axis=0))),
    Change("row after", "scales are those of the row after", _rescaled(lambda s: np.roll(s, -1, axis=0))),
    Change("scales transposed", "scales are transposed", _rescaled(_turned)),
    Change("scales turned back", "scales of the transposed layout are read by rows", _rescaled(_turned_back)),
    Change(
        "first scale", "every group has its row's first scale", _rescaled(lambda s: np.broadcast_to(s[:, :1], s.shape))
    ),
    Change(
        "one scale",
        "every group has the first scale of the matrix",
        _rescaled(lambda s: np.broadcast_to(s[:1, :1], s.shape)),
    ),
    Change(
        "first row's scales",
        "every row has the scales of the first",
        _rescaled(lambda s: np.broadcast_to(s[:1], s.shape)),
    ),
    Change(
        "group too long", "one scale is used for two groups", _rescaled(lambda s: s[:, np.arange(s.shape[1]) // 2 * 2])
    ),
    Change("group too short", "scales advance after half a group", _half_as_long),
    Change("scale missing", "scales are not applied", _rescaled(np.ones_like)),
    Change("scale squared", "scales are applied twice", _rescaled(np.square)),
    Change("scale inverted", "codes are divided by their scale", _rescaled(np.reciprocal)),
    Change("fp16 scales", "scales are rounded to fp16", _rescaled(lambda s: ROUND["fp16"](s.astype(np.float32)))),
    Change("bf16 scales", "scales are rounded to bf16", _rescaled(lambda s: ROUND["bf16"](s.astype(np.float32)))),
)

_FIFTH = "the word of the fifth bits is read the wrong way round, "


def _bytes_back(group: int) -> np.ndarray:
    return np.arange(group).reshape(-1, 8)[::-1].reshape(-1)


def _bits_back(group: int) -> np.ndarray:
    return np.arange(group)[::-1]


_SIGNED = "codes are read as two's complement"

_CODES: tuple[Change, ...] = (
    Change("zero point high", "the zero point is too high by one (8 for 7)", _shifted(-1)),
    Change("zero point low", "the zero point is too low by one (7 for 8)", _shifted(1)),
    Change("zero point half low", "the zero point is too low by a half", _shifted(0.5)),
    Change("zero point half high", "the zero point is too high by a half", _shifted(-0.5)),
    Change("no zero point 3", "the zero point (3) is not subtracted", _shifted(3)),
    Change("no zero point 7", "the zero point (7) is not subtracted", _shifted(7)),
    Change("no zero point 8", "the zero point (8) is not subtracted", _shifted(8)),
    Change("no zero point 16", "the zero point (16) is not subtracted", _shifted(16)),
    Change("no zero point 127", "the zero point (127) is not subtracted", _shifted(127)),
    Change("no zero point 128", "the zero point (128) is not subtracted", _shifted(128)),
    Change("no minimum", "the minimum of a group is not added", lambda s: s.flat(s.groups - s.low)),
    Change("minimum subtracted", "the minimum of a group is subtracted", lambda s: s.flat(s.groups - 2 * s.low)),
    Change("weights negated", "its weights have the wrong sign", lambda s: -s.values),
    Change("signed nibbles 7", "nibbles are read with a sign", _signed(7)),
    Change("signed nibbles 8", "nibbles are read with a sign", _signed(8)),
    Change("signed bytes 127", _SIGNED, _signed(127, 256)),
    Change("signed bytes 128", _SIGNED, _signed(128, 256)),
    *(
        Change(f"signed codes less {zero}", f"{_SIGNED}, and {zero} subtracted", _signed(zero, n, zero))
        for zero, n in ((7, 16), (8, 16), (127, 256), (128, 256))
    ),
    Change("unsigned bytes", "signed bytes are read as unsigned", _unsigned),
    Change("zero points ignored 8", "every zero point is taken for 8", _one_zero(8)),
    Change("zero points ignored 128", "every zero point is taken for 128", _one_zero(128)),
    Change("zero points exchanged", "the zero points of neighbouring groups are exchanged", _zeros_exchanged),
    Change("fifth bit", "the fifth bit of the codes is dropped", _fifth_bit(None, 16)),
    Change("fifth bit, minimum", "the fifth bit of the codes is dropped", _fifth_bit(None, 0)),
    Change("fifth bits by bytes", _FIFTH + "by bytes", _fifth_bit(_bytes_back, 16)),
    Change("fifth bits by bytes, minimum", _FIFTH + "by bytes", _fifth_bit(_bytes_back, 0)),
    Change("fifth bits by bits", _FIFTH + "by bits", _fifth_bit(_bits_back, 16)),
    Change("fifth bits by bits, minimum", _FIFTH + "by bits", _fifth_bit(_bits_back, 0)),
    Change("last group", "the last group of each row is dropped", _without_groups(slice(-1, None))),
    Change("first group", "the first group of each row is dropped", _without_groups(slice(0, 1))),
    Change("odd groups", "every second group is dropped", _without_groups(slice(1, None, 2))),
)

CHANGES: tuple[Change, ...] = (*_WHOLE, *_ORDER, *_SCALES, *_CODES)
