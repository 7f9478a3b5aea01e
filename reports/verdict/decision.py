"""From blocks to answers: slower than the margin allows, faster, no slower, or undecided and what is missing.

Four answers about the ratio r of speeds, head over base, of each cell; margin and effect are parts of base's speed:

    SLOWER     r < 1 - margin is certain                      a regression
    FASTER     r > 1 / (1 - margin) is certain
    NO SLOWER  r > 1 - effect is certain                      whatever slowdown there is, is smaller than the effect
    UNDECIDED  none of these, with how many blocks would do

"Certain" is at a family-wise ``alpha`` over all cells of the report (Holm), for each kind of answer, and for as many
readings of the same comparison as ``looks`` says: each has alpha / looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reports.verdict import dependence
from reports.verdict.exact import fewest, least_p, least_pair_p
from reports.verdict.permutation import Arms, at_least, at_most, estimate, faster, slower
from reports.verdict.power import POWER, SPARE, Noise, detectable, needed, noise
from reports.verdict.spacing import needed_text

SLOWER, FASTER, NO_SLOWER, UNDECIDED = "SLOWER", "FASTER", "NO SLOWER", "UNDECIDED"


@dataclass(frozen=True)
class Rules:
    """What counts as slower, and how certain an answer must be.

    margin  part of base's speed that may be lost        effect  slowdown that must not be missed
    alpha   chance of any false answer of a kind in a whole report, over all its ``looks``
    """

    margin: float = 0.01
    effect: float = 0.05
    alpha: float = 0.01
    looks: int = 2

    @property
    def gap(self) -> float:
        """From the margin to the effect, in logarithms of time."""
        return math.log((1 - self.margin) / (1 - self.effect))

    def of_one(self, cells: int) -> float:
        """What the first of so many cells must reach."""
        return self.alpha / self.looks / max(1, cells)


@dataclass(frozen=True)
class Answer:
    """The verdict on one pair of arms.

    ratio       speed of head over base               interval  its 95 %, of this cell alone; None if too few blocks
    p           of SLOWER, adjusted for all cells (Holm): below ``alpha / looks`` it is one
    detectable  smallest slowdown, as a part of base's speed, that these blocks show with 95 %; None if none is
    blocks      runs per arm after merging, or pairs
    needed      of base and head each, or pairs, before merging; None: more than can be paid for
    """

    decision: str
    ratio: float
    interval: tuple[float, float] | None
    p: float
    detectable: float | None
    blocks: tuple[int, int]
    needed: int | None
    why: str


def prepared(cells: Sequence[Arms]) -> tuple[list[Arms], int]:
    """Arms with neighbours merged where they are alike, and how many became one.

    Pairs need no such care: whether head or base came first was decided by a coin for each, so their signs are
    independent whatever the machine did (:mod:`reports.verdict.permutation`).
    """
    if any(arms.paired for arms in cells):
        return [_countable(arms) for arms in cells], 1
    factor = dependence.merge_factor([arm for arms in cells for arm in (arms.base, arms.head)])
    merged = [Arms(dependence.merged(arms.base, factor), dependence.merged(arms.head, factor)) for arms in cells]
    return [_countable(arms) for arms in merged], factor


def judge(cells: Sequence[Arms], rules: Rules, merged: int = 1) -> list[Answer]:
    """The answer for each of a report's cells, whose blocks are independent or pairs; both of :func:`prepared`."""
    level = rules.alpha / rules.looks
    allowed, worst = -math.log(1 - rules.margin), -math.log(1 - rules.effect)
    able = [min(arms.sizes) > (0 if arms.paired else 1) for arms in cells]  # of one run its noise is unknown
    p_slower = [_p(slower(arms, allowed)) if ok else 1.0 for arms, ok in zip(cells, able, strict=True)]
    p_faster = [_p(faster(arms, -allowed)) if ok else 1.0 for arms, ok in zip(cells, able, strict=True)]
    p_bounded = [_p(faster(arms, worst)) if ok else 1.0 for arms, ok in zip(cells, able, strict=True)]
    adjusted = [holm(p) for p in (p_slower, p_faster, p_bounded)]
    found = []
    for i, arms in enumerate(cells):
        decision = UNDECIDED
        for kind, p in zip((SLOWER, FASTER, NO_SLOWER), adjusted, strict=True):
            if p[i] <= level:
                decision = kind
                break
        found.append(_answer(arms, decision, adjusted[0][i], rules, len(cells), merged))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: those at most alpha are the ones Holm's procedure rejects."""
    order = np.argsort(p, kind="stable")
    found, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = highest
    return found


def _answer(arms: Arms, decision: str, p: float, rules: Rules, cells: int, merged: int) -> Answer:
    n, m = arms.sizes
    alpha = rules.of_one(cells)
    if min(n, m) < 1:
        least = merged * (fewest(alpha, arms.paired) + SPARE)
        return Answer(decision, math.nan, None, 1.0, None, (n, m), least, "nothing to compare")
    ratio = math.exp(-float(estimate(arms)))
    low, high = math.exp(-float(at_most(arms, 0.025))), math.exp(-float(at_least(arms, 0.025)))
    interval = (low, high) if low > 0 and math.isfinite(high) else None
    left = noise(arms) if min(n, m) > 2 else None
    seen = math.inf if left is None else detectable(left, arms.paired, (n, m), alpha)
    shown = 1 - (1 - rules.margin) * math.exp(-seen) if math.isfinite(seen) else None
    wanted, why = _wanted(arms, left, ratio, rules, alpha)
    total = None if wanted is None else wanted * merged
    if decision == UNDECIDED:
        what = "pairs" if arms.paired else "runs of each side"
        more = "more than can be paid for" if total is None else f"{total - merged * min(n, m)} more {what}"
        why = f"{why}: {more}"
        if merged == 1 and not arms.paired and min(n, m) == 1:
            why = lone_run(total)
    else:
        why = ""
    return Answer(decision, ratio, interval, p, shown, (n, m), total, why)


def lone_run(needed: int | None) -> str:
    """What to do about a side that was measured by one process: the next one may differ by more than its blocks do."""
    return f"one run says nothing of how runs differ: {needed_text(needed)}"


def _wanted(arms: Arms, left: Noise | None, ratio: float, rules: Rules, alpha: float) -> tuple[int | None, str]:
    """How many blocks of each side, or pairs, would do, and what for."""
    have, least = min(arms.sizes), fewest(alpha, arms.paired) + SPARE
    reached = least_pair_p(have) if arms.paired else least_p(*arms.sizes)
    if left is None or not np.isfinite(left[0]).all():
        return max(least, have + 1), "too few to know the noise; at least"
    asked = needed(left, arms.paired, rules.gap, alpha)
    effect = f"{100 * rules.effect:g} %"
    if asked is None:
        return None, f"too noisy to see {effect}"
    if asked > have or reached > alpha:
        return max(asked, least, have + 1), f"to see {effect}"
    # There are enough for the effect; the ratio lies between effect and margin.
    room = max(math.log((1 - rules.margin) / ratio), math.log(ratio / (1 - rules.effect)), 1e-9)
    between = needed(left, arms.paired, room, alpha)
    return (None if between is None else max(between, 2 * have)), f"between the margin and {effect}; to tell, about"


def _countable(arms: Arms) -> Arms:
    """No more blocks than can be counted: neighbours, or neighbouring pairs, merged."""
    factor = max(dependence.countable(arms.base), dependence.countable(arms.head))
    if factor == 1:
        return arms
    return Arms(dependence.merged(arms.base, factor), dependence.merged(arms.head, factor), arms.paired)


def _p(value: np.ndarray) -> float:
    return float(value)


__all__ = [
    "FASTER",
    "NO_SLOWER",
    "POWER",
    "SLOWER",
    "UNDECIDED",
    "Answer",
    "Arms",
    "Rules",
    "holm",
    "judge",
    "lone_run",
    "prepared",
]
