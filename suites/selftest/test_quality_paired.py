"""Divergences compared position by position: what the intervals of differences hold, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harness.quality.intervals import Mean, edges, positive
from harness.quality.paired import (
    NO_WORSE,
    ROUNDING,
    UNDECIDED,
    WORSE,
    Against,
    compared,
    finding,
    paired,
    shortcoming,
    why,
)

POSITIONS, CONTEXT = 2048, 64
BLOCKS = edges(POSITIONS, CONTEXT)

some_kl = arrays(np.float64, 256, elements=st.floats(0, 40, allow_subnormal=False))


def drawn(rng: np.random.Generator, ratio: float, context: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Divergences of two cells, ``ratio`` of their true means less 1, and the true difference.

    Both follow the text: a level of each segment, or one that wanders where the state is carried through; each has
    noise of its own, and neighbours are alike in both.
    """
    segments = POSITIONS // CONTEXT
    level = rng.normal(0, 0.5, segments)
    if not context:
        for i in range(1, segments):
            level[i] = 0.5 * level[i - 1] + math.sqrt(0.75) * level[i]
    own = []
    for scale in (1.0, 1 / ratio):
        noise = rng.normal(0, 0.3, (segments, CONTEXT))
        for t in range(1, CONTEXT):
            noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
        own.append(0.01 * scale * np.exp(np.repeat(level, CONTEXT) + noise.ravel()))
    truth = 0.01 * (1 - 1 / ratio) * math.exp(0.125 + 0.045)
    return own[0], own[1], truth


def interval(found: Mean) -> tuple[float, float]:
    assert found.interval is not None
    return found.interval


@given(some_kl)
def test_against_itself_it_is_exactly_nothing(kl: np.ndarray) -> None:
    for context in (0, 16, 32):
        found = compared(kl, Against("a", "s", kl.copy()), edges(256, context))
        assert (found["difference"], found["interval"], found["finding"]) == (0, [0, 0], NO_WORSE)
        assert shortcoming(found, strict=True) is None


@given(some_kl, some_kl)
def test_the_other_way_round_it_is_the_opposite(one: np.ndarray, other: np.ndarray) -> None:
    blocks = edges(256, 16)
    there, back = paired(one, other, blocks), paired(other, one, blocks)
    assert there.value == pytest.approx(-back.value)
    assert interval(there) == pytest.approx((-interval(back)[1], -interval(back)[0]))
    assert there.value == pytest.approx(one.mean() - other.mean(), abs=1e-9)
    if finding(there) == WORSE:
        assert finding(back) == NO_WORSE
    if finding(there) == UNDECIDED:
        assert finding(back) == UNDECIDED
        assert why(there) == "its interval holds 0"
        low, high = interval(there)
        assert low <= ROUNDING < high
    else:
        assert why(there) is None


@given(some_kl, some_kl, some_kl)
def test_what_the_text_adds_to_both_is_gone(one: np.ndarray, other: np.ndarray, common: np.ndarray) -> None:
    blocks = edges(256, 16)
    with_it, without = paired(one + common, other + common, blocks), paired(one, other, blocks)
    assert with_it.value == pytest.approx(without.value, abs=1e-9)
    assert interval(with_it) == pytest.approx(interval(without), abs=1e-9)


@given(some_kl, st.floats(1e-6, 10))
def test_worse_everywhere_is_worse(kl: np.ndarray, more: float) -> None:
    assert finding(paired(kl + more, kl, edges(256, 16))) == WORSE
    assert finding(paired(kl, kl + more, edges(256, 16))) == NO_WORSE


def test_what_rounding_makes_is_no_difference() -> None:
    rng = np.random.default_rng(3)
    one, other = (np.abs(rng.normal(0, 1e-13, 256)) for _ in range(2))
    assert finding(paired(one + 1e-12, other, edges(256, 16))) == NO_WORSE


def test_without_an_interval_nothing_is_decided_but_what_is_the_same() -> None:
    blocks = edges(7 * 16, 16)
    kl = np.linspace(0, 1, 112)
    found = compared(2 * kl, Against("rwkv.cpp", "Q4_0", kl), blocks)
    assert (found["interval"], found["finding"]) == (None, UNDECIDED)
    assert found["difference"] == pytest.approx(0.5)
    assert shortcoming(found, strict=False) is None
    assert "too few blocks" in str(shortcoming(found, strict=True))
    assert compared(kl, Against("a", "s", kl), blocks)["finding"] == NO_WORSE


def test_a_cell_without_figures_decides_nothing() -> None:
    found = compared(np.ones(256), Against("rwkv.cpp", "Q4_0"), edges(256, 16))
    assert (found["difference"], found["interval"], found["finding"]) == (None, None, UNDECIDED)
    assert "rwkv.cpp Q4_0, which gave no figures" in str(shortcoming(found, strict=True))


@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.05])
@pytest.mark.parametrize("context", [CONTEXT, 0])
def test_intervals_cover_and_are_seldom_wrong(ratio: float, context: int) -> None:
    """Of 400: 95 % within three standard errors; ``worse`` at most as often as one end of an interval misses."""
    rng = np.random.default_rng(11)
    blocks = edges(POSITIONS, context)
    held, said = 0, []
    for _ in range(400):
        one, other, truth = drawn(rng, ratio, context)
        found = paired(one, other, blocks)
        held += interval(found)[0] <= truth <= interval(found)[1]
        said.append(finding(found))
    assert 0.91 <= held / 400 <= 0.985
    if ratio == 1.0:  # equal cells: each end misses one time in forty
        assert said.count(WORSE) <= 20
        assert said.count(NO_WORSE) <= 20
    elif ratio < 1:
        assert said.count(WORSE) == 0
    else:
        assert said.count(NO_WORSE) <= 2


def test_a_scheme_planted_a_tenth_worse_is_found_where_two_intervals_overlap() -> None:
    rng = np.random.default_rng(5)
    found, apart = 0, 0
    for _ in range(100):
        one, other, _ = drawn(rng, 1.1, CONTEXT)
        found += finding(paired(one, other, BLOCKS)) == WORSE
        apart += interval(positive(one, BLOCKS))[0] > interval(positive(other, BLOCKS))[1]
    assert found >= 95
    assert apart <= 5
