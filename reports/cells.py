"""Rows -> cells: what each backend × scheme × hardware × model × workload came to, its newest run and those before.

A table, a page and a picture show cells. Rows of different kinds never share one; two machines under one
short hardware name are two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.rows import Row, cell
from reference.schemes import SCHEMES
from reports.tables import verdict_of

#: Verdicts of cells that never started, and of processes that ended before their cell did.
NOT_RUN = ("UNAVAILABLE", "UNSUPPORTED")
ENDED = ("CRASHED", "TIMEOUT")

SPEEDS = ("prefill", "decode")
QUALITY = ("kl_divergence", "top1_agreement", "top5_agreement", "perplexity", "bits_per_byte", "lambada_accuracy")


@dataclass(frozen=True)
class Cell:
    """One cell of one kind.

    hardware  the short name, with the machine's full name where the report holds several under one
    rows      of its newest run
    earlier   those of the runs before, oldest first
    quality   rows that say how far its scheme and backend are from the fp32 weights, measured with this cell or,
              in another run, on the same backend, scheme and model
    """

    hardware: str
    rows: tuple[Row, ...]
    earlier: tuple[tuple[Row, ...], ...] = ()
    quality: tuple[Row, ...] = ()

    @property
    def first(self) -> Row:
        """A row that says what the cell is; the timed ones know most."""
        return next((row for row in self.rows if row.metric in SPEEDS), self.rows[0])

    def row(self, metric: str) -> Row | None:
        """Its row of a metric, from its own run."""
        return next((row for row in reversed(self.rows) if row.metric == metric), None)

    def quality_of(self, metric: str) -> Row | None:
        """Its row of a metric of quality; the newest one."""
        return next((row for row in reversed(self.quality) if row.metric == metric and row.value is not None), None)

    @property
    def verdict(self) -> str:
        """PASS where every row passes; empty for what was never judged."""
        return verdict_of(self.rows)

    @property
    def judged(self) -> str:
        """What stands where a speed would: empty if its speeds may be shown, else the verdict.

        A cell whose scheme has no codec is UNSUPPORTED in kernel parity and held against the fp32 weights instead;
        its speeds stand if that passed.
        """
        if self.first.kind != "measured" and not self.verdict:
            return ""
        divergence = self.row("kl_divergence")
        if self.verdict == "UNSUPPORTED" and divergence is not None and divergence.value is not None:
            return "" if all(row.verdict in ("PASS", "UNSUPPORTED") for row in self.rows) else self.verdict
        return "" if self.verdict == "PASS" else self.verdict or "not judged"

    def speed(self, metric: str) -> Row | None:
        """Its row of prefill or decode, where that may be shown as a speed."""
        row = self.row(metric)
        passed = not self.judged or (self.verdict in ENDED and row is not None and row.verdict == "PASS")
        return row if passed and row is not None and row.value is not None else None


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Cells in the order in which they first appear.

    A refusal is left out where the same was measured later, a PASS without speeds where a timed cell says as much.
    """
    rows = list(rows)
    several = _ambiguous(rows)
    groups: dict[tuple[Any, ...], dict[str | None, list[Row]]] = {}
    for row in rows:
        if not _is_quality_only(row):
            groups.setdefault(_key(row), {}).setdefault(row.run, []).append(row)
    quality = _quality(rows)
    found = []
    for runs in groups.values():
        ordered = sorted(runs.values(), key=_age)
        newest = tuple(ordered[-1])
        known = (*quality.get(_subject(newest[0]), ()), *(row for row in newest if row.metric in QUALITY))
        earlier = tuple(tuple(group) for group in ordered[:-1])
        found.append(Cell(_hardware(newest[0], several), newest, earlier, known))
    found += _alone(rows, {_subject(each.first) for each in found}, several)
    return _folded(_without_superseded(found))


def ordered(found: Iterable[Cell]) -> list[Cell]:
    """For reading: model by model and machine by machine, the fastest decode first, what has no speed last."""

    def place(cell: Cell) -> tuple[Any, ...]:
        row, speed = cell.first, cell.speed("decode") or cell.speed("prefill")
        work = (
            (row.workload.prompt_tokens, row.workload.decode_tokens, row.workload.batch) if row.workload else (0, 0, 0)
        )
        timed = speed is not None and speed.value is not None
        return (cell.hardware, row.model, not timed, work, -(speed.value or 0.0) if speed is not None else 0.0)

    return sorted(found, key=place)


def _key(row: Row) -> tuple[Any, ...]:
    """What is one cell over all runs: rows of a speed and of its verdict share it."""
    machine = machine_of(row)
    # What others printed or published has a line for each claim, whatever it leaves unsaid.
    claim = (row.metric, row.value, str(row.extra.get("source"))) if row.kind in ("published", "predicted") else ()
    return (row.kind, machine, row.model_sha256, *cell(replace(row, driver=None)), *claim)


def _age(run: Sequence[Row]) -> tuple[bool, str]:
    """Order of runs of one cell; one in which it was not available measured nothing and replaces no other."""
    return (verdict_of(run) != "UNAVAILABLE", max(row.time or "" for row in run))


def machine_of(row: Row) -> str:
    """Full name of the machine a row was measured on; empty where it is not said."""
    return str((row.hardware_detail or {}).get("name", ""))


def scheme_class(row: Row) -> str:
    """The class that tables align schemes by, also of a row that ended before it knew; empty for an unknown scheme."""
    known = SCHEMES.get(row.scheme)
    return row.scheme_class or (known.scheme_class if known else "")


def _subject(row: Row) -> tuple[Any, ...]:
    """What a divergence is of, wherever and however long it was measured."""
    return (row.backend, row.scheme, row.model, row.model_sha256)


def _is_quality_only(row: Row) -> bool:
    """A row of the command ``quality``: on a text, which is no workload of a speed."""
    return row.quality is not None


def _quality(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.time or ""):
        if _is_quality_only(row) and row.metric in QUALITY and row.verdict != "FAIL":
            found.setdefault(_subject(row), []).append(row)
    return found


def _alone(rows: Sequence[Row], known: set[tuple[Any, ...]], several: set[str]) -> list[Cell]:
    """Rows of quality that no cell is there for: a cell of their own, so that nothing read is not shown."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if _is_quality_only(row) and _subject(row) not in known:
            groups.setdefault((row.kind, machine_of(row), *cell(row)), []).append(row)
    return [Cell(_hardware(own[0], several), tuple(own), (), tuple(own)) for own in groups.values()]


def _folded(found: Sequence[Cell]) -> list[Cell]:
    """Without cells that only passed, where a timed cell of the same machine passed too."""

    def place(cell: Cell) -> tuple[Any, ...]:
        return (cell.first.kind, machine_of(cell.first), cell.first.device, *_subject(cell.first))

    timed = {place(each) for each in found if any(each.speed(metric) for metric in SPEEDS)}
    return [
        each
        for each in found
        if each.verdict != "PASS" or place(each) not in timed or any(each.row(metric) for metric in SPEEDS)
    ]


def _ambiguous(rows: Sequence[Row]) -> set[str]:
    """Short hardware names under which more than one machine was measured; a claim is of a name."""
    names: dict[str, set[str]] = {}
    for row in rows:
        if machine_of(row) and row.kind in ("measured", "recorded"):
            names.setdefault(row.hardware, set()).add(machine_of(row))
    return {name for name, machines in names.items() if len(machines) > 1}


def _hardware(row: Row, several: set[str]) -> str:
    machine = machine_of(row)
    return f"{row.hardware} ({machine})" if row.hardware in several and machine else row.hardware


def _without_superseded(found: Sequence[Cell]) -> list[Cell]:
    """Without refusals (which know no device or workload) of what ran in a later run."""

    def named(cell: Cell) -> tuple[str, str, str, str]:
        row = cell.first
        return (row.hardware, row.backend, row.model, row.scheme)

    ran: dict[tuple[str, str, str, str], str] = {}
    for each in found:
        if each.verdict not in NOT_RUN and each.first.kind == "measured":
            ran[named(each)] = max(ran.get(named(each), ""), each.first.time or "")
    return [
        each
        for each in found
        if not (each.verdict in NOT_RUN and each.first.workload is None)
        or (each.first.time or "") >= ran.get(named(each), "")
    ]
