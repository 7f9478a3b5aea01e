"""The tables of the page: columns, and a line for each cell, as markup in which everything of a row is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from reports.cells import Cell
from reports.claims import of_peak, ours_text
from reports.measuring_notes import percent
from reports.row_fields import device_bytes
from reports.tables import number, shared_by, small, title_of

#: Kind -> heading and what its rows are, in the order of the page.
KINDS = {
    "measured": ("Measured", "by rwkv-bench, speed and parity verdict from the same loaded session"),
    "recorded": ("Recorded", "taken elsewhere or printed by other programs; parity unknown unless a verdict is shown"),
    "published": ("Published", "claims of others, not measured here; what a source leaves out is unknown"),
    "predicted": ("Predicted", "from the roofline; nothing was run"),
}


class Column(NamedTuple):
    """A column of the table of cells: its key, its header, whether it is sorted as numbers, and its cell."""

    key: str
    title: str
    unit: str
    cell: Callable[[Cell, dict[str, Any], float], str]
    number: bool = False
    first: str = "up"


def section(kind: str, cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> str:
    own = [(cell, each) for cell, each in zip(cells, records, strict=True) if cell.first.kind == kind]
    heading, what = KINDS[kind]
    common = shared_by([cell.rows for cell, _ in own])[0]
    shared = title_of([row for cell, _ in own for row in cell.rows], common)
    what += "" if shared == "results" else f" · {escape(shared)}"
    among = CLAIM_COLUMNS if kind in ("published", "predicted") else CELL_COLUMNS
    columns = _used(own, among, common)
    tops = _tops([each for _, each in own])
    head = "".join(_head(column) for column in columns)
    body = "".join(_line(cell, each, columns, tops[_scale(each)]) for cell, each in own)
    return (
        f'<section class="rows" aria-labelledby="h-{kind}"><h2 id="h-{kind}">{heading}</h2><div class="scroll">'
        f'<table class="cards" role="table"><caption>{what}</caption><thead role="rowgroup"><tr role="row">{head}</tr>'
        f'</thead><tbody role="rowgroup">{body}</tbody></table></div>'
        '<p class="nothing soft" hidden>No line passes the filter.</p></section>'
    )


def _head(column: Column) -> str:
    kind = ' data-type="number"' if column.number else ""
    unit = f" <small>{column.unit}</small>" if column.unit else ""
    classes = ' class="num"' if column.number and column.key not in ("prefill", "decode") else ""
    return (
        f'<th scope="col" role="columnheader" data-key="{column.key}" data-first="{column.first}"{kind}{classes}>'
        f"{column.title}{unit}</th>"
    )


def _line(cell: Cell, each: dict[str, Any], columns: Sequence[Column], tops: dict[str, float]) -> str:
    keys = ("hardware", "model", "backend", "cls", "verdict")
    data = "".join(f' data-{key}="{escape(str(each[key]))}"' for key in keys)
    number_ = f' data-i="{each["i"]}"' if each["kind"] in ("measured", "recorded") else ""
    body = "".join(column.cell(cell, each, tops.get(column.key, 0.0)) for column in columns)
    return f'<tr class="cell" role="row"{number_}{data}>{body}</tr>'


def _tops(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Longest bar of each speed, over the cells that one scale makes sense for."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for each in records:
        tops = found.setdefault(_scale(each), {})
        for metric in ("prefill", "decode"):
            if each[metric]:
                tops[metric] = max(tops.get(metric, 0.0), each[metric]["hi"] or each[metric]["v"])
    return found


def _scale(each: dict[str, Any]) -> tuple[str, str]:
    return each["model"], each["workload"]


def _cell(title: str, value: object, shown: str, classes: str = "") -> str:
    """A table cell; ``value`` is what it is sorted by, ``shown`` is markup."""
    at = "" if value in (None, "") else f' data-v="{escape(str(value))}"'
    css = f"{classes} none".strip() if not shown else classes
    return f'<td role="cell" data-l="{escape(title)}"{at}{f""" class="{css}" """ if css else ""}>{shown}</td>'


def _name(cell: Cell, each: dict[str, Any], top: float) -> str:
    text = escape(f"{each['backend']} {each['scheme']}")
    button = f'<button type="button" class="more" aria-expanded="false">{text}</button>'
    return _row_header(text, button)


def _row_header(value: str, shown: str) -> str:
    return f'<th scope="row" role="rowheader" class="name" data-v="{value}">{shown}</th>'


def _plain(key: str, title: str) -> Column:
    return Column(key, title, "", lambda cell, each, top: _cell(title, each[key], escape(str(each[key] or ""))))


def _verdict(cell: Cell, each: dict[str, Any], top: float) -> str:
    shown = "no codec" if each["verdict"] == "UNSUPPORTED" and not each["judged"] else each["verdict"]
    return _cell("parity", each["verdict"], f'<span class="pill {each["verdict"]}">{escape(shown)}</span>', "verdict")


def _speed(metric: str) -> Callable[[Cell, dict[str, Any], float], str]:
    def shown(cell: Cell, each: dict[str, Any], top: float) -> str:
        title, found = f"{metric} tok/s", each[metric]
        if found is None:
            row = cell.row(metric)
            word = (row.verdict if row is not None and row.verdict != "PASS" else None) or each["judged"]
            text = f'<span class="pill {escape(word)}">{escape(word)}</span>' if word else ""
            return _cell(title, None, text or '<span class="soft">not timed</span>', "speed")
        value, low, high = found["v"], found["lo"], found["hi"]
        spread = "" if low is None else f' <span class="pm">{percent(max(high - value, value - low) / value)} %</span>'
        colour = f"var(--s{each['colour']})"
        bar = f'<i style="width:{100 * value / top:.1f}%"></i>' if top else ""
        if low is not None and top:
            bar += f'<b style="left:{100 * low / top:.1f}%;width:{100 * (high - low) / top:.1f}%"></b>'
        text = f'{number(value)}{spread}<span class="bar" style="--c:{colour}" aria-hidden="true">{bar}</span>'
        return _cell(title, value, text, "speed")

    return shown


def _first_token(cell: Cell, each: dict[str, Any], top: float) -> str:
    row = cell.row("time_to_first_token")
    value = None if row is None or each["judged"] else row.value
    return _cell("1st token ms", value, "" if value is None else number(1e3 * value), "num")


def _memory(cell: Cell, each: dict[str, Any], top: float) -> str:
    peak = max((row.peak_bytes for row in cell.rows if row.peak_bytes), default=None)
    device = max((found for row in cell.rows if (found := device_bytes(row))), default=None)
    if each["judged"] or (peak is None and device is None):
        return _cell("memory MiB", None, "", "num")
    text = "" if peak is None else f"{peak / 2**20:.0f}"
    text += "" if device is None else f' <span class="pm">device {device / 2**20:.0f}</span>'
    return _cell("memory MiB", (peak or 0) + (device or 0), text, "num")


def _roofline(cell: Cell, each: dict[str, Any], top: float) -> str:
    row = cell.speed("decode")
    fraction = None if row is None else row.roofline_fraction
    return _cell("roofline", fraction, "" if fraction is None else f"{100 * fraction:.0f} %", "num")


def _divergence(cell: Cell, each: dict[str, Any], top: float) -> str:
    value = each["kl"]
    return _cell("KL nat/token", value, "" if value is None else small(value) if value > 0 else "0", "num")


_THREADS = Column(
    "threads", "threads", "", lambda c, each, t: _cell("threads", each["threads"], str(each["threads"] or "")), True
)

CELL_COLUMNS = (
    Column("name", "backend, scheme", "", _name),
    Column("verdict", "parity", "", _verdict),
    Column("decode", "decode", "tok/s", _speed("decode"), number=True, first="down"),
    Column("prefill", "prefill", "tok/s", _speed("prefill"), number=True, first="down"),
    Column("ttft", "1st token", "ms", _first_token, number=True),
    Column("memory", "memory", "MiB", _memory, number=True),
    Column("roofline", "roofline", "", _roofline, number=True, first="down"),
    Column("kl", "KL", "nat/token", _divergence, number=True),
    _plain("hardware", "hardware"),
    _plain("model", "model"),
    _plain("cls", "quantization"),
    _THREADS,
    _plain("workload", "prompt → decode"),
)


def _used(
    own: Sequence[tuple[Cell, dict[str, Any]]], among: Sequence[Column], common: Mapping[str, str]
) -> list[Column]:
    """Columns that hold something, those of the key only where cells differ in it; ``common`` is in the caption."""

    def filled(column: Column) -> bool:
        if column.key in ("hardware", "model", "threads", "workload"):
            held = {str(each[column.key]) for _, each in own} - {"", "None"}
            return len(held) > 1 or (bool(held) and column.key not in (*common, "workload"))
        if column.key in ("ttft", "memory", "roofline", "kl", "peak", "ours"):
            return any("data-v=" in column.cell(cell, each, 0.0) for cell, each in own)
        return True

    return [column for column in among if filled(column)]


def _claimed(cell: Cell, each: dict[str, Any], top: float) -> str:
    text = escape(f"{each['backend']} {each['scheme']}")
    return _row_header(text, text)


def _figure(cell: Cell, each: dict[str, Any], top: float) -> str:
    row = cell.first
    return _cell(row.metric, row.value, escape(f"{row.metric} {number(row.value)} {row.unit}"), "wide")


def _of_peak(cell: Cell, each: dict[str, Any], top: float) -> str:
    return _cell("of peak", cell.first.roofline_fraction, escape(of_peak(cell.first)))


def _ours(cell: Cell, each: dict[str, Any], top: float) -> str:
    own = cell.first.extra.get("ours") or {}
    return _cell("measured here", own.get("value"), escape(ours_text(cell.first)), "wide")


def _source(cell: Cell, each: dict[str, Any], top: float) -> str:
    source, reason = str(cell.first.extra.get("source", "")), cell.first.reason or ""
    apart = (cell.first.extra.get("ours") or {}).get("why") or ""
    return _cell("source", source, escape("; ".join(filter(None, (source, reason, apart)))), "src")


CLAIM_COLUMNS = (
    Column("name", "backend, scheme", "", _claimed),
    Column(
        "kind",
        "kind",
        "",
        lambda c, each, t: _cell("kind", each["kind"], f'<span class="pill">{each["kind"]}</span>', "verdict"),
    ),
    Column("figure", "figure", "", _figure, number=True, first="down"),
    Column("peak", "of peak", "", _of_peak, number=True, first="down"),
    Column("ours", "measured here", "", _ours, number=True, first="down"),
    _plain("hardware", "hardware"),
    _plain("model", "model"),
    _THREADS,
    Column("source", "source and what it leaves out", "", _source),
)
