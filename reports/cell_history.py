"""Speeds of each cell run by run, and the runs at which its level changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.cells import SPEEDS, Cell
from reports.row_fields import revision
from reports.verdict.history import FEWEST, changes

#: Family-wise chance of any false change-point in the whole report.
ALPHA = 0.01

#: A run of a cell: time, run, revision, value, interval, and what changed there, as plain data.
Points = list[dict[str, Any]]


def histories(cells: Sequence[Cell]) -> list[dict[str, Points]]:
    """For each cell, metric -> its runs, oldest first; only where there are two or more that hold a speed."""
    found = [{metric: points for metric in SPEEDS if len(points := _points(cell, metric)) > 1} for cell in cells]
    long = [points for each in found for points in each.values() if len(points) >= 2 * FEWEST]
    for points in long:
        for change in changes([point["v"] for point in points], ALPHA / len(long)):
            points[change.at]["changed"] = {"ratio": change.ratio, "p": change.p}
    return found


def _points(cell: Cell, metric: str) -> Points:
    found = []
    for rows in (*cell.earlier, cell.rows):
        row = Cell(cell.hardware, rows).speed(metric)
        if row is not None and row.value is not None:
            low, high = row.interval or (None, None)
            known = {"t": row.time, "run": row.run, "rev": revision(row)}
            found.append({**known, "v": row.value, "lo": low, "hi": high})
    return found
