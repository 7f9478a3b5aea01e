"""Does a decode step take longer the longer the context is? RWKV's state has one size, so it must not.

Decode is measured at several context lengths in rounds: each round has one block at every length, in an order drawn
at random, and the next round has it backwards (:mod:`harness.schedule`). Were length without effect, the mean times of
such a pair could be handed out to its lengths in any way; so the slope is compared with the slopes of permutations,
pair by pair. That test is exact whatever the noise is, drift over the run and bursts included, since the order was
random.

The interval holds every slope b for which the times less b x length pass the test: where 0 is outside of it, the time
is not flat. Two-sided, at :data:`CONFIDENCE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

#: Of the interval, and one less the rate of false alarms of the verdict.
CONFIDENCE = 0.99

#: Permutations drawn; with this many a p-value of 1 % is known to about a tenth of itself.
DRAWS = 4999

#: With fewer points no slope has a meaning; with fewer rounds no p-value can be small enough.
LEAST_POINTS, LEAST_ROUNDS = 3, 3


@dataclass(frozen=True)
class Slope:
    """How much longer a step takes per token of context.

    ns        nanoseconds per token, least squares over the rounds' deviations from their own means
    interval  at :data:`CONFIDENCE`; an end may be infinite
    p         share of permutations whose slope is at least as large
    step_ns   median time of a step
    lengths   context lengths, in tokens
    rounds    how many independent orders there were
    """

    ns: float
    interval: tuple[float, float]
    p: float
    step_ns: float
    lengths: tuple[int, ...]
    rounds: int

    @property
    def flat(self) -> bool:
        """Whether no slope is a possible one."""
        return self.interval[0] <= 0 <= self.interval[1]

    @property
    def over_range(self) -> float:
        """The slope over the whole range of lengths, as a part of a step."""
        return self.ns * (self.lengths[-1] - self.lengths[0]) / self.step_ns

    def __str__(self) -> str:
        low, high = (_short(end) for end in self.interval)
        found = "flat" if self.flat else "longer" if self.ns > 0 else "shorter"
        slope = f"{_short(self.ns)} ns a step per token of context"
        interval = f"{100 * CONFIDENCE:.0f} % interval {low} to {high}"
        over = f"{100 * self.over_range:+.2g} % from {self.lengths[0]} to {self.lengths[-1]} tokens"
        return f"{found}: {slope}, {interval}; {over}; {self.rounds} orders"


def _short(ns: float) -> str:
    return f"{ns:+.0f}" if abs(ns) >= 100 else f"{ns:+.3g}"


def slope(lengths: Sequence[int], times: np.ndarray, seed: int = 0) -> Slope | None:
    """The slope of ``times (rounds, lengths)``, nanoseconds a step; ``None`` with too few of either to tell.

    A row is of one random order: of one round, or the mean of a round and its reverse.
    """
    times = np.asarray(times, dtype=float)
    if times.ndim != 2 or times.shape[1] != len(lengths) or not np.isfinite(times).all():
        raise ValueError(
            f"times of shape {times.shape} for {len(lengths)} lengths; finite (rounds, lengths) are needed"
        )
    rounds = len(times)
    if len(lengths) < LEAST_POINTS or rounds < LEAST_ROUNDS or min(lengths) == max(lengths):
        return None
    x = np.asarray(lengths, dtype=float) - np.mean(lengths)
    y = times - times.mean(axis=1, keepdims=True)
    scale = rounds * float(x @ x)
    drawn = _permuted(x, rounds, seed)  # (DRAWS, rounds, lengths)
    # A permutation's slope is linear in b: of y, and of what b x length adds to y.
    of_y = np.einsum("drl,rl->d", drawn, y) / scale
    of_x = np.einsum("drl,l->d", drawn, x) / scale
    found = float((y @ x).sum() / scale)
    order = np.argsort(lengths)
    return Slope(
        ns=found,
        interval=(_end(found, of_y, of_x, -1), _end(found, of_y, of_x, +1)),
        p=_p(found, of_y, of_x, 0.0),
        step_ns=float(np.median(times)),
        lengths=tuple(int(np.asarray(lengths)[i]) for i in order),
        rounds=rounds,
    )


def _permuted(x: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """Draws in which every round has its lengths in another order."""
    rng = np.random.default_rng(seed)
    keys = rng.random((DRAWS, rounds, len(x)))
    return x[np.argsort(keys, axis=-1)]


def _p(found: float, of_y: np.ndarray, of_x: np.ndarray, b: float) -> float:
    """Two-sided p-value of the slope being ``b``; what was found counts as one of the draws.

    A permuted slope that differs from what was found by rounding alone is as large as it.
    """
    residual = found - b
    drawn = np.abs(of_y - b * of_x)
    tolerance = 1e-9 * (abs(residual) + np.abs(of_y).max() + abs(b))
    return float((1 + np.count_nonzero(drawn >= abs(residual) - tolerance)) / (1 + len(of_y)))


def _end(found: float, of_y: np.ndarray, of_x: np.ndarray, side: int) -> float:
    """The slope farthest on that side that the test does not reject; infinite where it never rejects."""
    alpha = 1 - CONFIDENCE
    step = max(float(np.abs(of_y).max()), abs(found) * 1e-6, 1e-12)
    far = found + side * step
    for _ in range(60):
        if _p(found, of_y, of_x, far) <= alpha:
            break
        step *= 2
        far = found + side * step
    else:
        return side * inf
    near = found
    for _ in range(50):
        middle = (near + far) / 2
        if _p(found, of_y, of_x, middle) <= alpha:
            far = middle
        else:
            near = middle
    return far
