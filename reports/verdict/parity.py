"""Parity of two files: the worst verdict over all runs of a cell, and whether head is worse than base.

A cell that fails in one run of twelve is wrong, whichever run was the last. Where base fails at times too, head is a
regression only if it fails in more of its runs than chance allows (Fisher's exact test), or in all of them where base
passes at least half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.rows import Row
from reports.verdict.pairing import Key, paired

#: Verdicts of a cell that computed what it should, as far as that can be judged.
SOUND = ("PASS", "UNSUPPORTED")
BROKEN = ("FAIL", "CRASHED", "TIMEOUT")

_ORDER = ("CRASHED", "TIMEOUT", "FAIL", "UNAVAILABLE", "UNSUPPORTED", "PASS")


@dataclass(frozen=True)
class Verdict:
    """The worst verdict on one cell over its ``runs``, why, and in how many of them it ``failed``."""

    worst: str
    why: str
    failed: int
    runs: int


@dataclass(frozen=True)
class Judged:
    """Verdicts of one cell on both sides; ``None`` where it was not judged.

    one_machine  both sides had the same machine: what head cannot run or judge any more, head has lost
    worse        base fails in some of its runs, and head in more than chance allows, or in all where base seldom does
    untold       both fail in some of their runs, and nothing says that head does more often
    """

    names: Mapping[str, str]
    base: str | None
    head: str | None
    why: str
    one_machine: bool = False
    worse: bool = False
    untold: bool = False

    @property
    def lost(self) -> bool:
        """Whether head cannot be run, or cannot be judged, where base could."""
        return (self.base in SOUND and self.head == "UNAVAILABLE") or (self.base, self.head) == ("PASS", "UNSUPPORTED")

    @property
    def regression(self) -> bool:
        """Whether head is wrong, or does not run, where base was right."""
        return (self.base in SOUND and self.head in BROKEN) or (self.one_machine and self.lost) or self.worse


def over_runs(rows: Sequence[Row]) -> Verdict:
    """Of one cell's rows that have a verdict, in order of time. Runs that could not measure it say nothing of it,
    unless there is no other."""
    by_run: dict[str | None, Row] = {}
    for row in rows:
        before = by_run.get(row.run)
        if before is None or _place(row) <= _place(before):
            by_run[row.run] = row
    judged = [row for row in by_run.values() if row.verdict != "UNAVAILABLE"] or list(by_run.values())
    worst = min(reversed(judged), key=_place)
    failed = sum(row.verdict in BROKEN for row in judged)
    return Verdict(str(worst.verdict), worst.reason or "", failed, len(judged))


def judged_pairs(
    base: Mapping[Key, Verdict], head: Mapping[Key, Verdict]
) -> list[tuple[Key, Verdict | None, Verdict | None]]:
    """Every cell that was judged, as head knows it if it does, with the verdicts of both sides.

    Right is right on any machine: cells that differ in machine or weights alone are judged together.
    """
    same = paired(base, head)
    found: list[tuple[Key, Verdict | None, Verdict | None]] = [(h, base[b], head[h]) for b, h in same]
    rest: dict[tuple[object, ...], tuple[list[Key], list[Key]]] = {}
    matched = ({b for b, _ in same}, {h for _, h in same})
    for side, verdicts in enumerate((base, head)):
        for key in verdicts:
            if key not in matched[side]:
                rest.setdefault(key.what, ([], []))[side].append(key)
    for ours, theirs in rest.values():
        key = (theirs or ours)[0]
        found.append((key, _together([base[k] for k in ours]), _together([head[k] for k in theirs])))
    return found


def judged(names: Mapping[str, str], base: Verdict | None, head: Verdict | None, alpha: float) -> Judged:
    """One cell; ``alpha``: chance of calling head worse where both fail as often."""
    worse = untold = False
    if base is not None and head is not None and 0 < base.failed < base.runs and head.failed:
        always = head.failed == head.runs and 2 * base.failed <= base.runs
        worse = always or more_often(base, head) <= alpha
        untold = not worse
    why = (head or base or Verdict("", "", 0, 0)).why
    return Judged(names, base.worst if base else None, head.worst if head else None, why, worse=worse, untold=untold)


def more_often(base: Verdict, head: Verdict) -> float:
    """p-value of "head fails no more often than base": so many of all the failures in head's runs, or more."""
    failed, runs = base.failed + head.failed, base.runs + head.runs
    ways = sum(
        math.comb(head.runs, k) * math.comb(base.runs, failed - k)
        for k in range(head.failed, min(failed, head.runs) + 1)
    )
    return ways / math.comb(runs, failed)


def flaky(name: str, of: str, found: Verdict | None) -> list[str]:
    """A note on a cell that fails in some of its runs only."""
    if found is None or not 0 < found.failed < found.runs:
        return []
    return [f"{of}: fails in {found.failed} of {found.runs} runs of {name}"]


def _together(found: Sequence[Verdict]) -> Verdict | None:
    if not found:
        return None
    worst = min(found, key=lambda it: _ORDER.index(it.worst))
    return Verdict(worst.worst, worst.why, sum(it.failed for it in found), sum(it.runs for it in found))


def _place(row: Row) -> int:
    return _ORDER.index(str(row.verdict))
