"""Depth x operation: how wrong each result of a traced run is, in a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.localize.finding import Seen
from reference.operations import BLOCK

#: Short names of the operations of a block, in execution order, and of the rows of a state.
SHORT = {name: "x+" if name.endswith("residual") else name.rpartition(".")[2] for name in BLOCK}
STATE = {f"state.{row}": row for row in ("att_x", "bb", "aa", "ffn_x")}

#: Error over bound, from which on a cell is drawn so.
_SHADES = ((1.0, "██"), (0.5, "▒"), (0.1, "░"), (0.0, "·"))
LEGEND = "error / bound:  · below 0.1  ░ from 0.1  ▒ from 0.5  ██ beyond  N NaN  I Inf"

#: Columns of the layers' numbers; least of an operation.
_LABEL, _CELL = 5, 2


class Grid(NamedTuple):
    """A cell per layer and operation: error over bound, ``inf`` for Inf, NaN for NaN, ``None`` for not shown."""

    rows: list[str]
    columns: list[str]
    cells: list[list[float | None]]
    ends: dict[str, float]


def grid(seen: Sequence[Seen]) -> Grid | None:
    """Of trace points, or of rows of the state; ``None`` where there are none of either."""
    by_point = {one.point: one for one in seen}
    layers = sorted({one.layer for one in seen if one.layer is not None})
    names = next((kind for kind in (SHORT, STATE) if any(_shown(by_point, layers, kind))), None)
    if names is None:
        return None
    cells = [[_value(by_point.get(f"blocks.{layer}.{name}")) for name in names] for layer in layers]
    outside = ("emb", "blocks.0.ln0", "ln_out", "logits")
    ends = {name: value for name in outside if (value := _value(by_point.get(name))) is not None}
    return Grid([str(layer) for layer in layers], list(names.values()), cells, ends)


def _shown(by_point: Mapping[str, Seen], layers: Sequence[int], names: Mapping[str, str]) -> Iterator[bool]:
    return (f"blocks.{layer}.{name}" in by_point for layer in layers for name in names)


def _value(seen: Seen | None) -> float | None:
    if seen is None:
        return None
    if seen.problem:
        return math.nan if seen.problem == "NaN" else math.inf
    pairs = ((seen.error, seen.bound), (seen.local, seen.local_bound))
    known = [e / b if b > 0 else (0.0 if e == 0 else 1e30) for e, b in pairs if e is not None and b is not None]
    return max(known, default=None)


def text(found: Grid) -> str:
    """For a terminal."""
    widths = [max(_CELL, len(name)) for name in found.columns]
    lines = [_row("layer", found.columns, widths)]
    if "ln2" in found.columns:
        half = sum(width + 1 for width in widths[: found.columns.index("ln2")])
        lines.insert(0, f"{'':<{_LABEL}} {'time mixing (att)':<{half}}channel mixing (ffn)")
    for name, cells in zip(found.rows, found.cells, strict=True):
        lines.append(_row(name, [_mark(cell) for cell in cells], widths))
    if found.ends:
        lines.append("  ".join(f"{name} {_mark(value)}" for name, value in found.ends.items()))
    return "\n".join([*(line.rstrip() for line in lines), LEGEND]) + "\n"


def _row(label: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{label:<{_LABEL}}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _mark(value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "N"
    if math.isinf(value):
        return "I"
    return next(mark for least, mark in _SHADES if value > least or least == 0)
