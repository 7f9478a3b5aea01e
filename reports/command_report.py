"""``rwkv-bench report``: result files -> tables, a page, a picture, or one joined file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.outcome import Outcome
    from harness.rows import Row
    from reports.results import Results

HELP = "result files -> md, csv, json, jsonl, html, png"

EXAMPLES = """\
examples:
  rwkv-bench report                              your own store, as a table
  rwkv-bench report --output report.html         one page, nothing else needed
  rwkv-bench report a.jsonl b.json --format md   two files joined
  rwkv-bench report ci/*.jsonl --output now.png  bars, roofline, frontier ...
  rwkv-bench report a.jsonl b.jsonl --output all.jsonl
  ssh box cat rows.jsonl | rwkv-bench report - --quant int4

A row that stands in several files is counted once, and said; a file that is
damaged, or another program's, ends the report and is named. What is published
of a measured cell stands beside it, but in csv, json and jsonl.
"""

FORMATS = ("table", "md", "csv", "json", "jsonl", "html", "png")

#: Formats that other programs read, and that hold the rows of the files alone.
_DATA = ("csv", "json", "jsonl")

#: Options that choose rows.
FILTERS = ("hardware", "model", "backend", "quant")


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--format`` and ``--output`` are added by :mod:`harness.options`."""
    results_and_filters(parser)
    parser.add_argument("--title", metavar="TEXT", help="of the page and the picture (default: RWKV-4 results)")


def results_and_filters(parser: argparse.ArgumentParser) -> None:
    """Result files and which of their rows."""
    text = "stores and JSON documents; - reads standard input (default: the user's own store)"
    parser.add_argument("results", nargs="*", metavar="RESULTS", help=text)
    group = parser.add_argument_group("which rows (NAMES: a comma list)")
    for name, what in zip(FILTERS, ("hardware", "models", "backends", "schemes or classes: Q8_0, int4"), strict=True):
        group.add_argument(f"--{name}", type=_names, metavar="NAMES", help=f"{what} (default all)")


def run(arguments: argparse.Namespace, tell: Callable[[str], None], kind: str) -> Outcome:
    """The report as text, or as bytes where it is a picture. Raises InputError for files that cannot be read."""
    from dataclasses import replace

    from harness.outcome import Outcome
    from harness.status import PASSED

    _check(arguments, kind)
    tell("reading")
    every = _read(arguments)
    found = _filtered(every, arguments)
    tell(f"{len(found.rows)} rows")
    title, made = arguments.title or "RWKV-4 results", _made(found)
    if kind not in _DATA:
        from reports.published import beside_claims

        found = _filtered(replace(every, rows=tuple(beside_claims(every.rows))), arguments)
    if kind in ("html", "md"):  # which say themselves what was noticed
        return Outcome(_rendered(found, kind, title, made), PASSED)
    return Outcome(_rendered(found, kind, title, made), PASSED, (*found.said, *_earlier(found, kind)))


def chosen(arguments: argparse.Namespace) -> Results:
    """Rows of the files that pass the filters. Raises StoreError, and InputError where none does."""
    return _filtered(_read(arguments), arguments)


def _read(arguments: argparse.Namespace) -> Results:
    """All rows of the files, or of the own store."""
    from harness.collect import store_path
    from reference.errors import InputError
    from reports.results import read_results

    paths = ["/dev/stdin" if path == "-" else path for path in arguments.results]
    if not paths:
        own = store_path(None, make=False)
        if not own.exists():
            raise InputError(f"no results are given, and there is no store {own} yet; rwkv-bench run makes one")
        paths = [str(own)]
    return read_results(paths)


def _filtered(found: Results, arguments: argparse.Namespace) -> Results:
    """Raises InputError where no row passes."""
    from dataclasses import replace

    from reference.errors import InputError

    rows = tuple(row for row in found.rows if _passes(row, arguments))
    if found.rows and not rows:
        asked = " ".join(
            f"--{name} {','.join(getattr(arguments, name))}" for name in FILTERS if getattr(arguments, name)
        )
        raise InputError(f"no row of {len(found.rows)} has {asked}; {_there_are(found.rows, arguments)}")
    return replace(found, rows=rows)


def _rendered(found: Results, kind: str, title: str, made: str) -> str | bytes:
    from reports.cells import cells, ordered

    if kind == "html":
        from reports.page_html import page

        return page(cells(found.rows), title, found.said, made)
    if kind == "png":
        from reports.plots import draw

        return draw(cells(found.rows), title)
    if kind == "md":
        from reports.report_md import markdown_report

        return markdown_report(found, title)
    from reports.output import formatted

    if kind == "table":
        return formatted([row for cell in ordered(cells(found.rows)) for row in cell.rows], kind, _width())
    return formatted(found.rows, kind)


def _earlier(found: Results, kind: str) -> tuple[str, ...]:
    """That a table shows the newest run of each cell, where there are others."""
    from reports.cells import cells

    runs = {row.run for cell in cells(found.rows) for rows in cell.earlier for row in rows}
    if kind != "table" or not runs:
        return ()
    return (f"each cell's newest run is shown; html, png and jsonl have {len(runs)} earlier too",)


def _check(arguments: argparse.Namespace, kind: str) -> None:
    """Refuse what could not be written after the work, and a result file as the place to write to."""
    from importlib.util import find_spec

    from backends.api import Unavailable
    from reports.output import check_output

    if kind == "png" and find_spec("matplotlib") is None:
        raise Unavailable("--format png needs matplotlib, which is not installed", "pip install matplotlib")
    from harness.collect import store_path

    for path in arguments.results or [store_path(None, make=False)]:
        check_output(arguments.output, path)


def _width() -> int | None:
    from harness.console import columns

    return columns()


def _made(found: Results) -> str:
    from datetime import datetime, timezone

    names = ", ".join(os.path.basename(path) for path in found.files[:5])
    more = f" and {len(found.files) - 5} more" if len(found.files) > 5 else ""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"{len(found.rows)} rows of {names}{more}; made {now} by rwkv-bench report."


def _passes(row: Row, arguments: argparse.Namespace) -> bool:
    beside = row.extra.get("ours") or {}  # a claim stands with the backend that it is held against
    has: dict[str, set[Any]] = {
        "hardware": {row.hardware},
        "model": {row.model},
        "backend": {row.backend, beside.get("backend")},
    }
    has["quant"] = {row.scheme, *_classes(row)}
    return all(not getattr(arguments, name) or set(getattr(arguments, name)) & has[name] for name in FILTERS)


def _classes(row: Row) -> Iterable[str]:
    """Names of the row's class: ``fp16`` is what people call ``f16``."""
    found = row.scheme_class
    return () if found is None else (found, {"f32": "fp32", "f16": "fp16"}.get(found, found))


def _there_are(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """What there is instead, of the first filter that nothing passes."""
    for name in FILTERS:
        asked = getattr(arguments, name)
        alone = argparse.Namespace(**{**dict.fromkeys(FILTERS), name: asked})
        if asked and not any(_passes(row, alone) for row in rows):
            field = {"quant": "scheme"}.get(name, name)
            known = list(dict.fromkeys(str(getattr(row, field)) for row in rows))
            return f"there are {', '.join(known[:12])}" + (", ..." if len(known) > 12 else "")
    return "each is there, but not together"


def _names(text: str) -> tuple[str, ...] | None:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("no name is given")
    return None if "all" in names else names
