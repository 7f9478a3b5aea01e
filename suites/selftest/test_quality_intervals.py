"""Intervals of quality: tables, blocks of dependent positions, and what they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.quality.intervals import (
    Mean,
    edges,
    exponential,
    fraction,
    mean,
    not_negative,
    positive,
    ratio,
    student,
    wilson,
)


def interval(found: Mean) -> tuple[float, float]:
    """The interval of a mean that has one."""
    assert found.interval is not None
    return found.interval


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (7, 2.364624), (30, 2.042272), (31, 2.039513), (120, 1.979930)],
)
def test_student_is_the_table(degrees: int, expected: float) -> None:
    assert student(degrees) == pytest.approx(expected, abs=1e-6)


def test_wilson_is_the_textbook() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = wilson(1.0, 2000)
    assert 0.998 < low < 0.9982
    assert high == 1


def test_blocks_are_segments_by_their_place_or_runs() -> None:
    """Of segments that are far apart, every one to 32 is a block; of near ones as many as are far enough apart."""
    assert edges(384, 128).tolist() == [0, 128, 256, 384]
    assert len(edges(64 * 128, 128)) - 1 == 32
    assert [len(edges(4096, 128, spacing)) - 1 for spacing in (38, 16, 8, 4, 1)] == [32, 32, 16, 8, 8]
    assert set(np.diff(edges(4096, 128, 4))) == {512}
    assert np.diff(edges(1000, 0)).tolist() == [125] * 8
    with pytest.raises(ValueError, match="compared with each other"):
        edges(128, 128)


def test_a_mean_is_the_mean_and_its_interval_that_of_the_blocks() -> None:
    values = np.arange(64.0)
    found = mean(values, edges(64, 8))
    blocks = 3.5 + 8 * np.arange(8)
    half = 2.36462425 * blocks.std(ddof=1) / math.sqrt(8)
    assert found.value == 31.5
    assert found.blocks == tuple(blocks)
    assert found.interval == pytest.approx((31.5 - half, 31.5 + half))
    assert exponential(found).value == pytest.approx(math.exp(31.5))


def test_fewer_than_eight_blocks_have_no_interval() -> None:
    blocks = edges(7 * 16, 16)
    values = np.arange(112.0)
    for found in (mean(values, blocks), positive(values, blocks), fraction(values / 112, blocks)):
        assert (found.interval, len(found.blocks)) == (None, 7)
    assert exponential(mean(values, blocks)).interval is None


def test_no_interval_leaves_what_is_possible() -> None:
    """A surprise that is mostly zero: perplexity from 1, bits from 0."""
    values = np.zeros(128)
    values[3] = 100.0
    found = positive(values, edges(128, 16))
    assert interval(found)[0] == 0
    assert interval(exponential(found))[0] == 1
    assert interval(not_negative(ratio(values, np.ones(128), edges(128, 16))))[0] == 0


def test_beyond_float64_is_infinite() -> None:
    found = exponential(mean(np.full(128, 1e38), edges(128, 16)))
    assert (found.value, found.interval) == (math.inf, None)
    low, high = np.full(64, 0.0), np.full(64, 1400.0)
    assert exponential(mean(np.concatenate([low, high]), edges(128, 16))).interval is None


def test_a_ratio_weighs_its_positions() -> None:
    values, weights = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 1.0, 2.0, 4.0])
    found = ratio(np.tile(values, 4), np.tile(weights, 4), np.arange(0, 17, 2))
    assert found.value == 1.5
    assert found.blocks == (1.5,) * 8
    assert found.interval == pytest.approx((1.5, 1.5))


def test_what_never_varied_is_not_certain() -> None:
    found = fraction(np.ones(2048), edges(2048, 64))
    assert found.value == 1
    assert interval(found)[0] < 0.9985
    assert positive(np.zeros(2048), edges(2048, 64)).interval == (0, 0)


@pytest.mark.parametrize("kind", ["mean", "fraction"])
def test_intervals_cover_dependent_positions(kind: str) -> None:
    """Segments with a level of their own and alike neighbours: about 95 % of intervals hold the true mean."""
    rng = np.random.default_rng(7)
    hits, trials = 0, 400
    for _ in range(trials):
        level = np.repeat(rng.normal(0, 0.5, 32), 64)
        noise = rng.normal(size=(32, 64))
        for t in range(1, 64):
            noise[:, t] += 0.6 * noise[:, t - 1]
        values = np.exp(0.5 * (level + noise.ravel()))
        if kind == "fraction":
            values, truth = (values > 1).astype(float), 0.5
            found = fraction(values, edges(2048, 64))
        else:
            found = mean(values, edges(2048, 64))
            variances = [sum(0.36**j for j in range(t + 1)) for t in range(64)]
            truth = float(np.mean([math.exp(0.125 * (0.25 + v)) for v in variances]))
        low, high = interval(found)
        hits += low <= truth <= high
    assert 0.91 <= hits / trials <= 0.985
