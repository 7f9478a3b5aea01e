"""Results as one Markdown document: what they come to, tables of hardware × quantization × backend, then every cell."""

from __future__ import annotations

import re

from reports.cells import cells, ordered
from reports.pivot import pivots
from reports.results import Results
from reports.summary import headline
from reports.tables import Table, markdown, tables


def markdown_report(found: Results, title: str) -> str:
    """GitHub-flavoured; nothing of a row can end a cell or become markup."""
    known = cells(found.rows)
    newest = [row for cell in ordered(known) for row in cell.rows]
    lines = "".join(f"- {_line(line)}\n" for line in headline(known))
    parts = [f"# {_line(title)}\n\n{lines}"]
    parts += [markdown(escaped(table)) for table in pivots(known)]
    parts += [markdown(escaped(table)) for table in tables(newest)]
    if found.said:
        parts.append("Noticed while reading:\n\n" + "".join(f"- {_line(line)}\n" for line in found.said))
    return "\n".join(parts)


def escaped(table: Table) -> Table:
    """The table with texts whose markup Markdown does not see."""
    return Table(
        _line(table.title),
        tuple(map(_line, table.header)),
        tuple(tuple(_plain(text).replace("\n", "<br>") for text in line) for line in table.lines),
        tuple(map(_line, table.notes)),
        table.left,
    )


def _plain(text: str) -> str:
    """Text whose markup Markdown does not see, in one line but for the newlines of a cell."""
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    text = re.sub(r"([\\`*\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    return _plain(text).replace("\n", " ")
