"""The test behind a verdict: exact by brute force, invariant where it must be, and its answers on planted data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.verdict import exact, spacing
from reports.verdict.decision import FASTER, NO_SLOWER, SLOWER, UNDECIDED, Rules, holm, judge, prepared
from reports.verdict.permutation import Arms, at_least, at_most, estimate, faster, slower
from reports.verdict.power import SPARE, detectable, needed, noise

TIMES = st.floats(-3, 3, allow_nan=False)


def arms(base: list[float], head: list[float], paired: bool = False) -> Arms:
    return Arms(np.array(base), np.array(head), paired)


def normal(n: int, spread: float, slowdown: float = 0.0, seed: int = 0, paired: bool = False) -> Arms:
    rng = np.random.default_rng(seed)
    return Arms(rng.normal(0, spread, n), rng.normal(-math.log1p(-slowdown), spread, n), paired)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 4), (5, 3), (3, 6)])
def test_tail_is_what_enumeration_gives(n: int, m: int) -> None:
    values = exact.scores(n, m).tolist()
    sums = [sum(chosen) for chosen in itertools.combinations(values, n)]
    found = exact.tail(n, m)
    assert len(found) == sum(values) + 1 or len(found) == max(sums) + 1
    expected = [sum(s >= at for s in sums) / len(sums) for at in range(len(found))]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pair_tail_is_what_enumeration_gives(n: int) -> None:
    values = exact.pair_scores(n).tolist()
    sums = [sum(v for v, up in zip(values, signs, strict=True) if up) for signs in itertools.product((0, 1), repeat=n)]
    expected = [sum(s >= at for s in sums) / len(sums) for at in range(sum(values) + 1)]
    np.testing.assert_allclose(exact.pair_tail(n), expected, rtol=1e-12, atol=1e-15)


@given(st.lists(TIMES, min_size=2, max_size=4), st.lists(TIMES, min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_p_of_two_arms_is_the_permutation_p(base: list[float], head: list[float]) -> None:
    """The oracle permutes the blocks themselves and ranks each time anew."""
    pooled = [*head, *base]
    scores = exact.scores(len(base), len(head))
    # Of a tie the block that stands first has the lower rank; head stands first.
    ranks = np.argsort(np.argsort(pooled, kind="stable"), kind="stable")
    seen = scores[ranks[: len(head)]].sum()
    every = [scores[list(chosen)].sum() for chosen in itertools.combinations(range(len(pooled)), len(head))]
    expected = np.mean([s >= seen for s in every])
    assert float(slower(arms(base, head), 0.0)) == pytest.approx(float(expected))


def test_smallest_p_and_fewest_blocks() -> None:
    assert exact.least_p(8, 8) == pytest.approx(1 / math.comb(16, 8))
    assert exact.least_p(9, 5) == pytest.approx(1 / math.comb(14, 5))
    assert exact.fewest(1 / math.comb(16, 8)) == 8
    assert exact.fewest(1.25e-4) == 8
    assert exact.fewest(1.25e-4, paired=True) == 13
    assert exact.least_pair_p(13) == 2**-13


@given(st.lists(TIMES, min_size=3, max_size=12), st.lists(TIMES, min_size=3, max_size=12), st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_p_falls_with_a_slower_head_and_bounds_invert_it(base: list[float], head: list[float], by: float) -> None:
    found = arms(base, head)
    assert slower(found, by) <= slower(found, by + 0.5)
    low = float(at_least(found, 0.05))
    if math.isfinite(low):
        assert slower(found, low - 1e-3) <= 0.05
        assert slower(found, low + 1e-3 + 1e-5) > 0.05
    assert at_least(found, 0.2) <= at_most(found, 0.2) + 1e-6


@given(st.lists(TIMES, min_size=4, max_size=10), st.floats(-2, 2))
@settings(max_examples=50, deadline=None)
def test_swapping_the_sides_swaps_the_answers(differences: list[float], by: float) -> None:
    pairs = arms([0.0] * len(differences), differences, paired=True)
    assert faster(pairs, by) == slower(pairs.swapped(), -by)
    assert float(estimate(pairs)) == pytest.approx(-float(estimate(pairs.swapped())), abs=1e-5)


def test_a_coarse_clock_finds_nothing() -> None:
    same = arms([1.0] * 20, [1.0] * 20)
    assert slower(same, 0.0) == 1.0
    assert slower(arms([1.0] * 20, [1.0] * 20, paired=True), 0.0) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_its_definition(p: list[float]) -> None:
    """Step down: reject while the k-th smallest of m is at most alpha / (m - k + 1)."""
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected = 0
        for k, value in enumerate(sorted(p)):
            if value * (len(p) - k) > alpha:
                break
            rejected += 1
        assert sum(value <= alpha for value in adjusted) == rejected


def test_the_answers() -> None:
    cells = [normal(40, 0.01, slow, seed) for seed, slow in enumerate((0.06, -0.06, 0.0, 0.03))]
    found = judge(cells, Rules())
    assert [it.decision for it in found[:3]] == [SLOWER, FASTER, NO_SLOWER]
    assert found[0].ratio == pytest.approx(0.94, abs=0.01)
    low, high = found[0].interval or (0.0, 0.0)
    assert low < found[0].ratio < high < 0.99
    assert all(it.detectable is not None and 0.01 < it.detectable < 0.04 for it in found)


def test_a_loss_within_the_margin_is_no_alarm() -> None:
    """The test is against the margin, not against no difference."""
    cells = [normal(60, 0.001, 0.008, seed) for seed in range(2)]
    assert {it.decision for it in judge(cells, Rules(margin=0.01))} == {NO_SLOWER}
    assert {it.decision for it in judge(cells, Rules(margin=0.005))} == {SLOWER}


@pytest.mark.parametrize("paired", [False, True])
def test_too_few_blocks_say_how_many_more(paired: bool) -> None:
    n = exact.fewest(Rules().of_one(1), paired) - 1
    (found,) = judge([normal(n, 0.001, 0.2, paired=paired)], Rules())
    assert found.decision == UNDECIDED
    assert found.needed is not None
    assert found.needed >= n + 1 + SPARE
    assert f"{found.needed - n} more {'pairs' if paired else 'runs of each side'}" in found.why


@pytest.mark.parametrize("n", [0, 1, 2])
def test_hardly_any_block(n: int) -> None:
    (found,) = judge([normal(n, 0.01)], Rules())
    assert found.decision == UNDECIDED
    assert found.interval is None
    assert found.detectable is None


def test_what_is_asked_for_is_enough_and_half_of_it_is_not() -> None:
    """Not a second reading of the same formula: fresh noise, the whole verdict."""
    rules = Rules(looks=1)
    asked = [needed(noise(normal(60, 0.03, seed=seed)), False, rules.gap, rules.of_one(10)) for seed in range(6)]

    def seen(n: int | None) -> float:
        rng = np.random.default_rng(9)
        assert n is not None
        slowed = Arms(rng.normal(0, 0.03, (400, n)), rng.normal(-math.log(0.95), 0.03, (400, n)))
        return float(np.mean(slower(slowed, -math.log(0.99)) <= rules.of_one(10)))

    assert np.mean([seen(n) for n in asked]) >= 0.95
    assert np.mean([seen((n or 0) // 2) for n in asked]) < 0.9


def test_more_blocks_show_less() -> None:
    alpha = Rules().of_one(40)
    found = [detectable(noise(normal(n, 0.02, seed=1)), False, (n, n), alpha) for n in (10, 40, 160)]
    assert found[0] > 1.5 * found[1] > 2 * found[2]


def test_noise_that_cannot_be_paid_for_is_said() -> None:
    (found,) = judge([normal(30, 3.0)], Rules())
    assert found.needed is None
    assert "too noisy" in found.why


def test_neighbours_alike_are_merged_and_pairs_are_not() -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.01, (2, 128)), axis=1)
    (merged,), factor = prepared([Arms(walk[0], walk[1])])
    assert factor > 1
    assert merged.sizes[0] == 128 // factor
    (kept,), factor = prepared([Arms(walk[0], walk[1], True)])
    assert (factor, kept.sizes) == (1, (128, 128))
    (kept,), factor = prepared([normal(128, 0.01)])
    assert (factor, kept.sizes) == (1, (128, 128))


def test_more_blocks_than_can_be_counted_are_merged() -> None:
    (found,), _ = prepared([Arms(*np.random.default_rng(1).normal(0, 0.1, (2, 1000)))])
    assert found.sizes == (250, 250)


def test_two_readings_share_the_error_rate() -> None:
    assert Rules(looks=2).of_one(40) == pytest.approx(0.01 / 2 / 40)
    assert Rules(looks=2).of_one(40) <= 2.5e-4


def test_runs_without_a_pause_are_one_sitting() -> None:
    """By the end of the one before, whatever the order in the file; what overlaps is one."""
    hour = 3600.0
    spans = [
        *((hour, hour + 10), (0.0, 5.0), (hour + 309, hour + 310)),
        *((hour + 610, hour + 611), (2.0, 900.0), (1190.0, 1191.0)),
    ]
    assert spacing.sittings(spans) == [[1, 4, 5], [0, 2], [3]]
    values = np.array([[4.0, 1.0, 6.0, 9.0, 2.0, 3.0]])
    np.testing.assert_array_equal(spacing.apart(values, spans), [[2.0, 5.0, 9.0]])
    assert spacing.sittings([]) == []


def test_times_of_rows() -> None:
    assert spacing.seconds("2026-01-02T03:04:05Z") == spacing.seconds("2026-01-02T03:04:05") == 1767323045
    assert spacing.seconds("2026-01-02T03:04:05+01:00") == 1767323045 - 3600
