"""Rows -> runs of each cell and metric, which are independent, and each cell's verdict.

What one process measures shares its memory layout and its minute: blocks of it say nothing of how the next process
will differ, so a run is worth one value, the median of its blocks. A block that has a process of its own (``run
--fresh``, ``ab``) is a run. A block (``blocks``: start and count; without them the whole row) is worth the mean of its
samples' logarithms. Blocks that the row leaves out as disturbed are left out, and counted. Runs that follow each other
without a pause are no more independent than blocks are, and count as one (:mod:`reports.verdict.spacing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.rows import Row, identity
from reference.errors import InputError
from reports.verdict import spacing
from reports.verdict.pairing import Key, key_of
from reports.verdict.parity import Verdict, over_runs
from reports.verdict.spacing import Span

#: What is compared: speeds, and the time to the first token where it is asked for.
SPEEDS = ("prefill", "decode")
METRICS = (*SPEEDS, "time_to_first_token")

#: Verdicts of cells that have a speed.
_TIMED = ("PASS", "UNSUPPORTED", None)


@dataclass
class Series:
    """One cell and metric in one file.

    runs      logarithms of the block times in ns of each run, in order of time
    spans     when each of them began and ended
    left_out  blocks that do not count, being disturbed
    """

    row: Row
    runs: dict[tuple[Any, ...], list[float]] = field(default_factory=dict)
    spans: dict[tuple[Any, ...], Span] = field(default_factory=dict)
    left_out: int = 0

    @property
    def times(self) -> np.ndarray:
        """``(runs,)``: the median of each run's blocks."""
        return np.array([float(np.median(logs)) for logs in self.runs.values()])

    @property
    def apart(self) -> np.ndarray:
        """``(sittings,)``: the same of runs with pauses between them; those without count as one."""
        return spacing.apart(self.times, list(self.spans.values()))


@dataclass(frozen=True)
class File:
    """What one file says.

    series    (cell, metric) -> its blocks              verdicts  cell -> the worst verdict of its runs
    rows      cell -> any row of it, for its names      doubled   rows left out as copies of others
    """

    series: Mapping[tuple[Key, str], Series]
    verdicts: Mapping[Key, Verdict]
    rows: Mapping[Key, Row]
    doubled: int


def read_rows(rows: Sequence[Row], metrics: Sequence[str] = SPEEDS) -> File:
    """Measured rows only; others carry no samples that could be compared."""
    own: dict[tuple[Any, ...], Row] = {}
    measured = [row for row in rows if row.kind == "measured"]
    for row in measured:
        own.setdefault((*identity(row), key_of(row)), row)
    spans = _spans(list(own.values()))
    series: dict[tuple[Key, str], Series] = {}
    judged: dict[Key, list[Row]] = {}
    known: dict[Key, Row] = {}
    for row in sorted(own.values(), key=lambda row: row.time or ""):
        key = key_of(row)
        known.setdefault(key, row)
        if row.verdict is not None:
            judged.setdefault(key, []).append(row)
        if row.metric in metrics and row.samples and row.verdict in _TIMED:
            found = series.setdefault((key, row.metric), Series(row))
            _add(found, row, spans)
    verdicts = {key: over_runs(own) for key, own in judged.items()}
    return File(series, verdicts, known, len(measured) - len(own))


def _add(series: Series, row: Row, spans: Mapping[tuple[Any, ...], Span]) -> None:
    """The blocks of one more row; ``spans``: when its run measured its cell."""
    apart = _processes_apart(row)
    samples = np.asarray(row.samples, dtype=float)
    if not (samples > 0).all():
        raise InputError(f"{row.backend} {row.scheme}, {row.metric}: a sample is not above 0 ns; measure it again")
    for start, count, disturbed, when in _blocks(row, len(samples)):
        if disturbed:
            series.left_out += 1
        else:
            run = (row.run, row.time, start) if apart else (row.run,)
            series.runs.setdefault(run, []).append(float(np.log(samples[start : start + count]).mean()))
            series.spans[run] = _both(series.spans.get(run), when or spans[key_of(row), row.run])


def _processes_apart(row: Row) -> bool:
    """Whether each block of a row was measured by a process of its own."""
    return bool((row.sampling or {}).get("fresh")) or "ab" in row.extra


def _blocks(row: Row, total: int) -> list[tuple[int, int, bool, Span | None]]:
    """Start, count, whether it is to be left out, and when it was taken, of each block of a row."""
    if not row.blocks:
        return [(0, total, False, None)]
    found = []
    for block in row.blocks:
        try:
            start, count, when = int(block["start"]), int(block["count"]), _when(block)
        except (TypeError, KeyError, ValueError):
            raise InputError(f"{row.backend} {row.scheme}, {row.metric}: a block without start and count") from None
        if not 0 <= start <= start + count <= total:
            raise InputError(
                f"{row.backend} {row.scheme}, {row.metric}: a block of samples {start} to {start + count - 1}; "
                f"there are {total}"
            )
        if count:
            found.append((start, count, bool(block.get("left_out")), when))
    return found


def _when(block: Mapping[str, Any]) -> Span | None:
    """When a block was taken, where it says."""
    if not block.get("time"):
        return None
    began, lasted = spacing.seconds(str(block["time"])), block.get("seconds") or 0.0
    if not isinstance(lasted, (int, float)) or not lasted >= 0:
        raise InputError(f"a block has {lasted!r} seconds; a number of at least 0 is needed")
    return began, began + lasted


def _spans(rows: Sequence[Row]) -> dict[tuple[Any, ...], Span]:
    """(cell, run) -> from when to when it was measured, as its rows and their blocks say."""
    found: dict[tuple[Any, ...], Span] = {}
    for row in rows:
        written, at = spacing.seconds(row.time or ""), (key_of(row), row.run)
        samples = sum(row.samples or ()) / 1e9 if row.metric in METRICS else 0.0
        found[at] = _both(found.get(at), (written - samples, written))
        for block in row.blocks or ():
            found[at] = _both(found[at], _when(block) or found[at])
    return found


def _both(known: Span | None, more: Span) -> Span:
    """The time that holds both."""
    return more if known is None else (min(known[0], more[0]), max(known[1], more[1]))
