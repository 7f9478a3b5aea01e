"""Why a result is wrong: the hypothesis that reproduces what the backend shows, or else a description in figures.

In the order in which an answer is worth most: what made a value that is not finite; a wrong computation that
reproduces what is shown; an arithmetic coarser than declared; a pattern. Several hypotheses that reproduce it
alike are all named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.compare import nrms
from harness.localize.decoder import Decoder, group_of
from harness.localize.describe import shown_elsewhere, wrong_lines
from harness.localize.evidence import Evidence
from harness.localize.fitted import columns_that_miss, described, explained, one_weight
from harness.localize.hypotheses_products import GATES, PRODUCTS
from harness.localize.match import Match, Place, matches, place
from harness.localize.match_whole import matches_of_whole, whole
from harness.localize.nonfinite import non_finite
from harness.localize.pattern import pattern_of_whole
from harness.localize.precision import coarser, coarser_whole
from harness.tolerance import K

NON_FINITE, HYPOTHESIS, PRECISION, PATTERN, UNKNOWN = "non-finite", "hypothesis", "precision", "pattern", "unknown"

#: Matches that are named; beyond these, only how many.
_NAMED = 4


@dataclass(frozen=True)
class Cause:
    """Why a result is wrong.

    kind   ``non-finite``, ``hypothesis`` (a wrong computation reproduces it), ``precision``, ``pattern`` (described,
           not explained) or ``unknown``
    text   in words and figures, one paragraph
    names  of the hypotheses that reproduce it, the nearest first
    """

    kind: str
    text: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


def explain(evidence: Evidence) -> Cause:
    """The cause of one fault, from all that is known about it. Never raises for want of evidence."""
    with np.errstate(all="ignore"):
        broken = non_finite(evidence)
        if broken:
            return Cause(NON_FINITE, broken)
        found = place(evidence)
        if found is not None:
            return _of_place(found, evidence)
        return _of_whole(evidence)


def _of_place(found: Place, evidence: Evidence) -> Cause:
    if found.got.shape != found.right.shape:
        return Cause(PATTERN, f"{found.step.point} has shape {found.got.shape} where {found.right.shape} is right")
    tried = matches(found, Decoder(evidence.original, found.weights, evidence.scheme))
    if tried:
        return _matched(found.step.point, tried)
    return _without_match(found, evidence)


def _without_match(found: Place, evidence: Evidence) -> Cause:
    """A pattern that explains it, a coarser arithmetic, or figures."""
    point, got, right = found.step.point, found.got, found.right
    bound = K * found.unavoidable(None, right)
    error = nrms(got, right)
    if error <= bound and not wrong_lines(got, right, bound)[0].size:
        return Cause(UNKNOWN, f"{point} is right for what it was given, to {error:.1e} ({bound:.1e} is allowed)")
    elsewhere = shown_elsewhere(got, {**found.others, **found.known}, found.step.name, right, bound)
    text = elsewhere or _columns(found, evidence, bound) or explained(got, right, bound)
    if text:
        return Cause(PATTERN, f"{point}: {text}; error {error:.1e} where {bound:.1e} is allowed")
    precision = coarser(found)
    if precision:
        return Cause(PRECISION, f"{point}: {precision}")
    return Cause(PATTERN, f"{point}: no known defect reproduces it: {described(got, right, bound)}")


def _columns(found: Place, evidence: Evidence, bound: float) -> str:
    """Of a product: a single weight that is wrong, or groups of inputs that count otherwise."""
    name = found.step.name
    if name not in PRODUCTS or name in GATES:
        return ""
    source, matrix = PRODUCTS[name]
    full = found.step.at + matrix
    try:
        x = found.part_right()(source)
    except LookupError:
        return ""
    weight, group = found.weights[full].array(np.float64), group_of(evidence.scheme, full) or 32
    one = one_weight(found.got, found.right, x, weight, bound)
    return one or columns_that_miss(found.got, x, weight, group, bound)


def _matched(point: str, tried: Sequence[Match]) -> Cause:
    names = tuple(match.name for match in tried)
    if len(tried) == 1:
        return Cause(HYPOTHESIS, f"{point}: {tried[0]}", names)
    named = " | ".join(str(match) for match in tried[:_NAMED])
    more = f" | and {len(tried) - _NAMED} more" if len(tried) > _NAMED else ""
    text = f"{point}: {len(tried)} defects cannot be told apart here: {named}{more}"
    return Cause(HYPOTHESIS, text, names)


def _of_whole(evidence: Evidence) -> Cause:
    where = _where(evidence)
    found = whole(evidence)
    if found is None:
        return Cause(
            UNKNOWN, f"{where}: neither results nor state nor logits are shown that a cause could be told from"
        )
    tried = matches_of_whole(found)
    if tried:
        return _matched(where, tried)
    precision = coarser_whole(found)
    if precision:
        return Cause(PRECISION, f"{where}: {precision}")
    return Cause(PATTERN, f"{where}: {pattern_of_whole(found)}")


def _where(evidence: Evidence) -> str:
    return evidence.point or ("the model" if evidence.layer is None else f"layer {evidence.layer}")
