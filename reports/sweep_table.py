"""The table of a sweep: a line per cell and metric, a column per point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.rows import Row, cell

#: Axis -> the point that a row is at, in the order in which they are looked for.
_AXES: dict[str, Callable[[Row], int | None]] = {
    "prompt": lambda row: row.workload.prompt_tokens if row.workload else None,
    "decode": lambda row: row.workload.decode_tokens if row.workload else None,
    "batch": lambda row: row.workload.batch if row.workload else None,
    "threads": lambda row: row.threads,
}

_METRICS = ("prefill", "decode")


@dataclass(frozen=True)
class SweepLines:
    """Header and lines of a sweep along ``axis``; ``notes`` say how decode scales with length."""

    axis: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def sweep_lines(rows: Sequence[Row], figure: Callable[[Row], str]) -> SweepLines | None:
    """The sweep that the rows are; ``None`` where no cell is at two points of one axis.

    A cell's points may be of several runs, as ``--resume`` leaves them; of one point the last row counts.

    figure   a row's value as text
    """
    speeds = [row for row in rows if row.metric in _METRICS and row.workload is not None]
    for axis, at in _AXES.items():
        groups = _groups(speeds, axis)
        points = sorted({point for row in speeds if (point := at(row)) is not None})
        if len(points) < 2 or all(len(group) < 2 for group in groups.values()):
            continue
        lines = []
        for group in groups.values():
            by_point = {at(row): row for row in group}
            first = group[0]
            cells = [_cell(by_point.get(point), figure) for point in points]
            lines.append((first.backend, first.scheme, first.metric, *cells))
        header = ("backend", "scheme", "tok/s", *(f"{axis} {points[0]}", *(str(point) for point in points[1:])))
        return SweepLines(axis, header, tuple(lines), tuple(_slopes(rows)))
    return None


def _slopes(rows: Sequence[Row]) -> list[str]:
    """How decode scales with length, a line a cell; why there is no slope, a line a reason."""
    slopes = [row for row in rows if row.metric == "length_slope"]
    found = [row for row in slopes if row.value is not None]
    notes = [f"{row.backend} {row.scheme}: decode against context length: {row.reason}" for row in found]
    for reason in dict.fromkeys(row.reason for row in slopes if row.value is None):
        names = dict.fromkeys(f"{row.backend} {row.scheme}" for row in slopes if row.reason == reason)
        alone = all(row.reason == reason for row in slopes)
        notes.append(f"{reason}" if alone else f"{', '.join(names)}: {reason}")
    return notes


def _groups(rows: Sequence[Row], axis: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in nothing but their point."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        assert row.workload is not None
        same = replace(row, driver=None, threads=None if axis == "threads" else row.threads)
        work = replace(row.workload, **({} if axis == "threads" else {_FIELD[axis]: 1}))
        groups.setdefault((row.metric, *cell(replace(same, workload=work))), []).append(row)
    return groups


_FIELD = {"prompt": "prompt_tokens", "decode": "decode_tokens", "batch": "batch"}


def _cell(row: Row | None, figure: Callable[[Row], str]) -> str:
    return "" if row is None else figure(row)
