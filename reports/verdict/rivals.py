"""Other ways to call a cell slower, on the same samples and at the same rate of false alarms.

Each is a number per cell, larger where head is slower, that raises an alarm beyond a threshold; the threshold is set
so that as many reports without any difference raise one as with any other. What is left is how much each one sees.

    pytest-benchmark         --benchmark-compare-fail=mean|median|min:P%: ratio of that figure over all samples
    Mann-Whitney             of all samples of a cell, blocks not known
    Welch's t                of all samples of a cell
    last run                 github-action-benchmark: ratio of the last run's mean to that of the run before; a run is
                             the last block of each side
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reports.verdict.permutation import statistic
from reports.verdict.resample import Record, arms, draw

#: base and head, log times ``(reports, cells, blocks, samples)`` -> ``(reports, cells)``.
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]

OURS = "this tool"

#: Reports in which the thresholds are found, and in which the slowdowns are.
REPORTS = 2000

#: Part of the reports without any difference that may raise an alarm.
RATE = 0.01


def _flat(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(x.reshape(*x.shape[:-2], -1)))


def _ratio(figure: Callable[..., np.ndarray]) -> Rule:
    return lambda base, head: np.asarray(figure(_flat(head), axis=-1) / figure(_flat(base), axis=-1))


def _welch(base: np.ndarray, head: np.ndarray) -> np.ndarray:
    b, h = _flat(base), _flat(head)
    n = b.shape[-1]
    return np.asarray((h.mean(-1) - b.mean(-1)) / np.sqrt((h.var(-1, ddof=1) + b.var(-1, ddof=1)) / n))


def _mann_whitney(base: np.ndarray, head: np.ndarray) -> np.ndarray:
    b, h = _flat(base), _flat(head)
    n = h.shape[-1]
    order = np.argsort(np.concatenate([h, b], axis=-1), axis=-1, kind="stable")
    return np.asarray((order < n) @ np.arange(1.0, 2 * n + 1))


def _last_run(base: np.ndarray, head: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(head[..., -1, :]).mean(-1) / np.exp(base[..., -1, :]).mean(-1))


RIVALS: Mapping[str, Rule] = {
    "pytest-benchmark mean": _ratio(np.mean),
    "pytest-benchmark median": _ratio(np.median),
    "pytest-benchmark min": _ratio(np.min),
    "Mann-Whitney": _mann_whitney,
    "Welch's t": _welch,
    "last run": _last_run,
}


@dataclass(frozen=True)
class Seen:
    """Part of the slowed cells that each rule found, at ``RATE`` of false alarms, in cells of each spread."""

    record: str
    how: str
    blocks: int
    power: Mapping[float, Mapping[str, float]]


def matched(
    record: Record,
    how: str,
    spreads: Sequence[float],
    blocks: int,
    effect: float,
    cells: int,
    seed: int = 0,
    reports: int = REPORTS,
) -> Seen:
    """One threshold per rule from reports without any difference, power from others with one slower cell each.

    Of several ``spreads`` each report has as many cells of each, as one machine has quiet and noisy cells: the
    threshold is one for all of them, as an option of a command is.
    """
    rng = np.random.default_rng(seed)
    used = {spread: record.scaled(spread) for spread in spreads}
    rules: dict[str, Rule] = {OURS: lambda base, head: _ours(base, head, how), **RIVALS}
    worst = {name: np.full(reports, -np.inf) for name in rules}
    for own in used.values():
        for at, base, head in _portions(own, how, reports, cells // len(used), blocks, rng):
            for name, rule in rules.items():
                found = rule(base, head).max(axis=1)
                worst[name][at : at + len(found)] = np.maximum(worst[name][at : at + len(found)], found)
    limits = {name: np.sort(found)[int((1 - RATE) * reports) - 1] for name, found in worst.items()}
    power = {}
    for spread, own in used.items():
        hits: dict[str, list[np.ndarray]] = {name: [] for name in rules}
        for _, base, head in _portions(own, how, reports, 1, blocks, rng):
            for name, rule in rules.items():
                hits[name].append(rule(base, head - np.log1p(-effect)) > limits[name])
        power[spread] = {name: float(np.mean(np.concatenate(found))) for name, found in hits.items()}
    return Seen(record.name, how, blocks, power)


def _ours(base: np.ndarray, head: np.ndarray, how: str) -> np.ndarray:
    return statistic(arms(base, head, how), 0.0).astype(float)


def _portions(
    record: Record, how: str, reports: int, cells: int, blocks: int, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    size = max(1, 2_000_000 // (cells * blocks * record.logs.shape[1]))
    for start in range(0, reports, size):
        yield (start, *draw(record, how, min(size, reports - start), cells, blocks, rng))
