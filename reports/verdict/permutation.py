"""Is HEAD slower than a given ratio allows? Permutation tests of block times, and the intervals they invert to.

Times are natural logarithms, so that a shift is a ratio; every function takes stacks of arms at once, blocks last.
``slower`` is the p-value of "head takes at most ``exp(shift)`` times as long as base", small where it takes more.
Ties count against finding anything, so a coarse clock makes the tests careful, not wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reports.verdict.exact import pair_scores, pair_tail, scores, tail

#: Halvings of a range of shifts: to a millionth of it.
_HALVINGS = 24


@dataclass(frozen=True)
class Arms:
    """Logarithms of block times of two arms: ``base (..., n)``, ``head (..., m)``; pairs where ``paired``, n = m."""

    base: np.ndarray
    head: np.ndarray
    paired: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Blocks of base and of head."""
        return self.base.shape[-1], self.head.shape[-1]

    def swapped(self) -> Arms:
        """Head as base: what is slower in one is faster in the other."""
        return Arms(self.head, self.base, self.paired)

    def differences(self) -> np.ndarray:
        """Of pairs: head - base."""
        return np.asarray(self.head - self.base)


def slower(arms: Arms, shift: np.ndarray | float) -> np.ndarray:
    """p-value ``(...)`` of head - base <= shift; ``shift`` is a number or ``(...)``."""
    n, m = arms.sizes
    return np.asarray((pair_tail(n) if arms.paired else tail(m, n))[statistic(arms, shift)])


def statistic(arms: Arms, shift: np.ndarray | float) -> np.ndarray:
    """Sum ``(...)`` of the scores of head's blocks, moved by ``-shift``, or of the positive differences."""
    off = np.asarray(shift, dtype=float)[..., None]
    if arms.paired:
        moved = arms.differences() - off
        order = np.argsort(np.abs(moved), axis=-1, kind="stable")
        positive = np.take_along_axis(moved, order, -1) > 0
        return np.asarray(positive @ pair_scores(moved.shape[-1]))
    n, m = arms.sizes
    pooled = np.concatenate(_same_stack(arms.head - off, arms.base), axis=-1)
    order = np.argsort(pooled, axis=-1, kind="stable")  # head first: of a tie, head has the lower rank
    return np.asarray((order < m) @ scores(m, n))


def faster(arms: Arms, shift: np.ndarray | float) -> np.ndarray:
    """p-value ``(...)`` of head - base >= shift."""
    return slower(arms.swapped(), -np.asarray(shift, dtype=float))


def at_least(arms: Arms, alpha: float) -> np.ndarray:
    """Lower confidence bound ``(...)`` of head - base: every shift below it has ``slower`` <= alpha. -inf if none."""
    low, high = _range(arms)
    found = _last(lambda shift: slower(arms, shift) <= alpha, low, high)
    return np.where(slower(arms, low) <= alpha, found, -np.inf)


def at_most(arms: Arms, alpha: float) -> np.ndarray:
    """Upper confidence bound ``(...)`` of head - base."""
    return -at_least(arms.swapped(), alpha)


def estimate(arms: Arms) -> np.ndarray:
    """Head - base ``(...)`` that the test finds most likely: the middle between its bounds at one half (R-estimate)."""
    return np.asarray((at_least(arms, 0.5) + at_most(arms, 0.5)) / 2)


def _range(arms: Arms) -> tuple[np.ndarray, np.ndarray]:
    """Shifts below and above all differences."""
    if arms.paired:
        found = arms.differences()
        low, high = found.min(axis=-1), found.max(axis=-1)
    else:
        low = arms.head.min(axis=-1) - arms.base.max(axis=-1)
        high = arms.head.max(axis=-1) - arms.base.min(axis=-1)
    room = 1e-9 + 1e-6 * (high - low)
    return low - room, high + room


def _last(significant: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Largest shift at which ``significant`` holds; it holds at ``low`` and, being monotone, fails from there on."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        good = significant(middle)
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    return low


def _same_stack(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the stack (all axes but the last) of the larger one."""
    stack = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return np.broadcast_to(a, (*stack, a.shape[-1])), np.broadcast_to(b, (*stack, b.shape[-1]))
