"""Pairs of blocks of one job -> the comparison, and the rows that keep what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.rows import Row
from reports.verdict.comparison import Comparison, Judged, Line, names_of, typical_of
from reports.verdict.decision import UNDECIDED, Answer, Rules, judge, prepared
from reports.verdict.permutation import Arms


class Looks:
    """Readings of pairs while they are measured: an answer once given stands.

    Each of ``rules.looks`` readings has its share of ``rules.alpha``, over the cells and metrics that it is given.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.answers: dict[Any, Answer] = {}

    def read(self, arms: Mapping[Any, Arms]) -> dict[Any, Answer]:
        """The answer for each key, as far as it is known now."""
        ready, _ = prepared(list(arms.values()))
        for key, answer in zip(arms, judge(ready, self.rules), strict=True):
            before = self.answers.get(key)
            if before is None or before.decision == UNDECIDED:
                self.answers[key] = answer
        return self.answers


def arms_of(base: Sequence[Sequence[float]], head: Sequence[Sequence[float]]) -> Arms:
    """Samples in ns of every block of each side -> means of the blocks' logarithms, paired."""
    sides = [np.array([np.log(block).mean() for block in side]) if len(side) else np.empty(0) for side in (base, head)]
    return Arms(sides[0], sides[1], True)


def line_of(row: Row, arms: Arms, answer: Answer) -> Line:
    """``row``: of head, with its metric; its samples are not looked at."""
    values = [typical_of(row, side) for side in (arms.base, arms.head)]
    return Line(names_of(row), row.metric, row.unit, values[0], values[1], answer)


def comparison(
    names: tuple[str, str],
    rules: Rules,
    lines: Sequence[Line],
    parity: Sequence[Judged],
    notes: Sequence[str],
    missing: Sequence[str] = (),
) -> Comparison:
    """What is reported of one job."""
    return Comparison(names, rules, True, tuple(lines), tuple(parity), tuple(missing), notes=tuple(notes))


def side_row(row: Row, blocks: Sequence[Sequence[float]], about: Mapping[str, Any]) -> Row:
    """All blocks of one side, cell and metric as one row: its samples, and which of them form a block."""
    samples = [float(ns) for block in blocks for ns in block]
    starts = np.cumsum([0, *(len(block) for block in blocks)]).tolist()
    spans = [{"start": start, "count": len(block)} for start, block in zip(starts, blocks, strict=False)]
    value = typical_of(row, np.array([np.log(block).mean() for block in blocks])) if blocks else None
    kept = {**row.to_dict(), "samples": samples, "blocks": spans, "value": value, "interval": None, "reason": None}
    return Row.from_dict({**kept, "ab": dict(about)})


__all__ = ["Looks", "arms_of", "comparison", "line_of", "side_row"]
