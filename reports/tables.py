"""Rows -> the prefill/decode table, one line a cell, as text for people or as data for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.rows import FIELDS, Row, cell
from reports.claims import columns, notes
from reports.digits import number as number
from reports.digits import seconds
from reports.digits import small as small
from reports.measuring_notes import half_width, measuring_notes, percent, precision_notes
from reports.speed_extras import ROOFLINE, SLOW_STEP, extra_columns, extra_notes
from reports.sweep_table import SweepLines, sweep_lines

#: Fields that are one line of raw data too many for a spreadsheet; the JSON formats have them.
_NOT_IN_CSV = (
    "samples",
    "steps",
    "blocks",
    "warmup",
    "percentiles",
    "sampling",
    "config",
    "hardware_detail",
    "interval",
    "workload",
    "first_bad",
    "checks",
    "quality",
)


#: Columns of text; the others are numbers and end at their right edge.
_LEFT = ("hardware", "model", "backend", "scheme", "parity", "metric", "kind")


@dataclass(frozen=True)
class Table:
    """Header, lines of equal length, a title that says what all lines share, and notes below.

    left    columns that are aligned at their left edge
    spare   columns to do without where there is no room, the first one first
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    left: tuple[str, ...] = _LEFT
    spare: tuple[str, ...] = (SLOW_STEP, "1st token", "memory", ROOFLINE, "error ≤ bound")


def speed_table(rows: Sequence[Row]) -> Table:
    """One line per cell: parity with error and bound, prefill, decode, first token, memory.

    A cell that did not pass shows its verdict where a speed would stand. Columns whose value is the
    same in every line move to the title.
    """
    cells = sorted(group_cells(rows), key=lambda group: verdict_of(group) in _NOT_RUN)  # what ran comes first
    shared, keys = shared_by(cells)
    timed = any(row.metric in ("prefill", "decode") for row in rows)
    header = (*keys, "parity", "error ≤ bound")
    if timed:
        header = (*header, "prefill tok/s", "decode tok/s", "1st token", "memory")
    more = extra_columns(cells, [_has_speed(group) for group in cells]) if timed else {}
    lines = [
        (*(shared_key(group, key) for key in keys), *_figures(group, timed), *(texts[i] for texts in more.values()))
        for i, group in enumerate(cells)
    ]
    return Table(
        title_of(rows, shared),
        (*header, *more),
        tuple(lines),
        (*extra_notes(cells), *measuring_notes(cells), *_notes(cells)),
    )


def tables(rows: Sequence[Row]) -> list[Table]:
    """The speed table of what was judged, and tables of their own for what others' programs printed or published."""
    judged = [row for row in rows if row.kind == "measured"]
    elsewhere = [row for row in rows if row.kind == "recorded" and row.verdict]
    printed = [row for row in rows if row.kind == "recorded" and not row.verdict]
    claimed = [row for row in rows if row.kind == "published"]
    foreseen = [row for row in rows if row.kind == "predicted"]
    sweep = sweep_lines(judged, speed)
    found = [speed_table(judged)] if judged and sweep is None else []
    found += [] if sweep is None else [sweep_table(judged, sweep)]
    found += [_recorded(elsewhere)] if elsewhere else []
    found += [claims_table(printed, "recorded figures, printed by other programs; parity unknown")] if printed else []
    found += [claims_table(claimed, "published figures, not measured here")] if claimed else []
    return found + ([claims_table(foreseen, "predicted from the roofline, measured nowhere")] if foreseen else [])


def _recorded(rows: Sequence[Row]) -> Table:
    table = speed_table(rows)
    return replace(table, title=f"recorded, not measured in this run · {table.title}")


def sweep_table(rows: Sequence[Row], sweep: SweepLines) -> Table:
    """Speeds at each point; a cell that did not pass shows its verdict there."""
    cells = group_cells(rows)
    shared, _ = shared_by(cells)
    if sweep.axis == "threads":
        shared.pop("threads", None)
    title = f"{title_of([row for row in rows if row.metric == 'load'], shared)} · sweep over {sweep.axis}"
    noted = (*sweep.notes, *precision_notes(cells), *_notes(cells))
    return Table(title, sweep.header, sweep.lines, noted, (*_LEFT, "tok/s"))


def claims_table(rows: Sequence[Row], title: str) -> Table:
    """Recorded, published and predicted rows: labelled as such, with their source, and without a verdict.

    What part of the hardware's peak a figure is, and our own figure of its cell, have columns where there are any.
    """
    more = columns(rows)
    lines = [
        (
            *(row.hardware, row.backend, row.model, row.scheme, row.metric, f"{number(row.value)} {row.unit}"),
            *(cells[i] for cells in more.values()),
            row.kind,
        )
        for i, row in enumerate(rows)
    ]
    header = ("hardware", "backend", "model", "scheme", "metric", "value", *more, "kind")
    return Table(title, header, tuple(lines), tuple(notes(rows)), spare=("hardware", "threads"))


def markdown(table: Table) -> str:
    """GitHub-flavoured Markdown."""
    rule = ["---"] * len(table.header)
    body = [table.header, rule, *table.lines]
    text = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in body)
    notes = "".join(f"\n- {note}" for note in table.notes)
    return f"**{table.title}**\n\n{text}\n" + (f"{notes}\n" if notes else "")


def to_csv(rows: Sequence[Row]) -> str:
    """Every row, one line each, raw samples left out."""
    out = io.StringIO()
    names = [name for name in FIELDS if name not in _NOT_IN_CSV]
    names += ["prompt_tokens", "decode_tokens", "interval_low", "interval_high", "source"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        record: dict[str, Any] = row.to_dict()
        record.update(record.get("workload") or {})
        record["interval_low"], record["interval_high"] = row.interval or ("", "")
        writer.writerow(record)
    return out.getvalue()


def summary(rows: Sequence[Row]) -> str:
    """One cell in one line: ``PASS, prefill 9100 tok/s, decode 610 tok/s``."""
    by_metric = {row.metric: row for row in rows}
    verdict = verdict_of(rows)
    divergence = by_metric.get("kl_divergence")
    if verdict == "UNSUPPORTED" and divergence is not None and divergence.value is not None:
        verdict = f"no codec, KL {small(divergence.value)}"
    why = next((row.reason for row in rows if row.verdict == verdict and row.reason), None)
    if verdict != "PASS" and why:
        return f"{verdict}: {why}"
    speeds = [m for m in ("prefill", "decode") if m in by_metric and by_metric[m].value is not None]
    return ", ".join([verdict, *(f"{m} {number(by_metric[m].value)} tok/s" for m in speeds)])


def group_cells(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one cell together, in the order in which the cells first appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.run, *cell(replace(row, driver=None)))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


#: What a row says of several cells together is no verdict on the one that it stands with.
_ABOUT_OTHERS = ("length_slope",)

#: Verdicts of cells that never started.
_NOT_RUN = ("UNAVAILABLE", "UNSUPPORTED")
#: Verdicts of processes that ended before their cell did.
_ENDED = ("CRASHED", "TIMEOUT")

_KEYS = ("hardware", "model", "backend", "scheme", "threads")


def shared_by(cells: Sequence[Sequence[Row]]) -> tuple[dict[str, str], list[str]]:
    """What all cells have in common, and the keys that need a column; backend and scheme always do.

    A cell without any figure that leaves a key open, as a refused one does, has it in common with any.
    """
    held = [group for group in cells if any(row.value is not None for row in group)]
    values = {key: {shared_key(group, key) for group in cells} - {""} for key in _KEYS}
    open_keys = {key for key in _KEYS if values[key] and not all(shared_key(group, key) for group in held)}
    columns = [key for key in _KEYS if key in ("backend", "scheme") or len(values[key]) > 1 or key in open_keys]
    return {key: next(iter(values[key])) for key in _KEYS if key not in columns and values[key]}, columns


def shared_key(group: Sequence[Row], key: str) -> str:
    """A key of a cell as text; empty where it has none."""
    value = getattr(group[0], key)
    return "" if value is None else str(value)


def title_of(rows: Sequence[Row], shared: dict[str, str]) -> str:
    """What all cells have in common, in one line."""
    words = []
    if "model" in shared:
        synthetic = any(row.synthetic for row in rows)
        words.append(f"model {shared['model']}" + (" (synthetic weights)" if synthetic else ""))
    detail = next((row.hardware_detail for row in rows if row.hardware_detail), None)
    if "hardware" in shared:
        name = str(dict(detail).get("name", "")) if detail else ""
        words.append(shared["hardware"] + (f" ({name})" if name not in ("", shared["hardware"]) else ""))
    if shared.get("threads"):
        words.append(f"{shared['threads']} thread" + "s" * (shared["threads"] != "1"))
    work = {row.workload for row in rows if row.workload is not None and row.metric in ("prefill", "decode")}
    if len(work) == 1:
        only = work.pop()
        words.append(f"prompt {only.prompt_tokens}, decode {only.decode_tokens} tokens")
    return " · ".join(words) or "results"


def _figures(group: Sequence[Row], timed: bool) -> tuple[str, ...]:
    by_metric = {row.metric: row for row in group}
    verdict = verdict_of(group)
    gate = [row for row in group if row.metric in ("parity", "state_parity")]
    ended = verdict in _ENDED and bool(gate)  # it was judged before it died: that verdict stands
    shown = verdict_of(gate) if ended else verdict
    judged = (shown, _error(next((row for row in group if row.verdict == shown and row.error is not None), None)))
    divergence = by_metric.get("kl_divergence")
    if verdict == "UNSUPPORTED" and divergence is not None:
        judged = ("no codec", f"KL {small(divergence.value)}" if divergence.value is not None else "")
        verdict = "PASS"  # of what could be judged
    if not timed:
        return judged
    if verdict in _NOT_RUN:
        return (*judged, "-", "-", "", "")
    if verdict != "PASS" and not ended:
        return (*judged, verdict, verdict, "", "")
    peak = max((row.peak_bytes for row in group if row.peak_bytes is not None), default=None)
    first = by_metric.get("time_to_first_token")
    return (
        *judged,
        speed(by_metric.get("prefill")) or ended * verdict,
        speed(by_metric.get("decode")) or ended * verdict,
        "" if first is None or first.value is None else seconds(first.value),
        "" if peak is None else _bytes(peak),
    )


def verdict_of(group: Sequence[Row]) -> str:
    """The worst verdict of the group: a cell passes if all of it does."""
    order = ("CRASHED", "TIMEOUT", "FAIL", "UNAVAILABLE", "UNSUPPORTED", "PASS")
    found = {row.verdict for row in group if row.metric not in _ABOUT_OTHERS}
    return next((verdict for verdict in order if verdict in found), "")


def _has_speed(group: Sequence[Row]) -> bool:
    return verdict_of(group) == "PASS" or any(row.metric == "kl_divergence" for row in group)


def _error(row: Row | None) -> str:
    if row is None or row.error is None or row.bound is None:
        return ""
    relation = "≤" if row.error <= row.bound else ">"
    return f"{small(row.error)} {relation} {small(row.bound)}"


def speed(row: Row | None) -> str:
    """``1234 ±2%``: the interval's wider half; a value without interval stands alone."""
    if row is None or row.value is None:
        return "" if row is None else str(row.verdict)
    text = number(row.value)
    half = half_width(row)
    return text if half is None else f"{text} {percent(half)}%"


def _bytes(value: int) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


#: Parts of the reason of a passing row that belong below the table.
_NOTED = ("looser", "varied", "itself only", "only gross faults")


def _notes(cells: Sequence[Sequence[Row]]) -> list[str]:
    """Why cells have no figures, and what else was noticed: each reason once, with the schemes it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in (row for group in cells for row in group if row.metric not in _ABOUT_OTHERS):
        if row.verdict not in ("PASS", None) and row.reason and not row.reason.startswith("not timed"):
            found.setdefault((row.backend, f"{row.verdict}: {row.reason}"), []).append(row.scheme)
        elif row.verdict == "PASS" and row.reason and any(word in row.reason for word in _NOTED):
            found.setdefault((row.backend, row.reason), []).append(row.scheme)
    return [f"{backend} {', '.join(dict.fromkeys(schemes))}: {text}" for (backend, text), schemes in found.items()]
