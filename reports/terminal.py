"""A table for a terminal, drawn by rich."""

from __future__ import annotations

from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from reports.tables import Table

_STYLES = {"PASS": "green", "FAIL": "bold red", "CRASHED": "bold red", "TIMEOUT": "bold red"}


def draw(table: Table, stream: TextIO, width: int | None = None) -> None:
    """Write ``table`` to ``stream``; colours only on a terminal, ``width`` in columns only for tests."""
    console = Console(file=stream, width=width, highlight=False)
    if not console.is_terminal and width is None:
        console = Console(file=stream, width=max(80, _natural_width(table)), highlight=False)
    console.print(Text(table.title, style="bold"))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in table.header:
        right = name not in ("hardware", "model", "backend", "scheme", "parity")
        drawn.add_column(name, justify="right" if right else "left", overflow="fold")
    for line in table.lines:
        drawn.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in line))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note), soft_wrap=not console.is_terminal)


def _natural_width(table: Table) -> int:
    rows = (table.header, *table.lines)
    return sum(max(len(row[i]) for row in rows) + 3 for i in range(len(table.header)))
