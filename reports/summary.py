"""What a report comes to, in a few lines that stand above its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from reports.cells import SPEEDS, Cell
from reports.digits import number
from reports.recommend import workload_of

#: Reasons of failures that are told one by one; more are counted.
_TOLD = 5


def headline(cells: Sequence[Cell]) -> list[str]:
    """How many cells of each kind, how they were judged, what failed, what is fastest, workload by workload."""
    measured = [cell for cell in cells if cell.first.kind == "measured"]
    lines = []
    if measured:
        found = Counter(cell.verdict or "unknown" for cell in measured)
        lines.append(
            f"{_count(len(measured), 'cell')} measured: {', '.join(f'{n} {v}' for v, n in found.most_common())}"
        )
    others = Counter(cell.first.kind for cell in cells if cell.first.kind != "measured")
    if others:
        lines.append(f"kept apart from what was measured: {', '.join(f'{n} {kind}' for kind, n in others.items())}")
    lines += _failures(measured)
    return lines + _fastest(measured)


def _failures(cells: Sequence[Cell]) -> list[str]:
    bad = [cell for cell in cells if cell.verdict in ("FAIL", "CRASHED", "TIMEOUT")]
    lines = []
    for cell in bad[:_TOLD]:
        reason = next((row.reason for row in cell.rows if row.verdict == cell.verdict and row.reason), "")
        row = cell.first
        lines.append(
            f"{row.backend} {row.scheme} on {cell.hardware}: {cell.verdict}" + (f", {reason}" if reason else "")
        )
    return lines + ([f"and {len(bad) - _TOLD} more that failed"] if len(bad) > _TOLD else [])


def _fastest(cells: Sequence[Cell]) -> list[str]:
    """The best speed of each model on each machine, of cells that pass; each workload by itself."""
    lines = []
    works = {workload_of(cell) for cell in cells if any(cell.speed(metric) for metric in SPEEDS)}

    def kind(cell: Cell) -> tuple[str, str, str]:
        return (cell.hardware, cell.first.model, workload_of(cell))

    for hardware, model, work in dict.fromkeys(map(kind, cells)):
        own = [cell for cell in cells if kind(cell) == (hardware, model, work)]
        words = []
        for metric in reversed(SPEEDS):
            timed = [(row.value or 0.0, cell) for cell in own if cell.verdict == "PASS" and (row := cell.speed(metric))]
            if timed:
                value, best = max(timed, key=lambda pair: pair[0])
                words.append(f"{metric} {number(value)} tok/s ({best.first.backend} {best.first.scheme})")
        if words:
            at = f", {work} tokens" if len(works) > 1 else ""
            lines.append(f"fastest that pass, {model} on {hardware}{at}: {', '.join(words)}")
    return lines


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
