"""What a table says of how its figures were measured: memory that is not known, precision that was not reached."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from harness.rows import Row

_SPEEDS = ("prefill", "decode")

#: Of the cells that missed the precision, so many are named.
_NAMED = 4


def measuring_notes(cells: Sequence[Sequence[Row]]) -> list[str]:
    """Notes on cells of a table of speeds; none where there is nothing to say."""
    return [*precision_notes(cells), *_memory(cells)]


def half_width(row: Row) -> float | None:
    """The interval's wider half as a part of the value; ``None`` without either."""
    if row.value is None or row.interval is None or not row.value > 0:
        return None
    return max(row.interval[1] - row.value, row.value - row.interval[0]) / row.value


def percent(half: float) -> str:
    """``±2``: of a half width, with a decimal where it is below half a percent."""
    return f"±{100 * half:.0f}" if half >= 0.005 else f"±{100 * half:.1f}"


def precision_notes(cells: Sequence[Sequence[Row]]) -> list[str]:
    """Which speeds did not get as narrow as asked for, and what ended them; of a sweep's points the widest."""
    missed: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in (row for cell in cells for row in cell):
        asked = (row.sampling or {}).get("precision")
        if asked is None or row.metric not in _SPEEDS or row.value is None or row.stopped == "precision reached":
            continue
        of_cell = missed.setdefault((f"{100 * asked:g} %", _ended(row)), {})
        widest = of_cell.setdefault(f"{row.backend} {row.scheme}", {})
        half = half_width(row)
        widest[row.metric] = max(widest.get(row.metric, 0.0), inf if half is None else half)
    notes = []
    for (asked, ended), names in missed.items():
        found = [f"{name} {', '.join(map(_with_half, widest.items()))}" for name, widest in names.items()]
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        notes.append(f"{asked} was not reached {ended}: {'; '.join(found[:_NAMED])}{more}")
    return notes


def _with_half(found: tuple[str, float]) -> str:
    metric, half = found
    return f"{metric} has no interval" if half == inf else f"{metric} {percent(half)} %"


def _ended(row: Row) -> str:
    """Why it was measured no longer."""
    sampling = row.sampling or {}
    if row.stopped == "time budget" and sampling.get("budget_s") is not None:
        return f"within {sampling['budget_s']:g} s"
    if row.stopped == "repeats reached":
        return f"within {sampling.get('repeats')} repeats"
    ends = {"interrupted": "before the interruption", "cell ended": "before the cell ended"}
    return ends.get(str(row.stopped), "in time")


def _memory(cells: Sequence[Sequence[Row]]) -> list[str]:
    """That cells have no memory for sharing a process; where a system tells none at all, that is not why."""
    rows = [row for cell in cells for row in cell if row.isolated is False and row.run]
    known = {row.run for row in rows if row.peak_bytes is not None}
    for cell in cells:
        timed = [row for row in cell if row.metric in _SPEEDS and row.value is not None and row.isolated is False]
        if timed and timed[0].run in known and all(row.peak_bytes is None for row in cell):
            return ["memory: cells that share a process have none below their weights; --isolate gives each its own"]
    return []
