"""One self-contained HTML page of results: everything readable without a script, which adds sorting and charts.

Nothing is fetched: style, script and data are in the file, and its policy forbids the rest. Whatever comes from a row
is escaped here or reaches the page as JSON that the script shows as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from reports.cell_history import histories
from reports.cells import Cell, ordered
from reports.page_data import record
from reports.page_rows import KINDS, section
from reports.pivot import pivots
from reports.summary import headline
from reports.tables import Table

_FOLDER = Path(__file__).with_name("page")


def page(cells: Sequence[Cell], title: str, said: Sequence[str], made: str) -> str:
    """The page. ``said``: what reading the files noticed; ``made``: how and when the page was made."""
    cells = ordered(cells)
    backends = sorted({cell.first.backend for cell in cells})
    pasts = histories(cells)
    records = [record(cell, i, backends.index(cell.first.backend) % 10, pasts[i]) for i, cell in enumerate(cells)]
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    )
    # In a script element only "<" could end it or open a comment.
    data = json.dumps(records, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    sections = [section(kind, cells, records) for kind in KINDS if any(cell.first.kind == kind for cell in cells)]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#rows">to the results</a>
<header>
<h1>{escape(title)}</h1>
{_lead(cells, said)}
</header>
<main>
{_controls(records)}
{_contents(cells)}
<div id="rows">{"".join(sections) or "<p>There are no rows.</p>"}</div>
{_charts() if any(cell.first.kind == "measured" for cell in cells) else _no_charts()}
{_pivots(cells)}
<p class="soft">{escape(made)} <noscript>Sorting, filters, charts and raw samples need JavaScript.</noscript></p>
</main>
<script type="application/json" id="cells">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _lead(cells: Sequence[Cell], said: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in headline(cells))
    notes = "".join(f"<li>{escape(line)}</li>" for line in said)
    noticed = f"<details open><summary>{len(said)} noticed while reading</summary><ul>{notes}</ul></details>"
    return f'<ul class="lead">{lines}</ul>' + (noticed if said else "")


def _contents(cells: Sequence[Cell]) -> str:
    """Where to find what, for narrow screens."""
    kinds = {cell.first.kind for cell in cells}
    places = [(f"h-{kind}", heading) for kind, (heading, _) in KINDS.items() if kind in kinds]
    if "measured" in kinds:
        places += [
            ("h-bars", "Speeds"),
            ("h-roofline", "Roofline"),
            ("h-frontier", "Quality"),
            ("h-history", "History"),
        ]
    links = " · ".join(f'<a href="#{place}">{name}</a>' for place, name in places)
    return f'<nav class="contents" aria-label="contents">{links}</nav>'


def _controls(records: Sequence[dict[str, Any]]) -> str:
    """The filters: a choice for each key that tells cells apart."""
    chosen = (
        ("hardware", "hardware"),
        ("model", "model"),
        ("backend", "backend"),
        ("cls", "quantization"),
        ("verdict", "verdict"),
    )
    fields = []
    for key, title in chosen:
        values = sorted({str(each[key]) for each in records} - {""})
        options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
        hidden = " hidden" if len(values) < 2 else ""
        fields.append(
            f'<label{hidden}>{title}<select name="{key}" aria-label="{title}"><option value="">all</option>'
            f"{options}</select></label>"
        )
    order = (
        ("decode -1", "decode, fastest first"),
        ("prefill -1", "prefill, fastest first"),
        ("memory 1", "memory, least first"),
        ("kl 1", "KL, least first"),
        ("name 1", "name"),
    )
    sort = "".join(f'<option value="{value}">{text}</option>' for value, text in order)
    return (
        '<form id="filters" class="controls needs-js" role="search" aria-label="filter the results">'
        '<label>search<input name="text" type="search" aria-label="search" placeholder="onnx int4" autocomplete="off">'
        "</label>"
        f"{''.join(fields)}"
        '<label class="sort-by">sort by<select id="sort" aria-label="sort by"><option value="">model and speed</option>'
        f"{sort}</select></label>"
        '<button type="reset">show all</button><output id="count" aria-live="polite"></output></form>'
    )


def _charts() -> str:
    return (_FOLDER / "charts.html").read_text(encoding="utf-8")


def _no_charts() -> str:
    """Where the script looks for charts and there is nothing to draw."""
    return _charts().replace('<section class="needs-js"', "<section hidden")


def _pivots(cells: Sequence[Cell]) -> str:
    return "".join(_pivot(table) for table in pivots(cells))


def _pivot(table: Table) -> str:
    heading, _, about = table.title.partition(" · ")
    heading = heading[:1].upper() + heading[1:]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(text)}</th>'
            if name in table.left
            else f"<td>{escape(text).replace(chr(10), '<br>')}</td>"
            for name, text in zip(table.header, line, strict=True)
        )
        + "</tr>"
        for line in table.lines
    )
    return (
        f'<section><h2>{escape(heading)}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}"><table class="pivot"><caption>{escape(about)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
