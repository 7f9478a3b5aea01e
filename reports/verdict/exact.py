"""Exact null distributions of rank statistics with whole-number scores, and what p-values they can reach.

Two arms: the sum of the scores of those n of n + m ranks that fell to one arm, every choice equally likely.
Pairs: the sum of the scores of the positive differences, every sign a fair coin. Both are counted, not sampled
(Pagano & Tritchler, JASA 78 (1983), 435): exact but for the rounding of float64 sums of positive terms.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

#: More blocks than this per arm are first merged with their neighbours: the counts stay within float64.
MOST_BLOCKS = 256

#: Scores are whole numbers from 0 to so many; fewer where the counting would take long.
MOST_LEVELS, LEAST_LEVELS = 63, 24
_STEPS = 3e8

#: Normal scores below and above these rise with ``SLOPE`` only.
CUT, SLOPE = (-1.5, 0.8), 0.1

#: Blocks of both arms together up to which counting takes no time worth saving.
_QUICK = 100


@lru_cache(maxsize=64)
def scores(n: int, m: int) -> np.ndarray:
    """Score of each rank of two arms, ``(n + m,)`` int64, ascending with time, in whole numbers.

    Normal scores, nearly flat below and above :data:`CUT`: what disturbs a machine makes blocks slower, seldom faster,
    so how slow a slow block is says little. On recorded blocks this sees more than normal scores, ranks or means do.
    """
    total = n + m
    least = min(n, m)
    levels = int(min(MOST_LEVELS, max(LEAST_LEVELS, _STEPS / (total * least * least + 1))))
    u = np.arange(1, total + 1) / (total + 1)
    return _whole(_cut(np.array([NormalDist().inv_cdf(x) for x in u])), levels)


@lru_cache(maxsize=64)
def pair_scores(n: int) -> np.ndarray:
    """Score of each rank of ``|difference|``, ``(n,)`` int64: half-normal quantiles, nearly flat above the cut."""
    u = (1 + np.arange(1, n + 1) / (n + 1)) / 2
    return 1 + _whole(_cut(np.array([NormalDist().inv_cdf(x) for x in u])), MOST_LEVELS)


@lru_cache(maxsize=64)
def tail(n: int, m: int) -> np.ndarray:
    """``P(S >= s)`` for s = 0, 1, ...: S the sum of the scores of an arm of ``n`` beside one of ``m``."""
    values = scores(n, m)
    flip = n > m  # the smaller arm is counted; the larger one has the rest
    size = min(n, m)
    ways = np.zeros((size + 1, int(np.sort(values)[-size:].sum()) + 1))
    ways[0, 0] = 1.0
    for i, value in enumerate(values.tolist()):
        # Of the arm's ranks, at least ``low`` must be among the ranks so far, or it could not be filled any more.
        low, high = max(1, size - (len(values) - 1 - i)), min(i + 1, size)
        ways[low : high + 1, value:] += ways[low - 1 : high, : ways.shape[1] - value]
    found = ways[size] / ways[size].sum()
    if flip:
        found = np.concatenate([np.zeros(int(values.sum()) + 1 - len(found)), found[::-1]])
    return _tail(found)


@lru_cache(maxsize=64)
def pair_tail(n: int) -> np.ndarray:
    """``P(S >= s)`` for s = 0, 1, ...: S the sum of the scores of the positive ones of ``n`` differences."""
    values = pair_scores(n)
    found = np.zeros(int(values.sum()) + 1)
    found[0] = 1.0
    for value in values.tolist():
        half = found * 0.5
        found = half.copy()
        found[value:] += half[: len(half) - value]
    return _tail(found)


def least_p(n: int, m: int) -> float:
    """The smallest p-value that two arms of ``n`` and ``m`` blocks can give."""
    return 1.0 if min(n, m) < 1 else float(tail(n, m)[int(np.sort(scores(n, m))[-n:].sum())])


def least_pair_p(n: int) -> float:
    """The smallest p-value of ``n`` pairs."""
    return 2.0**-n


def fewest(alpha: float, paired: bool = False) -> int:
    """Blocks per arm, or pairs, without which no data can be significant at ``alpha``."""
    if paired:
        return max(1, math.ceil(-math.log2(alpha)))
    n = 1
    while least_p(n, n) > alpha:
        n += 1
    return n


def critical(n: int, m: int, alpha: float, paired: bool = False) -> float:
    """Sum of scores from which an arm of ``n`` beside one of ``m``, or ``n`` pairs, is significant at ``alpha``.

    Counted where that is quick, else by the normal limit: for planning, not for a verdict.
    """
    if paired or n + m <= _QUICK:
        found = np.flatnonzero((pair_tail(n) if paired else tail(n, m)) <= alpha)
        return float(found[0]) if len(found) else math.inf
    values = scores(n, m)
    variance = n * m / (n + m) * values.var(ddof=1)
    return float(n * values.mean() + NormalDist().inv_cdf(1 - alpha) * math.sqrt(variance))


def _cut(normal: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(normal, *CUT) + SLOPE * normal)


def _whole(values: np.ndarray, levels: int) -> np.ndarray:
    low, high = values.min(), values.max()
    span = high - low if high > low else 1.0
    return np.asarray(np.rint((values - low) / span * levels), dtype=np.int64)


def _tail(found: np.ndarray) -> np.ndarray:
    return np.asarray(np.minimum(1.0, np.cumsum(found[::-1])[::-1]))
