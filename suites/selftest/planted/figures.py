"""Outcomes -> figures: how many of how many, with the interval that the true rate lies in, and which were missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from suites.selftest.planted.backend import LOGITS, STATE, TRACE
from suites.selftest.planted.trial import Outcome

CONFIDENCE = 0.95

#: Least fraction of what is visible that must be detected; of what is traced, in the right layer and operation.
DETECTION, LAYER, OPERATION = 0.99, 0.95, 0.90


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """NaN where there was nothing to hit."""
        return self.hits / self.n if self.n else math.nan

    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's exact interval of the true rate."""
        tail = (1 - CONFIDENCE) / 2
        low = 0.0 if self.hits == 0 else _solve(lambda p: 1 - _at_most(self.hits - 1, self.n, p), tail)
        high = 1.0 if self.hits == self.n else _solve(lambda p: 1 - _at_most(self.hits, self.n, p), 1 - tail)
        return low, high

    def __str__(self) -> str:
        if not self.n:
            return "none"
        low, high = self.interval()
        return f"{self.hits}/{self.n} {100 * self.value:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def _at_most(k: int, n: int, p: float) -> float:
    """Probability of at most ``k`` hits of ``n``."""
    if p in (0.0, 1.0):
        return 1.0 if p == 0.0 or k >= n else 0.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    )
    return math.fsum(math.exp(x) for x in logs)


def _solve(rising: Callable[[float], float], value: float) -> float:
    """Where a function that rises from 0 to 1 reaches ``value``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Figures:
    """Of one arithmetic, and of what its backends show. ``operation``: the half of the layer where not traced."""

    kind: str
    shows: str
    detected: Rate
    layer: Rate
    operation: Rate
    missed: tuple[str, ...]

    @property
    def reached(self) -> bool:
        """Whether the bars are; only detection of a traced backend and its places have any."""
        if self.shows != TRACE:
            return True
        bars = ((self.detected, DETECTION), (self.layer, LAYER), (self.operation, OPERATION))
        return self.detected.n > 0 and not any(rate.value < bar for rate, bar in bars)


def figures(outcomes: Sequence[Outcome]) -> Iterator[Figures]:
    """One for every arithmetic and every way to show results."""
    for kind in dict.fromkeys(outcome.trial.kind for outcome in outcomes):
        for shows in (TRACE, STATE, LOGITS):
            yield _figures(kind, shows, [o for o in outcomes if o.trial.kind == kind and o.visible(shows)])


def _figures(kind: str, shows: str, visible: Sequence[Outcome]) -> Figures:
    placed = [o for o in visible if o.placed and shows in o.found]
    missed = [
        f"{o.trial}: not detected, {o.effect.logits:.3g} of the bound in {o.effect.use}"
        for o in visible
        if not o.by[shows]
    ]
    for o in placed:
        if not o.right_point(shows):
            where = "nothing" if o.found[shows] is None else str((o.found[shows] or ("", ""))[1])
            missed.append(f"{o.trial}: in {o.place}, found {where}")
    return Figures(
        kind,
        shows,
        Rate(sum(bool(o.by[shows]) for o in visible), len(visible)),
        Rate(sum(o.right_layer(shows) for o in placed), len(placed)),
        Rate(sum(o.right_point(shows) for o in placed), len(placed)),
        tuple(missed),
    )
