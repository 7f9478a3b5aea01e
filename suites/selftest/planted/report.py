"""Figures as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from suites.selftest.planted.backend import TRACE
from suites.selftest.planted.clean import Clean
from suites.selftest.planted.figures import Rate, figures
from suites.selftest.planted.trial import Outcome


def faults_text(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A table by arithmetic and what is shown, what was missed by name, and what was not visible."""
    names = len({outcome.trial.fault for outcome in outcomes})
    yield f"{names} faults in {len(outcomes)} places; intervals of 95 %, by Clopper and Pearson"
    yield f"\n{'arithmetic':<10} {'shows':<7} {'detected of visible':<30} {'exact layer':<30} {'exact operation':<30}"
    found = list(figures(outcomes))
    for f in found:
        line = f"{f.kind:<10} {f.shows:<7} {f.detected!s:<30} {f.layer!s:<30} {f.operation!s:<30}"
        yield line + ("" if f.reached else "  MISSED")
    yield "(not traced: whether the operation is in the half of a layer that was named)"
    by = Counter(o.by[TRACE] for o in outcomes if o.visible(TRACE) and o.by[TRACE])
    yield "\nseen by: " + ", ".join(f"{what} {n}" for what, n in by.items())
    yield from _times(outcomes)
    for f in found:
        if f.missed:
            yield f"\n{f.kind}, {f.shows}:"
            yield from (f"  {line}" for line in f.missed)
    yield "\ninvisible, and not counted:"
    for kind in dict.fromkeys(f.kind for f in found):
        yield f"  under {kind}: {_invisible([o for o in outcomes if o.trial.kind == kind])}"


def _times(outcomes: Sequence[Outcome]) -> Iterator[str]:
    times: dict[str, list[float]] = {}
    for outcome in outcomes:
        for how, seconds in outcome.seconds.items():
            times.setdefault(how, []).append(seconds)
    for how, found in times.items():
        yield f"localizing, {how}: median {sorted(found)[len(found) // 2]:.2f} s, longest {max(found):.2f} s"


def _invisible(outcomes: Sequence[Outcome]) -> str:
    largest: dict[str, float] = {}
    for o in outcomes:
        if not o.visible(TRACE):
            largest[o.trial.fault] = max(largest.get(o.trial.fault, 0.0), o.effect.every)
    return ", ".join(f"{name} ({e:.2g} of the bound)" for name, e in largest.items()) or "none"


def clean_text(runs: Sequence[Clean], alarms: Sequence[tuple[Clean, str]]) -> Iterator[str]:
    """How often a correct backend was said to be wrong, and which."""
    if not runs:
        return
    localized = sum(run.localized for run in runs)
    yield f"\nfalse alarms: {Rate(len(alarms), len(runs))} of clean runs, {localized} of them localized too"
    yield from (f"  {run}: {said}" for run, said in alarms)
