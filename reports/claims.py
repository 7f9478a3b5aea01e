"""Columns and notes of figures that were not measured here: their place under the roofline, and ours beside them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.rows import Row


def columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Header -> a cell for each row, of those columns that any row has something for."""
    found = {
        "threads": ["" if row.threads is None else str(row.threads) for row in rows],
        "range": [_range(row) for row in rows],
        "of peak": [_percent(row.roofline_fraction) for row in rows],
        "measured here": [_ours(row) for row in rows],
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


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2g} %"


def _ours(row: Row) -> str:
    """``75.1 ±1%: exceeded``; where the two cannot be compared, ``75.1 ±1%: another machine``."""
    ours = row.extra.get("ours")
    if not ours:
        return ""
    value, interval = ours["value"], ours["interval"]
    half = "" if interval is None else f" ±{100 * max(interval[1] - value, value - interval[0]) / value:.1g}%"
    word = ours["decision"] or str(ours["why"]).partition(":")[0]
    return f"{value:.3g}{half}: {word}"
