"""A comparison as text for a terminal, Markdown for a pull request or a job summary, or JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from reports.tables import Table, markdown, number
from reports.terminal import render
from reports.verdict.comparison import Comparison, Judged, Line, varying
from reports.verdict.decision import SLOWER, UNDECIDED, Answer
from reports.verdict.spacing import PAUSE

SCHEMA = 1

_MARKS = {SLOWER: "❌", UNDECIDED: "❔"}


def as_table(found: Comparison, width: int | None = None, colour: bool = False) -> str:
    """The conclusion, a line per cell and metric, parity where it is not PASS on both sides."""
    text = render(_table(found), width, colour)
    return f"{found.conclusion}\n\n{text}"


def as_markdown(found: Comparison) -> str:
    """The conclusion in its first line; every answer that is not "no slower" before those that are."""
    mark = "❌" if found.regression else "❔" if found.open else "✅"
    table = _table(found, marked=True)
    return f"{mark} **{found.conclusion}**\n\n{markdown(table)}"


def as_json(found: Comparison) -> str:
    """Everything, one document."""
    return json.dumps(document(found), indent=1, allow_nan=False) + "\n"


def document(found: Comparison) -> dict[str, Any]:
    """Plain JSON types; NaN and infinity become null."""
    rules = found.rules
    return {
        "schema": SCHEMA,
        "conclusion": found.conclusion,
        "regression": found.regression,
        "base": found.names[0],
        "head": found.names[1],
        "paired": found.paired,
        "margin": rules.margin,
        "effect": rules.effect,
        "alpha": rules.alpha,
        "looks": rules.looks,
        "merged": found.merged,
        "cells": [_record(line) for line in found.lines],
        "parity": [
            {**cell.names, "base": cell.base, "head": cell.head, "regression": cell.regression, "why": cell.why}
            for cell in found.parity
        ],
        "missing": list(found.missing),
        "added": list(found.added),
        "notes": list(found.notes),
    }


def ratio_text(answer: Answer) -> str:
    """``-4.8 % [-5.6, -4.0]``: change of speed with its 95 % interval."""
    if not math.isfinite(answer.ratio):
        return "-"
    text = f"{_percent(answer.ratio)} %"
    if answer.interval is None:
        return text
    return f"{text} [{_percent(answer.interval[0])}, {_percent(answer.interval[1])}]"


def rules_text(found: Comparison) -> list[str]:
    """What the answers mean, and what they are made of."""
    rules = found.rules
    how = (
        "pairs of blocks measured next to each other, a coin deciding which came first: sign-flip test"
        if found.paired
        else f"stored files cannot be paired; runs of each, those less than {PAUSE / 60:g} min apart counting as one, "
        "are compared by a permutation test, as if the machine had been the same for both: `rwkv-bench ab` needs no "
        "such assumption"
    )
    certain = (
        f"at most {100 * rules.alpha:g} % of reports without any difference raise an alarm, all cells and "
        f"{rules.looks} reading{'s' * (rules.looks != 1)} of a comparison counted"
    )
    lines = [
        f"SLOWER: speed below {100 * (1 - rules.margin):g} % of base for certain; NO SLOWER: a loss of "
        f"{100 * rules.effect:g} % is ruled out; [ ]: 95 % interval of one cell",
        *(
            [certain]
            if found.paired
            else [f"{certain}, if the machine was the same for both"]
            if _several(found)
            else []
        ),
        f"sees: the slowdown that these {_unit(found)} would show with a chance of 95 %",
        f"base and head: medians of each side; the change is estimated from all {_unit(found)} "
        "and need not be their ratio",
        how,
    ]
    if found.merged > 1:
        lines.append(f"neighbouring runs are alike, so {found.merged} at a time count as one")
    return lines


def _several(found: Comparison) -> bool:
    """Whether any cell has more than one run a side: without, no answer about speed is given, right or wrong."""
    return any(min(line.answer.blocks) > 1 for line in found.lines)


def _record(line: Line) -> dict[str, Any]:
    answer = line.answer
    return {
        **line.names,
        "metric": line.metric,
        "unit": line.unit,
        "base_value": _finite(line.base),
        "head_value": _finite(line.head),
        "decision": answer.decision,
        "ratio": _finite(answer.ratio),
        "interval": None if answer.interval is None else list(answer.interval),
        "p": answer.p,
        "detectable": answer.detectable,
        "blocks": list(answer.blocks),
        "needed": answer.needed,
        "left_out": line.left_out,
        "why": answer.why,
    }


def _table(found: Comparison, marked: bool = False) -> Table:
    verdicts = {tuple(cell.names.items()): cell for cell in found.parity}
    keys = varying([line.names for line in found.lines] + [cell.names for cell in found.parity]) or [
        "backend",
        "scheme",
    ]
    header = (*keys, "metric", "base", "head", "change of speed", "verdict", "sees", _unit(found), "parity")
    lines = []
    shown = set()
    for line in sorted(found.lines, key=lambda line: _rank(line.answer.decision)):
        key = tuple(line.names.items())
        shown.add(key)
        lines.append((*(line.names.get(k, "") for k in keys), *_speeds(line, marked), _parity(verdicts.get(key))))
    for key, cell in verdicts.items():
        if key not in shown:
            blank = ("", "-", "-", "-", "❌ FAILS" if marked and cell.regression else "-", "", "")
            lines.append((*(cell.names.get(k, "") for k in keys), *blank, _parity(cell)))
    lines.sort(key=lambda line: "→" not in line[-1])
    notes = [
        *(f"{_named(cell)}: {cell.base} → {cell.head}: {cell.why}" for cell in found.wrong),
        *(f"{_of(line, keys)}: {line.answer.why}" for line in found.of(UNDECIDED)[:_MOST_REASONS]),
        *(f"missing in {found.names[1]}: {name}" for name in found.missing),
        *(f"only in {found.names[1]}: {name}" for name in found.added),
        *found.notes,
        *rules_text(found),
    ]
    title = f"{found.names[0]} → {found.names[1]}"
    spare = (_unit(found), *_SPARE)
    return Table(title, header, tuple(lines), tuple(notes), (*keys, "metric", "verdict", "parity"), spare)


def _unit(found: Comparison) -> str:
    return "pairs" if found.paired else "runs"


#: Columns to do without on a narrow terminal, the first one first, after the number of runs.
_SPARE = ("base", "workload", "sees")

#: Undecided cells whose reason is spelt out; the conclusion counts them all.
_MOST_REASONS = 8


def _rank(decision: str) -> int:
    return (SLOWER, UNDECIDED).index(decision) if decision in (SLOWER, UNDECIDED) else 2


def _speeds(line: Line, marked: bool) -> tuple[str, ...]:
    answer = line.answer
    n, m = answer.blocks
    sees = "-" if answer.detectable is None else f"{100 * answer.detectable:.2g} %"
    mark = f"{_MARKS[answer.decision]} " if marked and answer.decision in _MARKS else ""
    return (
        line.metric,
        _speed(line.base, line.unit),
        _speed(line.head, line.unit),
        ratio_text(answer),
        mark + answer.decision,
        sees,
        str(n) if n == m else f"{n}, {m}",
    )


def _speed(value: float, unit: str) -> str:
    return f"{number(value)} {unit}" if math.isfinite(value) else "-"


def _parity(cell: Judged | None) -> str:
    if cell is None:
        return ""
    if cell.base == cell.head:
        return str(cell.head)
    return f"{cell.base or 'not judged'} → {cell.head or 'not judged'}"


def _named(cell: Judged) -> str:
    return f"{cell.names['backend']} {cell.names['scheme']}"


def _of(line: Line, keys: list[str]) -> str:
    return " ".join([*(line.names[key] for key in keys if line.names.get(key)), line.metric])


def _percent(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return f"{change:+.0f}" if abs(change) >= 100 else f"{change:+.1f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
