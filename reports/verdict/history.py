"""Rows of many runs -> a series per cell and metric, with the runs at which its level changed.

A change-point is where the ranks of the runs before and after differ most; it counts where runs in random order would
seldom show as much (permutation test of the maximum over all splits, Pettitt, J. R. Stat. Soc. C 28 (1979), 126, with
normal scores). Each part is then searched again. The j-th test of a series has the j(j+1)-th part of its share of
``alpha``, so that any false change-point in the whole history, however many are found, has the chance ``alpha``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from harness.rows import Row
from reports.verdict.blocks import SPEEDS, Series, read_rows
from reports.verdict.comparison import names_of, typical_of

#: Random orders of the runs: for a first look, and where that shows something. p-values go down to their inverse.
_FEW_ORDERS, _ORDERS = 10_000, 100_000

#: A p-value of the first look above which no second one is taken.
_CLEAR = 0.005

#: Runs on either side of a change.
FEWEST = 3


@dataclass(frozen=True)
class Change:
    """``at``: the first point of the new level; ``ratio``: new level over old one; ``p``: of the test that found it."""

    at: int
    ratio: float
    p: float


@dataclass(frozen=True)
class History:
    """One cell and metric: run, time and median of each run in ``unit``, in order of time, and its changes."""

    names: Mapping[str, str]
    metric: str
    unit: str
    runs: tuple[str, ...]
    times: tuple[str, ...]
    values: tuple[float, ...]
    changes: tuple[Change, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        """The median of the stretch in which each run lies."""
        edges = [0, *(change.at for change in self.changes), len(self.values)]
        found: list[float] = []
        for start, end in pairwise(edges):
            found += [float(np.median(self.values[start:end]))] * (end - start)
        return tuple(found)


def histories(rows: Sequence[Row], metrics: Sequence[str] = SPEEDS, alpha: float = 0.01) -> list[History]:
    """Every cell and metric that has samples; changes at a family-wise ``alpha`` over all of them."""
    by_run: dict[str, list[Row]] = {}
    for row in rows:
        by_run.setdefault(row.run or "", []).append(row)
    series: dict[tuple[object, ...], list[tuple[str, str, Series]]] = {}
    for run, own in by_run.items():
        for key, found in read_rows(own, metrics).series.items():
            if len(found.times):
                series.setdefault(key, []).append((found.row.time or "", run, found))
    return [_history(sorted(points, key=lambda point: point[:2]), alpha / len(series)) for points in series.values()]


def changes(values: Sequence[float], alpha: float) -> list[Change]:
    """Change-points of a series at a family-wise ``alpha``. Values are positive; only their order decides."""
    if len(values) < 2 * FEWEST:
        return []
    logs = np.log(np.asarray(values, dtype=float))
    found: list[tuple[int, float]] = []
    waiting, tests = [(0, len(logs))], 0
    while waiting:
        start, end = waiting.pop(0)
        if end - start < 2 * FEWEST:
            continue
        tests += 1
        split, p = _split(logs[start:end])
        if p <= alpha / (tests * (tests + 1)):
            found.append((start + split, p))
            waiting += [(start, start + split), (start + split, end)]
    edges = [0, *sorted(at for at, _ in found), len(logs)]
    level = [float(np.median(logs[a:b])) for a, b in pairwise(edges)]
    return [Change(at, math.exp(level[i + 1] - level[i]), dict(found)[at]) for i, at in enumerate(edges[1:-1])]


def _history(points: Sequence[tuple[str, str, Series]], alpha: float) -> History:
    row = points[-1][2].row
    values = tuple(typical_of(found.row, found.times) for _, _, found in points)
    return History(
        names_of(row),
        row.metric,
        row.unit,
        tuple(run for _, run, _ in points),
        tuple(time for time, _, _ in points),
        values,
        tuple(changes(values, alpha)),
    )


def _split(logs: np.ndarray) -> tuple[int, float]:
    """The split that separates ``(n,)`` values best, and its p-value. Ties keep their order, as if they were drawn."""
    scores = _scores(len(logs))
    placed = np.empty(len(logs))
    placed[np.argsort(logs, kind="stable")] = scores
    if np.ptp(logs) == 0:
        return FEWEST, 1.0
    by_split = _contrast(placed[None])[0]
    best, p = float(by_split.max()) * (1 - 1e-12), 1.0
    for orders in (_FEW_ORDERS, _ORDERS):
        null = _null(len(logs), orders)
        p = (1 + len(null) - int(np.searchsorted(null, best, side="left"))) / (1 + len(null))
        if p > _CLEAR:
            break
    return int(np.argmax(by_split)) + FEWEST, p


def _contrast(placed: np.ndarray) -> np.ndarray:
    """``(orders, n)`` scores -> ``(orders, splits)``: by how many standard deviations the two sides differ."""
    n = placed.shape[1]
    k = np.arange(FEWEST, n - FEWEST + 1)
    sums = np.cumsum(placed, axis=1)[:, k - 1]
    variance = k * (n - k) / n * float(np.square(placed[0]).sum()) / (n - 1)
    return np.asarray(np.abs(sums) / np.sqrt(variance))


@lru_cache(maxsize=32)
def _scores(n: int) -> np.ndarray:
    return np.array([NormalDist().inv_cdf((i + 1) / (n + 1)) for i in range(n)])


@lru_cache(maxsize=32)
def _null(n: int, count: int) -> np.ndarray:
    """Largest contrast of each of so many random orders of ``n`` runs, ascending; the same at every call."""
    rng = np.random.default_rng((n, count))
    scores, found = _scores(n), []
    portion = max(1, 2_000_000 // n)
    for start in range(0, count, portion):
        orders = rng.permuted(np.broadcast_to(scores, (min(portion, count - start), n)), axis=1)
        found.append(_contrast(orders).max(axis=1))
    return np.sort(np.concatenate(found))
