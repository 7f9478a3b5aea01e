"""Intervals of means over dependent positions, 95 %, without random numbers.

Neighbouring positions of a text are alike, and so are neighbouring segments: the unit is the block, some segments
that follow one another in the text, or, where the state is carried through, a run of positions. The formulas are
those of blocks that do not depend on one another, which those of one text do:

    mean, ratio     Student's t over the blocks; a ratio of sums by its linearization. This is the method of
                    batch means (B. Schmeiser, Operations Research 30, 1982: more than 30 batches gain little)
                    and the ultimate-cluster estimator of surveys (W. Cochran, Sampling Techniques, 3rd ed., 6.3, 9A)
    fraction        Wilson's interval, which does not close at 0 and 1, for the number of independent positions
                    that would vary as the blocks do, with its correction for few blocks (E. Korn, B. Graubard,
                    Survey Methodology 24, 1998); never more than there are positions

Below LEAST_BLOCKS there is no interval. docs/quality.md has the coverage that was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

#: A passage has at most this many blocks; with fewer than LEAST_BLOCKS there is no interval.
MOST_BLOCKS, LEAST_BLOCKS = 32, 8

#: A block spans this many segment lengths of the text, read or skipped, unless that left fewer than LEAST_BLOCKS.
SPAN = 16

#: The shortest block worth the name.
SHORTEST = 16

#: 97.5 % point of the normal distribution.
Z = 1.959963984540054


@dataclass(frozen=True)
class Mean:
    """A mean over positions, its 95 % interval (``None``: too few blocks for one) and the means of its blocks."""

    value: float
    interval: tuple[float, float] | None
    blocks: tuple[float, ...]


def edges(positions: int, context: int, spacing: float = math.inf) -> np.ndarray:
    """First position of every block, and the end.

    context  positions of a segment; 0: one run, in blocks of about equal length
    spacing  from one segment's beginning to the next, in lengths of a segment; Inf: segments are independent

    Raises ValueError for fewer than two blocks.
    """
    if context:
        starts = np.array([*range(0, positions, context), positions])
        segments = len(starts) - 1
        wide = min(segments * spacing / SPAN, MOST_BLOCKS)
        count = min(segments, max(LEAST_BLOCKS, int(wide)))
        found = starts[np.linspace(0, segments, count + 1).astype(int)]
    else:
        count = min(LEAST_BLOCKS, positions // SHORTEST)
        found = np.linspace(0, positions, count + 1).astype(int)
    if count < 2:
        raise ValueError(f"{positions} positions are {count} block; blocks are compared with each other")
    return np.asarray(found)


def mean(values: np.ndarray, blocks: np.ndarray) -> Mean:
    """Mean of ``values (n,)`` over blocks that begin at ``blocks`` (:func:`edges`)."""
    return ratio(values, np.ones(len(values)), blocks)


def ratio(values: np.ndarray, weights: np.ndarray, blocks: np.ndarray) -> Mean:
    """Sum of ``values`` over sum of ``weights``, both ``(n,)``: nats over bytes, or over positions."""
    top = np.add.reduceat(np.asarray(values, np.float64), blocks[:-1])
    bottom = np.add.reduceat(np.asarray(weights, np.float64), blocks[:-1])
    value = float(top.sum() / bottom.sum())
    means = tuple(float(x) for x in top / bottom)
    if len(means) < LEAST_BLOCKS:
        return Mean(value, None, means)
    half = student(len(top) - 1) * _error(top, bottom, value)
    return Mean(value, (value - half, value + half), means)


def positive(values: np.ndarray, blocks: np.ndarray) -> Mean:
    """The mean of what cannot be negative, such as a divergence: its interval ends at zero."""
    return not_negative(mean(values, blocks))


def not_negative(found: Mean) -> Mean:
    """The same with an interval that ends at zero."""
    if found.interval is None:
        return found
    return replace(found, interval=(max(0.0, found.interval[0]), found.interval[1]))


def exponential(found: Mean) -> Mean:
    """``exp`` of a mean and all that belongs to it: perplexity of a mean surprise.

    Inf beyond float64, which a surprise of 710 nat is; then, and where only its upper end is, without interval.
    """
    ends = None if found.interval is None else (exp(found.interval[0]), exp(found.interval[1]))
    if ends is not None and not math.isfinite(ends[1]):
        ends = None
    return Mean(exp(found.value), ends, tuple(exp(x) for x in found.blocks))


def exp(x: float) -> float:
    """``e**x``; Inf where that is too large for float64."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def fraction(values: np.ndarray, blocks: np.ndarray) -> Mean:
    """Mean of ``values (n,)`` between 0 and 1."""
    found = mean(values, blocks)
    if found.interval is None:
        return found
    n, p = len(values), found.value
    count = len(found.blocks)
    top = np.add.reduceat(np.asarray(values, np.float64), blocks[:-1])
    variance = _error(top, np.diff(blocks).astype(np.float64), p) ** 2
    # As many independent positions as would vary like this; where nothing varied, all there are.
    independent = min(n, p * (1 - p) / variance) if variance > 0 else n
    independent *= (Z / student(count - 1)) ** 2
    return Mean(p, wilson(p, independent), found.blocks)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Interval of a probability that was seen as ``p`` in ``n`` independent trials (E. Wilson, JASA 22, 1927)."""
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def _error(top: np.ndarray, bottom: np.ndarray, value: float) -> float:
    """Standard error of ``sum(top) / sum(bottom)`` over independent blocks."""
    count = len(top)
    spread = float(np.sum(np.square(top - value * bottom)))
    return math.sqrt(count / (count - 1) * spread) / float(bottom.sum())


def student(degrees: int) -> float:
    """97.5 % point of Student's t with ``degrees`` of freedom, by bisection of its distribution function."""
    low, high = Z, 12.8
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _two_sided(t: float, degrees: int) -> float:
    """P(|T| < t): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = degrees % 2
    term, total = 1.0, 1.0
    for k in range(1 + odd, degrees - 2, 2):
        term *= square * k / (k + 1)
        total += term
    if not odd:
        return sine * total
    if degrees == 1:
        return 2 * theta / math.pi
    return 2 / math.pi * (theta + sine * math.cos(theta) * total)
