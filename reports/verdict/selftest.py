"""``compare --self-test``: what was recorded here, what was drawn from it, and the error rates that came out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from reports.tables import Table, markdown
from reports.terminal import render
from reports.verdict.decision import Rules
from reports.verdict.dependence import autocorrelation
from reports.verdict.error_rates import COUNTS, PILOT, REPORTS, Rates, lower_bound, rates
from reports.verdict.resample import A_ROW, APART, PAIRS, Record
from reports.verdict.spacing import PAUSE

#: Coefficients of variation at which the tool is to know its error rates.
SPREADS = (0.005, 0.02, 0.05)

#: What of the A/A reports may raise an alarm, the upper bound of that, and what of the slowdowns must be seen.
ALARMS, ALARMS_UPPER, POWER = 0.01, 0.015, 0.95

_HOW = {
    APART: "stored, independent",
    A_ROW: "stored, in a row",
    PAIRS: "pairs (ab)",
}

Tell = Callable[[str], None]


def measured(
    record: Record,
    rules: Rules,
    reports: int = REPORTS,
    spreads: Sequence[float | None] = (*SPREADS, None),
    drawings: Sequence[str] = (APART, A_ROW, PAIRS),
    tell: Tell = lambda text: None,
    counts: Sequence[int] = COUNTS,
) -> list[Rates]:
    """Every way of drawing at every spread (``None``: as recorded), in reports of every number of cells."""
    return [
        rates(record, how, spread, rules, reports, cells, 0, tell)
        for how in drawings
        for spread in spreads
        for cells in counts
    ]


def kept(found: Sequence[Rates]) -> bool:
    """Whether the rates are what the verdict promises: alarms wherever reports were judged, power where blocks are
    independent or pairs. Not if all of that is too noisy to be judged: then nothing has been shown."""
    return bool(_shown(found)) and all(_kept(rate) for rate in found)


def _shown(found: Sequence[Rates]) -> list[Rates]:
    """Independent blocks and pairs that could be judged."""
    return [rate for rate in found if rate.blocks is not None and rate.how != A_ROW]


def _kept(rate: Rates) -> bool:
    if rate.blocks is None:
        return True  # the tool says that so noisy a record cannot be judged
    quiet = rate.alarms <= ALARMS * rate.reports and rate.upper <= ALARMS_UPPER
    # At the margin alarms are as frequent as is allowed, so chance may bring a few more than that.
    quiet = quiet and lower_bound(rate.margin_alarms, rate.reports) <= ALARMS
    return quiet and (rate.how == A_ROW or rate.seen >= POWER)


def formatted(record: Record, found: Sequence[Rates], rules: Rules, kind: str, width: int | None, colour: bool) -> str:
    """``table``, ``md`` or ``json``."""
    if kind == "json":
        return json.dumps(document(record, found, rules), indent=1, allow_nan=False) + "\n"
    table = _table(record, found, rules)
    conclusion = concluded(found)
    return (
        f"**{conclusion}**\n\n{markdown(table)}" if kind == "md" else f"{conclusion}\n\n{render(table, width, colour)}"
    )


def concluded(found: Sequence[Rates]) -> str:
    """One line."""
    shown = _shown(found)
    if not shown:
        return "too noisy here to judge anything with blocks that can be paid for; nothing is shown"
    alarms = max(rate.alarms / rate.reports for rate in found if rate.blocks is not None)
    text = f"false alarms: at most {100 * alarms:.2g} % of reports without any difference"
    text += f"; power: at least {100 * min(rate.seen for rate in shown):.3g} %"
    return text + ("" if kept(found) else "; this is NOT what the verdict promises")


def document(record: Record, found: Sequence[Rates], rules: Rules) -> dict[str, Any]:
    """Plain JSON types."""
    rows = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(r).items()
        }
        for r in found
    ]
    for row, rate in zip(rows, found, strict=True):
        row["alarms_upper"] = rate.upper if rate.reports else None
    return {
        "schema": 1,
        "kept": kept(found),
        "conclusion": concluded(found),
        "recorded": {"what": record.about, "spread": record.spread, "neighbours": _neighbours(record)},
        "rules": asdict(rules),
        "cells": sorted({rate.cells for rate in found}),
        "rates": rows,
    }


def _table(record: Record, found: Sequence[Rates], rules: Rules) -> Table:
    header = ("blocks", "CV", "cells", "asked for", "A/A alarms", "at margin", "declined", "power")
    lines = []
    for rate in found:
        cv = f"{100 * rate.spread:.2g} %"
        if rate.blocks is None:
            lines.append((_HOW[rate.how], cv, str(rate.cells), "too many", "-", "-", "-", "-"))
            continue
        assert rate.asked is not None
        lines.append(
            (
                _HOW[rate.how],
                cv,
                str(rate.cells),
                f"{rate.blocks} ({rate.asked[0]}-{rate.asked[1]})",
                f"{_percent(rate.alarms, rate.reports)} (≤ {100 * rate.upper:.2g} %)",
                _percent(rate.margin_alarms, rate.reports),
                _percent(rate.undecided, rate.reports),
                f"{100 * rate.seen:.1f} %",
            )
        )
    tries = max((rate.reports for rate in found), default=0)
    notes = (
        f"real: {record.about}, CV {100 * record.spread:.2g} %, neighbours' rank correlation {_neighbours(record):.2f}",
        f"drawn: {tries} reports of so many cells from those blocks, their deviations scaled to each CV, bursts and "
        "drift kept; base and head do not differ (A/A), or head is slower by exactly the margin",
        f"simulated: the slowdown of {100 * rules.effect:g} %, by which head's times are multiplied",
        f"asked for: blocks per arm, or pairs, after a first reading of {PILOT}; median and range; power is over all",
        f"stored, in a row: all runs of a file less than {PAUSE / 60:g} min apart: they count as one and are declined; "
        "leave pauses between them, or use `rwkv-bench ab`",
    )
    return Table("error rates of the verdict", header, tuple(lines), notes, ("blocks",), ("declined", "at margin"))


def _neighbours(record: Record) -> float:
    return autocorrelation(np.median(record.logs, axis=1))


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.3g} %" if of else "-"
