"""Columns and notes of figures that were not measured here: their place under the roofline, and ours beside them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.rows import Row
from reports.measuring_notes import percent


def columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Header -> a cell for each row, of those columns that any row has something for."""
    found = {
        "threads": ["" if row.threads is None else str(row.threads) for row in rows],
        "range": [_range(row) for row in rows],
        "of peak": [of_peak(row) for row in rows],
        "measured here": [ours_text(row) for row in rows],
    }
    return {header: cells for header, cells in found.items() if any(cells)}


def notes(rows: Sequence[Row]) -> list[str]:
    """Sources, what a prediction assumes, and why a figure of ours is no answer to a claim, each once."""
    sources = [f"source: {row.extra['source']}" for row in rows if row.extra.get("source")]
    assumed = [f"{row.scheme} {row.metric}: {row.reason}" for row in rows if row.kind == "predicted" and row.reason]
    alone = [row for row in rows if row.kind == "published" and row.reason and row.reason.startswith("not stated")]
    stated = [f"{row.metric}: {row.reason}" for row in alone]
    apart = [
        f"{row.scheme} {row.metric}: {ours['why']}" for row in rows if (ours := row.extra.get("ours")) and ours["why"]
    ]
    return list(dict.fromkeys([*assumed, *stated, *apart, *sources]))


def _range(row: Row) -> str:
    ends = row.extra.get("range")
    return "" if not ends else "–".join(f"{end:.0f}" if end >= 100 else f"{end:.3g}" for end in ends)


def of_peak(row: Row) -> str:
    """``51 %`` of what the hardware's data sheet allows; empty where that is not known."""
    return "" if row.roofline_fraction is None else f"{100 * row.roofline_fraction:.2g} %"


def ours_text(row: Row) -> str:
    """``75.1 ±1%: exceeded``; where the two cannot be compared, ``75.1 ±1%: another machine``."""
    ours = row.extra.get("ours")
    if not ours:
        return ""
    value, interval = ours["value"], ours["interval"]
    half = "" if interval is None else f" {percent(max(interval[1] - value, value - interval[0]) / value)}%"
    word = ours["decision"] or str(ours["why"]).partition(":")[0]
    return f"{value:.3g}{half}: {word}"
