"""Depth x operation as a picture: how wrong each result of a traced run is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Error over bound at both ends of the colours, in powers of ten; white is the bound itself.
_RANGE = 2.0


class Grid(Protocol):
    """A cell per row (layer) and column (operation): error over bound, Inf, NaN, or ``None`` for not shown."""

    @property
    def rows(self) -> list[str]: ...
    @property
    def columns(self) -> list[str]: ...
    @property
    def cells(self) -> list[list[float | None]]: ...


def draw(path: str, title: str, grid: Grid) -> None:
    """Write a PNG (or what the ending of ``path`` says). Raises ImportError without matplotlib, OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.42 * len(grid.columns) + 1.8, 0.32 * max(len(grid.rows), 4) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    shades = [[_shade(cell) for cell in row] for row in grid.cells]
    image = axes.imshow(shades, cmap="RdBu_r", vmin=-_RANGE, vmax=_RANGE, aspect="auto", interpolation="nearest")
    _name(axes, title, grid)
    for y, row in enumerate(grid.cells):
        for x, cell in enumerate(row):
            if cell is not None and not math.isfinite(cell):
                text = "NaN" if math.isnan(cell) else "Inf"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white")
    bar = figure.colorbar(image, ax=axes)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ 0.01", "0.1", "bound", "10", "≥ 100"])
    bar.set_label("error / bound")
    figure.savefig(path, dpi=150)


def _name(axes: Axes, title: str, grid: Grid) -> None:
    axes.set_title(title)
    axes.set_xticks(range(len(grid.columns)), labels=_told_apart(grid.columns), rotation=90)
    axes.set_yticks(range(len(grid.rows)), labels=grid.rows)
    axes.set_ylabel("layer")
    axes.set_facecolor("0.85")  # not shown


def _told_apart(columns: Sequence[str]) -> list[str]:
    """The two halves of a block have names in common."""
    half = columns.index("ln2") if "ln2" in columns else len(columns)
    return [
        name if name.startswith("ln") else f"{'att' if i < half else 'ffn'}.{name}" for i, name in enumerate(columns)
    ]


def _shade(cell: float | None) -> float:
    if cell is None:
        return math.nan  # drawn as nothing
    if not math.isfinite(cell):
        return _RANGE
    return max(-_RANGE, min(_RANGE, math.log10(cell) if cell > 0 else -_RANGE))
