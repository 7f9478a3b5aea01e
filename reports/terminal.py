"""A table as aligned text for people, drawn by rich: in colour on a terminal, never wider than asked."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from reports.tables import Table

_STYLES = {"PASS": "green", "FAIL": "bold red", "CRASHED": "bold red", "TIMEOUT": "bold red"}

#: Blank columns between two columns.
_GAP = 2


#: What would move the cursor, begin a line or give a terminal orders.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def render(table: Table, width: int | None = None, colour: bool = False) -> str:
    """``table`` in at most ``width`` columns (None: as many as it needs).

    Where it does not fit, headers are broken in two, then the columns that ``table`` can do without go;
    a note names them.
    """
    table = _tame(table)
    shown, header, left_out = _fitted(table, width)
    out = io.StringIO()
    full = width or _natural_width(header, _picked(table, shown))
    # A height too, without which rich takes a dumb terminal to have 80 columns whatever it is told.
    console = Console(file=out, width=full, height=25, highlight=False, force_terminal=colour or None)
    console.print(Text(_wrapped(table.title, width), style="bold"), soft_wrap=True)
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _GAP - 1, 0, 0), show_edge=False)
    for i, name in zip(shown, header, strict=True):
        justify = "left" if table.header[i] in table.left else "right"
        drawn.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in _picked(table, shown):
        drawn.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in line))
    console.print(drawn)
    notes = list(table.notes)
    if left_out:
        notes.append(f"not shown for lack of width: {', '.join(left_out)}")
    for note in notes:
        console.print(Text(_wrapped(note, width)), soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _tame(table: Table) -> Table:
    """Reasons hold the last words of processes: what is not text in them becomes a space."""

    def clean(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(_CONTROL.sub(" ", text) for text in texts)

    lines = tuple(clean(line) for line in table.lines)
    return replace(table, title=_CONTROL.sub(" ", table.title), lines=lines, notes=clean(table.notes))


def _wrapped(text: str, width: int | None) -> str:
    """Broken between words only, so that a path can still be copied."""
    if width is None:
        return text
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _fitted(table: Table, width: int | None) -> tuple[list[int], list[str], list[str]]:
    """Numbers of the columns to show, their headers, and the names of those left out."""
    shown = list(range(len(table.header)))
    header = list(table.header)
    left_out: list[str] = []
    if width is None or _natural_width(header, table.lines) <= width:
        return shown, header, left_out
    for name in (None, *table.spare):
        if name in table.header:
            shown.remove(table.header.index(name))
            left_out.append(name)
        header = [table.header[i].replace(" tok/s", "\ntok/s") for i in shown]
        if _natural_width(header, _picked(table, shown)) <= width:
            break
    return shown, header, left_out


def _picked(table: Table, shown: Sequence[int]) -> list[list[str]]:
    return [[line[i] for i in shown] for line in table.lines]


def _natural_width(header: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    rows = [*lines, *(part for part in zip(*(_two(name) for name in header), strict=True))]
    return sum(max(cell_len(row[i]) for row in rows) for i in range(len(header))) + _GAP * (len(header) - 1)


def _two(name: str) -> tuple[str, str]:
    first, _, second = name.partition("\n")
    return first, second
