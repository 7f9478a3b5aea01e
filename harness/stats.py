"""Statistics derived from raw samples when a row is read.

Samples of one block were taken one after the other and share what the machine did then; blocks lie apart. So
a block counts once, by its median, and the interval is over blocks. Blocks that were taken under a
disturbance (:mod:`harness.disturbance`) stay in the row and are left out here.

The interval of a median is distribution-free: the median of a continuous distribution lies between the
k-th smallest and the k-th largest of n independent samples with probability
``1 - 2 P(Bin(n, 1/2) < k)``, whatever the distribution (David & Nagaraja, Order Statistics, 7.1). Steps of
one decode run are not independent of each other, so intervals are over repeats, percentiles over steps.

Where measuring went on until the interval was narrow (``sampling.precision`` of the row), it was looked at
again and again, and would have stopped by chance too early too often. Then every look uses the confidence
:data:`LOOK_CONFIDENCE`, for which all intervals of all looks cover the median together with at least 95 %:
how many samples lie below the median is a walk with steps of 1/2 whatever the distribution, so that is
computed exactly (``scripts/coverage_of_stopping.py``), not simulated.
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

#: Of one look among those at ``LOOKS`` samples.
LOOK_CONFIDENCE = Fraction(994, 1000)


def _looks(first: int, most: int) -> tuple[int, ...]:
    """Half as many again from look to look."""
    found = [first]
    while found[-1] * 3 // 2 <= most:
        found.append(found[-1] * 3 // 2)
    return tuple(found)


#: Numbers of samples at which an interval may end measuring.
LOOKS = _looks(12, 10_000)

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

    Rows without samples, and rows whose metric is not a time, come back as they are. A decode row with steps
    also gets ``percentiles``.
    """
    if not row.samples:
        return row
    times = block_medians(row)
    if row.metric in ("prefill", "decode"):
        if row.workload is None:
            return row
        length = row.workload.prompt_tokens if row.metric == "prefill" else row.workload.decode_tokens
        in_unit = [rate(length * row.workload.batch, ns) for ns in times]
    elif row.metric in ("time_to_first_token", "first_call", "load"):
        in_unit = [ns / _NS for ns in times]
    else:
        return row
    looked = bool((row.sampling or {}).get("precision"))
    interval = interval_of_looks(in_unit) if looked else median_interval(in_unit)
    return replace(row, value=median(in_unit), interval=interval, percentiles=_percentiles(row))


def block_medians(row: Row) -> list[float]:
    """The independent measurements of a row, in the unit of its samples: the median of each block that counts.

    A row without blocks, as older versions wrote them, took its samples one by one.
    """
    samples = row.samples or ()
    if not row.blocks:
        return [float(sample) for sample in samples]
    return [median(samples[first:last]) for first, last in _counted(row)]


def disturbed(row: Row) -> tuple[int, int]:
    """How many blocks were taken under a disturbance, and how many of all are left out for it."""
    blocks = row.blocks or ()
    return sum(bool(b.get("disturbed")) for b in blocks), sum(bool(b.get("left_out")) for b in blocks)


def interval_of_looks(samples: Sequence[float]) -> tuple[float, float] | None:
    """The interval at the last of :data:`LOOKS` that so many samples have passed.

    Where time was up before the first, nothing was looked at and the usual interval holds.
    """
    passed = [n for n in LOOKS if n <= len(samples)]
    return median_interval(samples[: passed[-1]], LOOK_CONFIDENCE) if passed else median_interval(samples)


def half_width(samples: Sequence[float], interval: tuple[float, float]) -> float:
    """The wider half of an interval of the median, as a fraction of the median."""
    middle = median(samples)
    return max(interval[1] - middle, middle - interval[0]) / middle


def _counted(row: Row) -> list[tuple[int, int]]:
    """First sample and end of each block that is not left out."""
    blocks = row.blocks or ()
    return [(b["start"], b["start"] + b["count"]) for b in blocks if b["count"] and not b.get("left_out")]


def _percentiles(row: Row) -> dict[str, float] | None:
    """Seconds per token, p50, p90 and p99 over the steps of what counts; only a loop over ``forward`` has steps."""
    if row.metric != "decode" or not row.steps:
        return None
    steps = row.steps if not row.blocks else [s for first, last in _counted(row) for s in row.steps[first:last]]
    return {f"p{percent}": value / _NS for percent, value in step_percentiles(steps).items()}


def _ordered(samples: Sequence[float]) -> list[float]:
    if not len(samples):
        raise ValueError("no samples; a statistic needs at least one")
    for i, sample in enumerate(samples):
        if not math.isfinite(sample):
            raise ValueError(f"sample {i} is {sample}; every sample must be finite")
    return sorted(samples)
