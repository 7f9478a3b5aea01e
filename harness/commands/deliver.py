"""Where a command's answer goes: the file that ``--output`` names, else stdout."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.console import columns, out
from harness.options import output_format

if TYPE_CHECKING:
    from harness.rows import Row


def deliver(text: str | bytes, output: str | None) -> None:
    """To the file that ``--output`` names, else to stdout."""
    from reports.output import write_output

    if output:
        write_output(output, text)
    else:
        out(text)


def write_rows(rows: Sequence[Row], arguments: Namespace) -> None:
    from reports.output import formatted

    deliver(formatted(rows, output_format(arguments), *shape(arguments)), arguments.output)


def shape(arguments: Namespace) -> tuple[int | None, bool]:
    """Columns that a table may take, and whether it is in colour."""
    width = None if arguments.output else columns()
    return width, width is not None


def check_files(*paths: str | None) -> None:
    """Raise StoreError now for a file that could not be written after the work."""
    from harness.collect import store_path
    from reports.output import check_output

    for path in paths:
        check_output(path, store_path(None, make=False))


def counted(count: int) -> str:
    return f"{count} {'row' if count == 1 else 'rows'}"
