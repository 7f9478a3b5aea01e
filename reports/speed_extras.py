"""What a table of speeds says beside the speeds, where the rows know it: roofline, slow steps, blocks left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from harness.rows import Row
from reports.digits import seconds
from reports.row_fields import left_out

ROOFLINE, SLOW_STEP = "roofline", "p99 step"


def extra_columns(cells: Sequence[Sequence[Row]], shown: Sequence[bool]) -> dict[str, list[str]]:
    """Header -> a text for each cell; only columns that some cell fills.

    shown  of each cell, whether its speeds are: else it has no figures here either

    ``roofline``: decode's share of read bandwidth, and prefill's of the matrix rate. ``p99 step``: of 100 decode
    steps one takes longer.
    """
    decodes = [_row(cell, "decode") if keep else None for cell, keep in zip(cells, shown, strict=True)]
    prefills = [_row(cell, "prefill") if keep else None for cell, keep in zip(cells, shown, strict=True)]
    found = {
        ROOFLINE: [_shares(*pair) for pair in zip(prefills, decodes, strict=True)],
        SLOW_STEP: [_slow(row) for row in decodes],
    }
    return {name: texts for name, texts in found.items() if any(texts)}


def extra_notes(cells: Sequence[Sequence[Row]]) -> list[str]:
    """What the roofline is of; how many blocks were left out for a disturbance, why; what rests on disturbed ones."""
    known = any(row.roofline_fraction is not None for cell in cells for row in cell)
    rows = [row for cell in cells for row in cell if row.blocks]
    total = sum(len(row.blocks or ()) for row in rows)
    out = sum(map(left_out, rows))
    notes = ["roofline: prefill as a share of the matrix rate / decode of read bandwidth"] if known else []
    if out:
        why = Counter(_reason(block) for row in rows for block in row.blocks or () if block.get("left_out"))
        reasons = ", ".join(f"{n} {reason}" for reason, n in why.most_common())
        notes.append(f"{out} of {total} blocks left out, taken while the machine did something else: {reasons}")
    used = [row for row in rows if not left_out(row) and any(block.get("disturbed") for block in row.blocks or ())]
    if used:
        named = Counter(f"{row.backend} {row.scheme} {row.metric.replace('_', ' ')}" for row in used)
        names = ", ".join(list(named)[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        notes.append(f"disturbed throughout, so nothing could be left out: {names}; measure again when it is quiet")
    return notes


def _row(cell: Sequence[Row], metric: str) -> Row | None:
    return next((row for row in cell if row.metric == metric and row.value is not None), None)


def _shares(prefill: Row | None, decode: Row | None) -> str:
    """``12/68 %``: prefill and decode, in the order of their columns; ``-`` for the one that is not known."""
    found = [None if row is None else row.roofline_fraction for row in (prefill, decode)]
    if found == [None, None]:
        return ""
    return "/".join("-" if share is None else f"{100 * share:.0f}" for share in found) + " %"


def _slow(row: Row | None) -> str:
    found = None if row is None else (row.percentiles or {}).get("p99")
    return seconds(found) if isinstance(found, (int, float)) else ""


def _reason(block: Mapping[str, object]) -> str:
    return str(block.get("disturbed") or "disturbed")
