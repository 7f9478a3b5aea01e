"""Quality rows -> one line a cell: is the kernel right, and is the scheme good enough, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.rows import Row
from reports import output
from reports.measuring_notes import half_width, percent
from reports.quality_csv import to_csv
from reports.tables import Table, group_cells, markdown, number, shared_by, shared_key, small, title_of, verdict_of
from reports.terminal import render

#: Columns to do without where there is no room, the first one first.
_SPARE = ("top-5 %", "bit/byte", "vs fp32", "ppl")

#: A divergence below this may be the rounding of the baseline (:mod:`harness.quality.baseline`).
_NOTHING = 1e-11

_NOT_RUN = ("UNAVAILABLE", "UNSUPPORTED")


def formatted(rows: Sequence[Row], kind: str, width: int | None = None, colour: bool = False) -> str:
    """As :func:`reports.output.formatted`, ``table``, ``md`` and ``csv`` with the columns of quality."""
    if kind == "csv":
        return to_csv(rows)
    if kind not in ("table", "md"):
        return output.formatted(rows, kind, width, colour)
    if not rows:
        return ""
    table = quality_table(rows)
    return markdown(table) if kind == "md" else render(table, width, colour)


def quality_table(rows: Sequence[Row]) -> Table:
    """One line per cell. What no cell has is no column; a cell without figures shows its verdict."""
    cells = sorted(_by_cell(rows), key=lambda group: verdict_of(group) in _NOT_RUN)  # what ran comes first
    shared, keys = shared_by(cells)
    figures = [_figures(group) for group in cells]
    names = [name for name in _COLUMNS if any(name in found for found in figures)]
    lines = [
        (*(shared_key(group, key) for key in keys), _judged(group), *(found.get(name, "") for name in names))
        for group, found in zip(cells, figures, strict=True)
    ]
    title = " · ".join(filter(None, (title_of(rows, shared), _passage(rows))))
    return Table(title, (*keys, "parity", *names), tuple(lines), tuple(_notes(cells)), spare=_SPARE)


def summary(rows: Sequence[Row]) -> str:
    """One cell in one line: ``PASS, KL 0.0123, top-1 95.1 %``; ``no codec`` where the kernel could not be judged."""
    verdict = verdict_of([row for row in rows if row.verdict != "UNSUPPORTED"] or rows)
    found = _figures(rows)
    shown = (("KL", "KL {}"), ("top-1 %", "top-1 {} %"), ("LAMBADA %", "LAMBADA {} %"))
    figures = [text.format(found[name].split(" ±")[0]) for name, text in shown if name in found]
    why = next((row.reason for row in rows if row.verdict == verdict and row.reason), None)
    if verdict != "PASS" and why:
        return "; ".join([f"{verdict}: {why}", *figures])
    return ", ".join([_judged(rows) if verdict == "PASS" else verdict, *figures])


#: Column -> metric, in the order in which they are shown.
_COLUMNS: dict[str, str] = {
    "KL": "kl_divergence",
    "weights": "kl_divergence",
    "kernel": "kl_divergence",
    "against": "kl_divergence",
    "top-1 %": "top1_agreement",
    "ppl": "perplexity",
    "vs fp32": "perplexity",
    "bit/byte": "bits_per_byte",
    "top-5 %": "top5_agreement",
    "LAMBADA %": "lambada_accuracy",
}


def _by_cell(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one cell together: whatever each was measured on."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for group in group_cells(rows):
        row = group[0]
        place = row.hardware, row.device, row.threads, row.isolated
        groups.setdefault((row.run, row.model, row.backend, row.scheme, *place), []).extend(group)
    return list(groups.values())


def _figures(group: Sequence[Row]) -> dict[str, str]:
    """Column -> text, of the columns that a cell has figures for."""
    rows = {row.metric: row for row in group if row.value is not None}
    found = {name: _figure(name, rows[metric]) for name, metric in _COLUMNS.items() if metric in rows}
    return {name: text for name, text in found.items() if text is not None}


def _figure(name: str, row: Row) -> str | None:
    """What a column shows of its row; ``None`` for a row that does not have it."""
    if row.value is None:
        return None
    if name == "vs fp32":
        return _times(row)
    if name in ("weights", "kernel"):
        part = (row.quality or {}).get(name)
        return None if part is None else _divergence(part["value"])
    if name == "against":
        return _against((row.quality or {}).get("against"))
    if row.unit == "fraction":
        return _percent(row.value, row.interval)
    return _relative(_divergence(row.value) if name == "KL" else number(row.value), row)


def _judged(group: Sequence[Row]) -> str:
    """The verdict on the kernel; of a cell that ended, how; of one that never ran, a dash, its note says why."""
    ended = next((row.verdict for row in group if row.verdict in ("CRASHED", "TIMEOUT")), None)
    parity = [row for row in group if row.metric in ("parity", "state_parity")]
    verdict = ended or verdict_of(parity or group)
    if verdict in _NOT_RUN:
        return "no codec" if len(group) > len(parity) else "-"
    return verdict


def _divergence(value: float) -> str:
    """``0.0123``, ``3.1e-6``, ``0``: only what is the same by definition."""
    if value < _NOTHING:
        return "<1e-11" if value else "0"
    return f"{value:.3g}" if value >= 1e-3 else small(value)


def _relative(text: str, row: Row) -> str:
    """A figure with the wider half of its interval in per cent of it."""
    half = half_width(row)
    return text if half is None or text.startswith("<") else f"{text} {percent(half)}%"


def _percent(value: float, interval: tuple[float, float] | None) -> str:
    """``95.1 ±0.4``: a fraction and the wider half of its interval, both in hundredths."""
    if interval is None:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} ±{100 * max(interval[1] - value, value - interval[0]):.1f}"


def _against(about: Mapping[str, Any] | None) -> str | None:
    """``-31 ±5% no worse``: a difference of divergences in per cent of the other's; the other itself: ``=``."""
    if about is None:
        return None
    difference, interval, other = about["difference"], about["interval"], about["value"]
    if difference is None:
        return _found(about)
    if difference == 0 and interval in (None, [0, 0]):
        return "="
    if not other > _NOTHING:  # of nothing there are no per cent
        return f"{difference:+.1g} {_found(about)}"
    half = "" if interval is None else f" ±{_rounded(100 * (interval[1] - difference) / other)}"
    return f"{_rounded(100 * difference / other, '+')}{half}% {_found(about)}"


def _found(about: Mapping[str, Any]) -> str:
    """``no worse``; ``undecided: 4 blocks of 8``. That an interval holds 0 is seen beside it, and the legend's."""
    why = about.get("why")
    return about["finding"] if why is None or about["interval"] is not None else f"{about['finding']}: {why}"


def _rounded(value: float, sign: str = "") -> str:
    """Per cent, in whole ones from ten on."""
    return f"{value:{sign}.0f}" if abs(value) >= 9.5 else f"{value:{sign}.1f}"


def _times(row: Row) -> str | None:
    """``+0.8 ±0.3%``: how much larger a perplexity is than that of the fp32 weights on the same positions."""
    about = row.quality or {}
    times, interval = about.get("times_fp32"), about.get("times_fp32_interval")
    if times is None:
        return None
    half = None if interval is None else max(interval[1] - times, times - interval[0])
    digits = 1 if (abs(times - 1) if half is None else half) >= 5e-4 else 3
    change = f"{round(100 * (times - 1), digits) + 0.0:+.{digits}f}"  # no minus before a zero
    return f"{change}%" if half is None else f"{change} ±{100 * half:.{digits}f}%"


def _passage(rows: Sequence[Row]) -> str:
    """On what the rows were measured, where all say the same."""
    found = {
        (about["text"], about["positions"], about["context"])
        for about in (row.quality for row in rows)
        if about and "positions" in about
    }
    if len(found) != 1:
        return ""
    text, positions, context = found.pop()
    return f"{positions} tokens of {text}" + (f" in segments of {context}" if context else "")


_LEGEND = (
    "KL from the fp32 weights, nat/token; weights: by how they are stored; kernel: by what the backend makes of them"
)
_PAIRED = (
    "against: KL less that of {} on the same positions, in % of it; the word is by the 95 % interval, undecided where "
    "that holds 0"
)


def _notes(cells: Sequence[Sequence[Row]]) -> list[str]:
    """What the columns mean, and why cells have no figures or not the full verdict: each reason once."""
    found: dict[str, list[str]] = {}
    figures = False
    others: dict[str, None] = {}
    for row in (row for group in cells for row in group):
        figures = figures or row.metric == "kl_divergence"
        about = (row.quality or {}).get("against")
        if about is not None:
            others[f"{about['backend']} {about['scheme']}"] = None
        if row.reason and (row.verdict not in ("PASS", None) or (row.metric == "perplexity" and row.synthetic)):
            text = row.reason if row.verdict == "PASS" else f"{row.verdict}: {row.reason}"
            found.setdefault(text, []).append(f"{row.backend} {row.scheme}")
    reasons = [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in found.items()]
    compared = [_PAIRED.format(", ".join(others))] if others else []
    return [*([_LEGEND] if figures else []), *compared, *reasons]
