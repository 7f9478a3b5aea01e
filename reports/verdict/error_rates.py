"""The error rates of the verdict itself: false alarms over reports without any difference, and power.

A/A        parts of reports in which any cell is SLOWER, though base and head are the same blocks
at margin  the same where head is slower by exactly the margin, the least favourable of what is allowed
power      part of the cells with a slowdown of ``effect`` that are SLOWER, with as many blocks as the tool asks
           for after a first reading of ``PILOT`` blocks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from reports.verdict import dependence, spacing
from reports.verdict.decision import Rules
from reports.verdict.exact import MOST_BLOCKS, fewest
from reports.verdict.permutation import Arms, slower
from reports.verdict.power import SPARE, needed, noise
from reports.verdict.resample import A_ROW, PAIRS, Record, arms, draw

#: Cells of a report: few of them show least of how alike neighbours are, many raise most alarms.
COUNTS = (1, 2, 4, 40)

CELLS, REPORTS = COUNTS[-1], 2000

#: Blocks of a first reading, from which the tool says how many it needs, and how many such readings are tried.
PILOT, PILOTS = 20, 40

#: Reports are drawn in portions of so many blocks at most.
_AT_ONCE = 2_000_000

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rates:
    """Of one way of drawing at one spread, in reports of so many ``cells``.

    blocks                  per arm, the median of what was asked for (None: too many)
    alarms, margin_alarms   reports with an alarm, of ``reports``
    undecided               A/A reports that the tool declined to judge: too few independent blocks
    seen                    part of the slowed cells that were found, of ``tried``
    """

    record: str
    how: str
    cells: int
    spread: float
    blocks: int | None
    asked: tuple[int, int] | None
    reports: int
    alarms: int
    margin_alarms: int
    undecided: int
    seen: float
    tried: int

    @property
    def upper(self) -> float:
        """95 % upper bound of the false-alarm rate, exact (Clopper & Pearson, Biometrika 26 (1934), 404)."""
        return upper_bound(self.alarms, self.reports)


def rates(
    record: Record,
    how: str,
    spread: float | None,
    rules: Rules,
    reports: int = REPORTS,
    cells: int = CELLS,
    seed: int = 0,
    tell: Tell = lambda text: None,
) -> Rates:
    """False alarms and power where deviations of ``record`` are scaled to ``spread`` (None: as recorded)."""
    used = record if spread is None else record.scaled(spread)
    rng = np.random.default_rng(seed)
    asked = ask(used, how, rules, cells, rng)
    known = [n for n in asked if n is not None]
    if len(known) <= len(asked) // 2:
        return Rates(record.name, how, cells, used.spread, None, None, 0, 0, 0, 0, math.nan, 0)
    blocks = int(np.median(known))
    alarms = at_margin = undecided = 0
    edge = -math.log(1 - rules.margin)
    for taken in _reports(used, how, reports, cells, blocks, rng):
        same = counted(taken, used, how)
        for level, found in ((0.0, same), (edge, Arms(same.base, same.head + edge, same.paired))):
            raised, declined = _alarms(found, rules)
            alarms += raised * (level == 0)
            at_margin += raised * (level > 0)
            undecided += declined * (level == 0)
        tell(f"{how}, {cells} cells, spread {100 * used.spread:.1f} %: {blocks} blocks, {alarms} false alarms so far")
    seen, tried = power(used, how, rules, known, cells, rng)
    low_high = (min(known), max(known))
    return Rates(
        record.name, how, cells, used.spread, blocks, low_high, reports, alarms, at_margin, undecided, seen, tried
    )


def counted(found: Arms, record: Record, how: str) -> Arms:
    """Arms of the blocks that count one by one, each block standing for a run: all that were drawn from anywhere, as
    runs with pauses between them; of a row, those as far apart in time as :mod:`reports.verdict.spacing` asks."""
    if how != A_ROW:
        return found
    spans = [(i * record.step, (i + 1) * record.step) for i in range(found.sizes[0])]
    return Arms(spacing.apart(found.base, spans), spacing.apart(found.head, spans))


def ask(record: Record, how: str, rules: Rules, cells: int, rng: np.random.Generator) -> list[int | None]:
    """What the tool asks for after each of ``PILOTS`` first readings of a slowed cell."""
    effect = -math.log(1 - rules.effect)
    base, head = draw(record, how, PILOTS, 1, PILOT, rng)
    first = counted(arms(base[:, 0], head[:, 0] + effect, how), record, how)
    alpha = rules.of_one(cells)
    found: list[int | None] = []
    if first.sizes[0] < 2:  # of one sitting the noise is unknown
        return [fewest(alpha) + SPARE] * PILOTS
    for i in range(PILOTS):
        one = Arms(first.base[i], first.head[i], first.paired)
        n = needed(noise(one), one.paired, rules.gap, alpha)
        found.append(None if n is None or n > MOST_BLOCKS else n)
    return found


def power(
    record: Record, how: str, rules: Rules, asked: list[int], cells: int, rng: np.random.Generator
) -> tuple[float, int]:
    """Part of slowed cells found, over everything that was asked for; each beside others that are not slower."""
    effect, alpha = -math.log(1 - rules.effect), rules.of_one(cells)
    found, drawn = [], 10 * max(1, CELLS // cells)
    for n in asked:
        base, head = draw(record, how, drawn, cells, n, rng)
        slowed = counted(arms(base, head + effect, how), record, how)
        if how == A_ROW:
            found.append(np.mean([_found_in_a_row(slowed, i, rules, alpha) for i in range(drawn)]))
        else:
            found.append(np.mean(slower(slowed, -math.log(1 - rules.margin)) <= alpha))
    return float(np.mean(found)), drawn * cells * len(asked)


def upper_bound(found: int, of: int, confidence: float = 0.95) -> float:
    """The largest rate with which so few would be found by chance."""
    if found >= of:
        return 1.0
    low, high = found / of, 1.0
    for _ in range(60):
        p = (low + high) / 2
        log_terms = [
            math.lgamma(of + 1)
            - math.lgamma(k + 1)
            - math.lgamma(of - k + 1)
            + k * math.log(p)
            + (of - k) * math.log1p(-p)
            for k in range(found + 1)
        ]
        low, high = (p, high) if math.fsum(map(math.exp, log_terms)) > 1 - confidence else (low, p)
    return high


def lower_bound(found: int, of: int, confidence: float = 0.95) -> float:
    """The smallest rate with which so many would be found by chance."""
    return 1 - upper_bound(of - found, of, confidence)


def _reports(
    record: Record, how: str, reports: int, cells: int, blocks: int, rng: np.random.Generator
) -> Iterator[Arms]:
    size = max(1, _AT_ONCE // (cells * blocks * record.logs.shape[1]))
    for start in range(0, reports, size):
        yield arms(*draw(record, how, min(size, reports - start), cells, blocks, rng), how)


def _alarms(found: Arms, rules: Rules) -> tuple[int, int]:
    """Reports of a stack ``(reports, cells, blocks)`` with an alarm, and those that cannot be judged."""
    cells = found.base.shape[1]
    alpha, allowed = rules.of_one(cells), -math.log(1 - rules.margin)
    if found.paired:
        return int((slower(found, allowed) <= alpha).any(axis=1).sum()), 0
    raised = declined = 0
    factors = np.array([_factor(found, i) for i in range(len(found.base))])
    for factor in np.unique(factors).tolist():
        these = factors == factor
        part = Arms(dependence.merged(found.base[these], factor), dependence.merged(found.head[these], factor))
        if part.sizes[0] < fewest(alpha):
            declined += int(these.sum())
        else:
            raised += int((slower(part, allowed) <= alpha).any(axis=1).sum())
    return raised, declined


def _factor(found: Arms, report: int) -> int:
    return dependence.merge_factor([*found.base[report], *found.head[report]])


def _found_in_a_row(slowed: Arms, report: int, rules: Rules, alpha: float) -> float:
    factor = _factor(slowed, report)
    part = Arms(dependence.merged(slowed.base[report], factor), dependence.merged(slowed.head[report], factor))
    if part.sizes[0] < fewest(alpha):
        return 0.0
    return float(np.mean(slower(part, -math.log(1 - rules.margin)) <= alpha))


__all__ = ["PAIRS", "Rates", "ask", "counted", "lower_bound", "power", "rates", "upper_bound"]
