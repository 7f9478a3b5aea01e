"""Statistics against exact counts, the standard library and numpy."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import stats
from harness.rows import Row
from harness.samples import Workload
from harness.stats import LOOK_CONFIDENCE, LOOKS, interval_of_looks, interval_rank, median_interval

TIMES = st.lists(st.integers(1, 10**15), min_size=1, max_size=60)


class TestInterval:
    @pytest.mark.parametrize("n", range(1, 15))
    def test_coverage_is_that_of_every_pattern_counted(self, n: int) -> None:
        """Each sample is below the median or above it, all 2^n patterns alike likely."""
        below = [sum(pattern) for pattern in itertools.product((0, 1), repeat=n)]
        for k in range(1, n // 2 + 1):
            inside = sum(k <= count <= n - k for count in below)
            assert stats.coverage(n, k) == Fraction(inside, 2**n)

    def test_six_samples_are_the_fewest(self) -> None:
        assert [stats.interval_rank(n) for n in range(8)] == [None] * 6 + [1, 1]
        assert stats.coverage(5, 1) == Fraction(15, 16)
        assert stats.coverage(6, 1) == Fraction(31, 32)
        assert stats.interval_rank(6, Fraction(31, 32)) == 1  # exactly enough is enough

    # Table of the sign test at 5 %, two-sided: the largest r with 2 P(Bin(n, 1/2) <= r) <= 0.05 is rank - 1.
    @pytest.mark.parametrize(("n", "rank"), [(8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6), (30, 10), (50, 18)])
    def test_rank_as_in_published_tables(self, n: int, rank: int) -> None:
        assert stats.interval_rank(n) == rank

    @given(st.integers(1, 400), st.sampled_from([Fraction(1, 2), Fraction(9, 10), stats.CONFIDENCE, Fraction(99, 100)]))
    def test_the_narrowest_that_covers_enough(self, n: int, confidence: Fraction) -> None:
        rank = stats.interval_rank(n, confidence)
        if rank is None:
            assert stats.coverage(n, 1) < confidence
        else:
            assert stats.coverage(n, rank) >= confidence
            assert stats.coverage(n, rank + 1) < confidence

    @given(TIMES)
    def test_holds_the_median_and_is_made_of_samples(self, samples: list[int]) -> None:
        interval = stats.median_interval(samples)
        if len(samples) < 6:
            assert interval is None
            return
        assert interval is not None
        assert interval[0] <= stats.median(samples) <= interval[1]
        assert set(interval) <= set(map(float, samples))

    def test_exact(self) -> None:
        assert stats.median_interval([60, 10, 50, 20, 40, 30]) == (10, 60)
        assert stats.median_interval(list(range(1, 21))) == (6, 15)

    def test_covers_as_often_as_it_says(self) -> None:
        """A skewed distribution, 20,000 draws of 9 samples; the rate is within five standard errors."""
        rng = np.random.default_rng(0)
        draws = np.sort(rng.exponential(size=(20_000, 9)), axis=1)
        rank = stats.interval_rank(9)
        assert rank is not None
        covered = np.mean((draws[:, rank - 1] <= math.log(2)) & (math.log(2) <= draws[:, -rank]))
        expected = float(stats.coverage(9, rank))
        assert abs(covered - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


class TestPercentiles:
    @given(TIMES, st.integers(0, 100))
    def test_as_numpy(self, samples: list[int], percent: int) -> None:
        assert stats.percentile(samples, percent) == pytest.approx(float(np.percentile(samples, percent)), rel=1e-12)

    @given(TIMES)
    def test_the_50th_is_the_median(self, samples: list[int]) -> None:
        assert stats.percentile(samples, 50) == stats.median(samples) == statistics.median(samples)

    @given(TIMES)
    def test_ordered_and_inside(self, samples: list[int]) -> None:
        found = [stats.percentile(samples, percent) for percent in range(101)]
        assert found == sorted(found)
        assert (found[0], found[-1]) == (min(samples), max(samples))

    def test_exact(self) -> None:
        assert [stats.percentile(list(range(101)), p) for p in (50, 90, 99)] == [50, 90, 99]
        assert stats.percentile([10, 20], 90) == 19
        assert stats.percentile([5], 99) == 5

    def test_over_the_steps_of_all_runs(self) -> None:
        steps = [range(51), range(51, 101)]
        assert stats.step_percentiles(steps) == {50: 50, 90: 90, 99: 99}

    @pytest.mark.parametrize("percent", [-1, 101, math.nan])
    def test_no_such_percentile(self, percent: float) -> None:
        with pytest.raises(ValueError, match="0 to 100"):
            stats.percentile([1, 2], percent)


class TestRates:
    def test_tokens_per_second(self) -> None:
        assert stats.rate(256, 500_000_000) == 512

    @pytest.mark.parametrize("ns", [0, -1, math.nan])
    def test_a_clock_that_stood_still_is_no_speed(self, ns: float) -> None:
        with pytest.raises(ValueError, match="too coarse"):
            stats.rate(1, ns)

    def test_median_of_the_rates_not_rate_of_the_median(self) -> None:
        found = stats.estimate_rate(10, [1_000_000_000, 2_000_000_000])
        assert found == stats.Estimate(value=7.5, interval=None, n=2)

    @given(st.lists(st.integers(1, 10**12), min_size=6, max_size=40), st.integers(1, 4096))
    def test_interval_is_mapped(self, samples: list[int], tokens: int) -> None:
        times = stats.median_interval(samples)
        found = stats.estimate_rate(tokens, samples)
        assert times is not None
        assert found.interval == (stats.rate(tokens, times[1]), stats.rate(tokens, times[0]))
        assert found.interval[0] <= found.value <= found.interval[1]

    def test_seconds(self) -> None:
        assert stats.estimate_seconds([3_000_000_000, 1_000_000_000, 2_000_000_000]) == stats.Estimate(2.0, None, 3)


@pytest.mark.parametrize("function", [stats.median, stats.median_interval, stats.estimate, stats.estimate_seconds])
class TestBadSamples:
    def test_none(self, function: Any) -> None:
        with pytest.raises(ValueError, match="no samples"):
            function([])

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, function: Any, bad: float) -> None:
        with pytest.raises(ValueError, match=r"sample 2 is -?(nan|inf)"):
            function([1.0, 2.0, bad, *range(10)])


class TestDerivedRow:
    def row(self, metric: str, **more: Any) -> Row:
        names = {"hardware": "cpu", "backend": "b", "model": "tiny", "scheme": "fp32", "run": "r", "time": "t"}
        return Row(kind="measured", metric=metric, **{**names, "workload": Workload(100, 10, batch=2), **more})

    def test_speeds(self) -> None:
        samples = tuple(range(1_000_000_000, 7_000_000_000, 1_000_000_000))
        prefill = stats.derived(self.row("prefill", samples=samples))
        assert prefill.interval == (200 / 6, 200.0)
        assert prefill.value == pytest.approx(200 * (1 / 3 + 1 / 4) / 2)
        assert stats.derived(self.row("decode", samples=samples)).interval == (20 / 6, 20)

    @pytest.mark.parametrize("metric", ["load", "first_call", "time_to_first_token"])
    def test_times(self, metric: str) -> None:
        found = stats.derived(self.row(metric, samples=(1_500_000_000,), value=99.0))
        assert (found.value, found.interval, found.unit) == (1.5, None, "s")

    def test_others_come_back_as_they_are(self) -> None:
        for row in (
            self.row("prefill", value=3.0),
            self.row("perplexity", value=3.0, samples=(2.0, 4.0)),
            self.row("decode", value=3.0, samples=(1, 2), workload=None),
        ):
            assert stats.derived(row) is row


def test_all_looks_together_miss_the_median_in_at_most_one_of_twenty_runs() -> None:
    """The number of samples below the median, carried exactly from look to look, whatever the rule of stopping."""
    walk, taken, missed = np.array([1.0]), 0, 0.0
    for n in LOOKS:
        for _ in range(n - taken):
            walk = (np.append(walk, 0) + np.insert(walk, 0, 0)) / 2
        taken, k = n, interval_rank(n, LOOK_CONFIDENCE)
        assert k is not None
        beyond = (np.arange(n + 1) < k) | (np.arange(n + 1) > n - k)
        missed += float(walk[beyond].sum())
        walk[beyond] = 0
    assert missed <= 0.05
    assert missed > 0.04  # and no wider than it must be
    assert missed + walk.sum() == pytest.approx(1)


def test_the_interval_of_looks_is_that_of_the_last_look() -> None:
    samples = [float(i * 37 % 101) for i in range(30)]
    assert interval_of_looks(samples[:5]) is None
    assert interval_of_looks(samples[:11]) == median_interval(samples[:11])
    assert interval_of_looks(samples) == median_interval(samples[:27], LOOK_CONFIDENCE)
    wide, usual = interval_of_looks(samples), median_interval(samples[:27])
    assert wide is not None
    assert usual is not None
    assert wide[0] <= usual[0] < usual[1] <= wide[1]
