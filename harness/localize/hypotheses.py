"""Wrong computations that a backend may make, as data: which operations, what they compute instead, in words.

The catalogue is in the files ``hypotheses_*``, one for each kind of operation. To add one, write what the wrong
operation computes, from what it may read, as :mod:`reference.operations` does for the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from harness.localize.part import Compute
from reference.operations import Here


class Hypothesis(NamedTuple):
    """A defect.

    name      short, unique within the catalogue
    sentence  what the backend does then
    computes  operation (``att.wkv``) -> what it computes
    rows      row of the state -> what is left there; for defects of what is handed on
    """

    name: str
    sentence: str
    computes: Mapping[str, Compute]
    rows: Mapping[int, Compute] = {}

    @property
    def points(self) -> str:
        """The operations, for people; empty for what only the state shows."""
        return ", ".join(self.computes)


#: A defect of several like operations: computes any of them, given its name.
Defect = Callable[[Here, str], Any]


def at(point: str, name: str, sentence: str, compute: Compute) -> Hypothesis:
    """A defect of one operation."""
    return Hypothesis(f"{point}: {name}", sentence, {point: compute})


def each(points: Sequence[str], name: str, sentence: str, defect: Defect) -> list[Hypothesis]:
    """A defect at each of some operations alone, and at all of them."""

    def bound(point: str) -> Compute:
        return lambda h: defect(h, point)

    alone = [at(point, name, sentence, bound(point)) for point in points]
    together = Hypothesis(f"{', '.join(points)}: {name}", sentence, {point: bound(point) for point in points})
    return [*alone, together] if len(points) > 1 else alone
