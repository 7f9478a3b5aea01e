"""From the wrong results of a traced run to the one where it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.localize.case import Case
from harness.localize.finding import DIVERGED, NON_FINITE
from harness.localize.trace import Place, Traced
from reference.operations import Step

if TYPE_CHECKING:
    from harness.localize.cause import Cause


@dataclass(frozen=True)
class Start:
    """Where it begins.

    step     the operation; ``place`` where its effect was first seen, which is another one if it is not shown
    problem  NaN, Inf or a wrong shape; empty for an error beyond its bound
    """

    verdict: str
    step: Step
    place: Place
    token: int | None
    channel: int | None
    error: float | None
    bound: float | None
    problem: str
    span: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def start(traced: Traced) -> Start | None:
    """Where it begins; ``None`` if all that was shown is right.

    A wrong result comes before what is not finite because of it. What overflows by itself in the declared arithmetic
    is a fault of its own.
    """
    place, notes = _first(traced)
    if place is None:
        return None
    seen, step, span = place.seen, place.step, place.span
    token, channel = seen.token, seen.channel
    broken = traced.non_finite is not None and traced.non_finite.seen.problem in ("NaN", "Inf")
    if broken and seen.problem and place.overflow is not None:
        step, token, channel = place.overflow
        if step != place.step:
            notes.append(f"{step.point} is not shown; {seen.point} is {seen.problem} because of it")
        span = ()
    error, bound = (seen.local, seen.local_bound) if seen.locally_bad else (seen.error, seen.bound)
    verdict = NON_FINITE if broken else DIVERGED
    return Start(verdict, step, place, token, channel, error, bound, seen.problem, span, tuple(notes))


def _first(traced: Traced) -> tuple[Place | None, list[str]]:
    wrong, broken = traced.local or traced.globally, traced.non_finite
    if broken is None or wrong is None:
        return broken or wrong, []
    if broken.overflow is not None or not _before(wrong, broken, [seen.point for seen in traced.seen]):
        return broken, []
    return wrong, [f"it becomes {broken.seen.problem} in {broken.seen.point}"]


def _before(one: Place, other: Place, points: Sequence[str]) -> bool:
    return points.index(one.seen.point) < points.index(other.seen.point)


def operation_of(case: Case, span: Sequence[str], cause: Cause) -> str | None:
    """The one trace point of ``span`` that all defects have in common which reproduce what is shown, else ``None``."""
    from harness.localize.catalogue import of_model
    from harness.localize.cause import HYPOTHESIS
    from harness.localize.decoder import Decoder

    if cause.kind != HYPOTHESIS or not cause.names:
        return None
    known = of_model(Decoder(case.weights, case.stored, case.scheme))
    computes = {hypothesis.name: set(hypothesis.computes) for hypothesis in known}
    shared = set.intersection(*(computes.get(name, set()) for name in cause.names))
    points = [point for point in span if point in shared or point.split(".", 2)[-1] in shared]
    return points[0] if len(points) == 1 else None
