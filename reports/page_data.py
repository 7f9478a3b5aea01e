"""Cells -> the plain records that the HTML page holds: what its rows show, sort by and unfold. No markup here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.rows import Row
from reports.cell_history import Points
from reports.cells import QUALITY, Cell, machine_of, scheme_class
from reports.digits import small
from reports.points import frontier_point, in_unit, roofline_points
from reports.row_fields import blocks_text, excluded_samples, percentiles_text, revision, roofline_text

#: More samples than this are thinned evenly, and the page says so.
MOST_SAMPLES = 200

#: Metrics a cell's details show, in this order.
_TIMES = ("prefill", "decode", "time_to_first_token", "first_call", "load")

#: Metrics that have a place of their own; any other is listed with its figure.
_KNOWN = (*_TIMES, *QUALITY, "parity", "state_parity")


def record(cell: Cell, i: int, colour: int, history: Mapping[str, Points]) -> dict[str, Any]:
    """One cell; numbers are what is sorted by and drawn, texts what is read."""
    row = cell.first
    return {
        "i": i,
        "colour": colour,
        "kind": row.kind,
        "hardware": cell.hardware,
        "model": row.model,
        "backend": row.backend,
        "scheme": row.scheme,
        "cls": scheme_class(row),
        "threads": row.threads,
        "workload": workload(row),
        "verdict": cell.verdict or "unknown",
        "judged": cell.judged,
        "prefill": _speed(cell.speed("prefill")),
        "decode": _speed(cell.speed("decode")),
        "kl": _value(cell.quality_of("kl_divergence")),
        "points": roofline_points(cell),
        "frontier": frontier_point(cell),
        "facts": facts(cell),
        "times": [_times(found) for metric in _TIMES if (found := _shown(cell, metric)) is not None],
        "history": history,
    }


def workload(row: Row) -> str:
    """``256 → 64``: prompt and decode tokens, the batch if it is more than one."""
    if row.workload is None:
        return ""
    batch = f" × {row.workload.batch}" if row.workload.batch > 1 else ""
    return f"{row.workload.prompt_tokens} → {row.workload.decode_tokens}{batch}"


def facts(cell: Cell) -> list[tuple[str, str]]:
    """What the details list, as name and text; what is not known is not listed."""
    row = cell.first
    gate = next((r for r in cell.rows if r.metric in ("parity", "state_parity") and r.error is not None), None)
    found: list[tuple[str, Any]] = [
        ("machine", machine_of(row)),
        ("weights", "synthetic" if row.synthetic else None),
        ("device", row.device),
        ("version", row.backend_version),
        ("arithmetic", row.arithmetic),
        ("driver", next((r.driver for r in cell.rows if r.driver), None)),
        ("isolated", None if row.isolated is None else "own process" if row.isolated else "in process"),
        ("CPUs", row.cpus),
        ("parity", None if gate is None or gate.reason else parity_text(gate)),
        ("revision", revision(row)),
        ("measured", f"{row.time or 'time unknown'}, run {row.run}" if row.run else row.time),
        ("source", row.extra.get("source")),
        *((metric.replace("_", " "), quality_text(cell, metric)) for metric in QUALITY),
        *((r.metric.replace("_", " "), more_text(r)) for r in cell.rows if r.metric not in _KNOWN),
        *((r.metric.replace("_", " "), r.reason) for r in reasons(cell) if r.metric in _KNOWN),
        ("command", row.command),
    ]
    return [(name, str(text)) for name, text in found if text not in (None, "")]


def more_text(row: Row) -> str:
    """A figure of a metric that has no place of its own, with interval, unit and reason."""
    if row.value is None:
        return row.reason or row.verdict or ""
    interval = f" ({row.interval[0]:.3g} to {row.interval[1]:.3g})" if row.interval else ""
    return f"{row.value:.3g}{interval} {row.unit}" + (f"; {row.reason}" if row.reason else "")


def reasons(cell: Cell) -> list[Row]:
    """A row for each reason, the same reason once."""
    found: dict[str, Row] = {}
    for row in cell.rows:
        if row.reason:
            found.setdefault(row.reason, row)
    return list(found.values())


def parity_text(row: Row) -> str:
    """``worst position error 2.1e-6 ≤ bound 6.6e-6``."""
    if row.error is None or row.bound is None:
        return ""
    relation = "≤" if row.error <= row.bound else ">"
    return f"{row.statistic or 'error'}: {small(row.error)} {relation} {small(row.bound)} (bound)"


def quality_text(cell: Cell, metric: str) -> str | None:
    """A figure of quality with interval and unit, and where it was measured if that was elsewhere."""
    row = cell.quality_of(metric)
    if row is None or row.value is None:
        return None
    tiny = metric == "kl_divergence"
    text = small(row.value) if tiny else f"{row.value:.4g}"
    if row.interval:
        low, high = (small(end) if tiny else f"{end:.4g}" for end in row.interval)
        text += f" ({low} to {high})"
    elsewhere = machine_of(row) != machine_of(cell.first) or row.hardware != cell.first.hardware
    return f"{text} {row.unit}" + (f", measured on {row.hardware}" if elsewhere else "")


def _shown(cell: Cell, metric: str) -> Row | None:
    """A timed row whose figure may be shown."""
    row = cell.row(metric)
    if metric in ("prefill", "decode"):
        return cell.speed(metric)
    return row if row is not None and row.value is not None and not cell.judged else None


def _speed(row: Row | None) -> dict[str, Any] | None:
    if row is None or row.value is None:
        return None
    low, high = row.interval or (None, None)
    return {"v": row.value, "lo": low, "hi": high, "n": len(row.samples or ())}


def _value(row: Row | None) -> float | None:
    return None if row is None else row.value


def _times(row: Row) -> dict[str, Any]:
    """A quantity with its raw samples in its own unit, in the order in which they were taken."""
    samples, out = in_unit(row), excluded_samples(row)
    drawn = _thinned(len(samples))
    low, high = row.interval or (None, None)
    return {
        "metric": row.metric.replace("_", " "),
        "unit": row.unit,
        "v": row.value,
        "lo": low,
        "hi": high,
        "samples": [float(f"{samples[i]:.6g}") for i in drawn],
        "out": [at for at, i in enumerate(drawn) if i in out],
        "n": len(samples),
        "stopped": row.stopped or "",
        "blocks": blocks_text(row),
        "steps": percentiles_text(row),
        "roofline": roofline_text(row),
    }


def _thinned(n: int) -> list[int]:
    """Positions of the samples that are drawn, evenly among all."""
    if n <= MOST_SAMPLES:
        return list(range(n))
    return [round(i * (n - 1) / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)]
