"""Two files, or the pairs of one job, compared: a line per cell and metric, parity, what is missing, the conclusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from harness.rows import Row
from harness.stats import derived
from reports.cells import machine_of
from reports.verdict.blocks import File, Series
from reports.verdict.decision import FASTER, NO_SLOWER, SLOWER, UNDECIDED, Answer, Rules, judge, prepared
from reports.verdict.pairing import Key, paired, parted
from reports.verdict.parity import BROKEN, Judged, flaky, judged, judged_pairs
from reports.verdict.permutation import Arms
from reports.verdict.spacing import PAUSE, needed_text

_FIELDS = {it.name for it in fields(Row)}
_NAMES = ("hardware", "device", "model", "backend", "scheme", "threads")


@dataclass(frozen=True)
class Line:
    """One cell and metric: what it is, medians in ``unit``, and the answer."""

    names: Mapping[str, str]
    metric: str
    unit: str
    base: float
    head: float
    answer: Answer
    left_out: int = 0


@dataclass(frozen=True)
class Comparison:
    """Everything that is reported.

    names    of base and head            merged  how many neighbouring runs became one, being alike
    missing  cells and metrics that only base has         added    that only head has
    """

    names: tuple[str, str]
    rules: Rules
    paired: bool
    lines: tuple[Line, ...]
    parity: tuple[Judged, ...]
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    merged: int = 1
    notes: tuple[str, ...] = ()

    def of(self, decision: str) -> list[Line]:
        """Lines with that answer."""
        return [line for line in self.lines if line.answer.decision == decision]

    @property
    def wrong(self) -> list[Judged]:
        """Cells that were right and are not any more."""
        return [cell for cell in self.parity if cell.regression]

    @property
    def regression(self) -> bool:
        """Whether anything got worse for certain."""
        return bool(self.of(SLOWER) or self.wrong)

    @property
    def open(self) -> bool:
        """Whether anything is left without an answer: undecided, missing, flaky, or nothing compared at all."""
        untold = any(cell.untold for cell in self.parity)
        return bool(self.of(UNDECIDED) or self.missing or untold or not (self.lines or self.parity))

    @property
    def conclusion(self) -> str:
        """One line."""
        return _conclusion(self)


def compare(base: File, head: File, rules: Rules, names: tuple[str, str] = ("base", "head")) -> Comparison:
    """Two stored files: their runs stand in no relation to each other, so they are not pairs."""
    shared = _shared(base, head)
    arms = [Arms(base.series[ours].apart, head.series[theirs].apart) for ours, theirs in shared]
    ready, merged = prepared(arms)
    answers = judge(ready, rules, merged)
    lines = [_line(base.series[b], head.series[h], answer) for (b, h), answer in zip(shared, answers, strict=True)]
    parity, flaky = _parity(base, head, rules, names)
    ours, theirs = {b for b, _ in shared}, {h for _, h in shared}
    gone = [key for key in base.series if key not in ours]
    new = [key for key in head.series if key not in theirs]
    silent = {key.what for key, _ in gone}
    broken = [key for key, verdict in head.verdicts.items() if verdict.worst in BROKEN]
    missing = [_label(base.series[key].row) for key in gone if not any(key[0].may_be(other) for other in broken)]
    lost = [_label(_known(base, head, key), "parity") for key, cell in parity if cell.lost and key.what not in silent]
    return Comparison(
        names,
        rules,
        False,
        tuple(lines),
        tuple(cell for _, cell in parity),
        (*missing, *lost),
        tuple(_label(head.series[key].row) for key in new),
        merged,
        (*parted([key for key, _ in gone], [key for key, _ in new], names), *flaky, *_notes(base, head, names)),
    )


def _shared(base: File, head: File) -> list[tuple[tuple[Key, str], tuple[Key, str]]]:
    """Cells and metrics of base with what they are in head."""
    found = {}
    for metric in dict.fromkeys(metric for _, metric in base.series):
        sides = ([key for key, of in file.series if of == metric] for file in (base, head))
        found.update({(ours, metric): (theirs, metric) for ours, theirs in paired(*sides)})
    return [(key, found[key]) for key in base.series if key in found]


def _parity(base: File, head: File, rules: Rules, names: tuple[str, str]) -> tuple[list[tuple[Key, Judged]], list[str]]:
    """What was judged, and notes on what fails at times."""
    every = judged_pairs(base.verdicts, head.verdicts)
    found, notes = [], []
    for key, before, after in every:
        row = _known(base, head, key)
        found.append((key, judged(names_of(row), before, after, rules.of_one(len(every)))))
        for name, side in zip(names, (before, after), strict=True):
            notes += flaky(name, _label(row, "parity"), side)
    return found, notes


def names_of(row: Row) -> dict[str, str]:
    """What a reader calls a cell by."""
    found = {name: "" if getattr(row, name) is None else str(getattr(row, name)) for name in _NAMES}
    if row.workload is not None:
        batch = f"×{row.workload.batch}" if row.workload.batch > 1 else ""
        found["workload"] = f"{row.workload.prompt_tokens}+{row.workload.decode_tokens}{batch}"
    found["process"] = "own" if row.isolated else ""
    found["machine"], found["weights"] = machine_of(row), (row.model_sha256 or "")[:12]
    return found


def varying(cells: Sequence[Mapping[str, str]]) -> list[str]:
    """Names in which the cells differ; backend and scheme always."""
    every = dict.fromkeys(name for cell in cells for name in cell)
    return [name for name in every if name in ("backend", "scheme") or len({c.get(name, "") for c in cells}) > 1]


def _line(base: Series, head: Series, answer: Answer) -> Line:
    for side, name in ((base, "base"), (head, "head")):
        if not side.runs:
            answer = replace(answer, why=f"all {side.left_out} blocks of {name} were disturbed; measure it again")
        elif answer.decision == UNDECIDED and len(side.apart) < len(side.runs):
            joined = f"{len(side.runs)} runs of {name} less than {PAUSE / 60:g} min apart count as {len(side.apart)}"
            answer = replace(answer, why=f"{answer.why}; {joined}")
    values = [typical_of(side.row, side.times) for side in (base, head)]
    return Line(
        names_of(head.row), head.row.metric, base.row.unit, values[0], values[1], answer, base.left_out + head.left_out
    )


def typical_of(row: Row, logs: np.ndarray) -> float:
    """The median of ``(n,)`` runs or blocks, logarithms of ns, in the unit of the row's metric; NaN without any."""
    if not len(logs):
        return math.nan
    found = derived(_with_sample(row, float(np.exp(np.median(logs))))).value
    return math.nan if found is None else found


def _with_sample(row: Row, ns: float) -> Row:
    empty: dict[str, Any] = dict.fromkeys(_FIELDS & {"steps", "blocks", "warmup", "percentiles", "value", "interval"})
    return replace(row, samples=(ns,), extra={}, **empty)


def _known(base: File, head: File, key: Key) -> Row:
    return head.rows.get(key) or base.rows[key]


def _label(row: Row, metric: str | None = None) -> str:
    names = names_of(row)
    words = [names[name] for name in ("backend", "scheme", "model", "hardware") if names.get(name)]
    tokens = names.get("workload", "")
    return f"{' '.join(words)}, {names['threads'] or '?'} threads, {tokens} tokens: {metric or row.metric}"


def _notes(base: File, head: File, names: tuple[str, str]) -> tuple[str, ...]:
    found = []
    for file, name in zip((base, head), names, strict=True):
        if file.doubled:
            found.append(f"{name}: {file.doubled} rows are copies of others and count once")
        left_out = sum(series.left_out for series in file.series.values())
        if left_out:
            found.append(f"{name}: {left_out} blocks taken under disturbance are left out")
        if any(len(series.apart) < len(series.runs) for series in file.series.values()):
            found.append(f"{name}: runs less than {PAUSE / 60:g} min apart count as one; leave pauses, or use ab")
    return tuple(found)


def _conclusion(found: Comparison) -> str:
    slower, wrong, open_ = found.of(SLOWER), found.wrong, found.of(UNDECIDED)
    total = len(found.lines)
    percent = f"{100 * found.rules.margin:g} %"
    what = "pairs" if found.paired else "runs of each side"
    tail = []
    if found.regression:
        parts = [f"{len(slower)} of {total} slower than the margin of {percent} allows"] if slower else []
        parts += [f"{len(wrong)} {'fails' if len(wrong) == 1 else 'fail'} that ran right before"] if wrong else []
        text = "REGRESSION: " + ", ".join(parts)
    elif not total and not found.parity:
        text = "NOTHING TO COMPARE: no cell is in both"
    elif open_ and len(open_) == total:
        text = f"UNDECIDED: {_more(open_, found.merged, what)}"
    elif not total:
        text = "no regression of parity; no speed is in both"
    else:
        text = f"no regression: {len(found.of(NO_SLOWER))} of {total} no slower"
    if found.of(FASTER):
        tail.append(f"{len(found.of(FASTER))} faster")
    if open_ and not text.startswith("UNDECIDED"):
        tail.append(f"{len(open_)} undecided ({_more(open_, found.merged, what)})")
    if found.missing:
        tail.append(f"{len(found.missing)} missing")
    return ", ".join([text, *tail])


def _more(lines: Sequence[Line], merged: int, what: str) -> str:
    """How many more blocks would tell, of all undecided cells together."""
    lone = [line for line in lines if merged == 1 and what != "pairs" and min(line.answer.blocks) <= 1]
    others = [line for line in lines if line not in lone]
    lacking = [
        line.answer.needed - merged * min(line.answer.blocks) for line in others if line.answer.needed is not None
    ]
    wanted = max((line.answer.needed or 0 for line in lone), default=0)
    noisy = len(others) - len(lacking)
    told = [
        needed_text(wanted) if lone else "",
        f"up to {max(lacking)} more {what} would tell" if lacking else "",
    ]
    if noisy == len(lines):
        return f"too noisy to say how many {what} would do"
    if noisy:
        told.append(f"{noisy} of {len(lines)} {'is' if noisy == 1 else 'are'} too noisy")
    return "; ".join(text for text in told if text)


__all__ = ["Comparison", "Judged", "Line", "compare", "names_of", "typical_of", "varying"]
