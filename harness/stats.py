"""Statistics derived from raw samples when a row is read.

The interval of a median is distribution-free: the median of a continuous distribution lies between the
k-th smallest and the k-th largest of n independent samples with probability
``1 - 2 P(Bin(n, 1/2) < k)``, whatever the distribution (David & Nagaraja, Order Statistics, 7.1). Steps of
one decode run are not independent of each other, so intervals are over repeats, percentiles over steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from harness.rows import Row

CONFIDENCE = Fraction(95, 100)
PERCENTILES = (50, 90, 99)
_NS = 1_000_000_000


@dataclass(frozen=True)
class Estimate:
    """A median, its 95 % interval (None under six samples) and how many samples it is of."""

    value: float
    interval: tuple[float, float] | None
    n: int


def median(samples: Sequence[float]) -> float:
    """Middle sample, or mean of the two middle ones. Raises ValueError if there is none or one is not finite."""
    return float(statistics.median(_ordered(samples)))


def coverage(n: int, k: int) -> Fraction:
    """Probability, exact, that the median lies between the k-th smallest and k-th largest of n samples."""
    return 1 - 2 * Fraction(sum(math.comb(n, i) for i in range(k)), 2**n)


@lru_cache(maxsize=256)
def interval_rank(n: int, confidence: Fraction = CONFIDENCE) -> int | None:
    """The largest k with ``coverage(n, k) >= confidence``; None if there is none (at 95 %: n < 6)."""
    allowed = (1 - confidence) / 2 * 2**n  # of the 2^n patterns of samples below and above the median
    k, term, tail = 0, 1, 1  # term = C(n, k), tail = sum of C(n, i) for i <= k
    while tail <= allowed:
        k += 1
        term = term * (n - k + 1) // k
        tail += term
    return k or None


def median_interval(samples: Sequence[float], confidence: Fraction = CONFIDENCE) -> tuple[float, float] | None:
    """Interval that covers the median at least that often, in the samples' unit; None if too few."""
    ordered = _ordered(samples)
    k = interval_rank(len(ordered), confidence)
    return None if k is None else (float(ordered[k - 1]), float(ordered[-k]))


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between the two nearest samples (Hyndman & Fan's type 7, numpy's default); 50 is the median."""
    if not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent}; 0 to 100 is needed")
    ordered = _ordered(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    between = ordered[low] + (ordered[high] - ordered[low]) * (position - low)
    return float(min(between, ordered[high]))


def step_percentiles(steps: Sequence[Sequence[float]]) -> dict[int, float]:
    """p50, p90 and p99 over the steps of all decode runs together, in the unit of ``steps``."""
    every = [step for run in steps for step in run]
    return {percent: percentile(every, percent) for percent in PERCENTILES}


def rate(tokens: int, ns: float) -> float:
    """Tokens per second. Raises ValueError if the clock did not move."""
    if not ns > 0:
        raise ValueError(f"{tokens} tokens in {ns} ns: the clock is too coarse; use a longer workload")
    return tokens * _NS / ns


def estimate(samples: Sequence[float]) -> Estimate:
    """Median and interval of samples in their own unit."""
    return Estimate(median(samples), median_interval(samples), len(samples))


def estimate_rate(tokens: int, ns: Sequence[float]) -> Estimate:
    """Tokens per second of samples in ns: the median of the samples' rates, and its interval."""
    return estimate([rate(tokens, sample) for sample in ns])


def estimate_seconds(ns: Sequence[float]) -> Estimate:
    """Seconds of samples in ns."""
    return estimate([sample / _NS for sample in ns])


def derived(row: Row) -> Row:
    """The row with ``value`` and ``interval`` computed from its raw samples.

    Rows without samples, and rows whose metric is not a time, come back as they are.
    """
    if not row.samples:
        return row
    if row.metric in ("prefill", "decode"):
        if row.workload is None:
            return row
        length = row.workload.prompt_tokens if row.metric == "prefill" else row.workload.decode_tokens
        found = estimate_rate(length * row.workload.batch, row.samples)
    elif row.metric in ("time_to_first_token", "first_call", "load"):
        found = estimate_seconds(row.samples)
    else:
        return row
    return replace(row, value=found.value, interval=found.interval)


def _ordered(samples: Sequence[float]) -> list[float]:
    if not len(samples):
        raise ValueError("no samples; a statistic needs at least one")
    for i, sample in enumerate(samples):
        if not math.isfinite(sample):
            raise ValueError(f"sample {i} is {sample}; every sample must be finite")
    return sorted(samples)
