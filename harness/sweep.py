"""``--sweep prompt=64..2048``: every cell of a plan at several points along one axis.

A range of lengths or of batches doubles from its first value; one of threads takes every value up to
:data:`EVERY` of them and doubles beyond. A comma list is taken as it is. The last value is always a point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.names import did_you_mean
from harness.plan import Cell, Plan
from reference.errors import InputError

#: A range of threads with no more values than this has each of them.
EVERY = 8

#: Points of one sweep, and the largest value that makes sense, so that a slip of the finger is told at once.
MOST_POINTS, MOST_VALUE = 64, 1 << 20


class BadSweep(InputError):
    """A sweep that cannot be; one line."""


@dataclass(frozen=True)
class Sweep:
    """Points along one axis of :data:`AXES`, in rising order."""

    axis: str
    points: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.axis}={','.join(map(str, self.points))}"


#: Axis -> the cell at a point.
AXES: dict[str, Callable[[Cell, int], Cell]] = {
    "prompt": lambda cell, n: replace(cell, workload=replace(cell.workload, prompt_tokens=n)),
    "decode": lambda cell, n: replace(cell, workload=replace(cell.workload, decode_tokens=n)),
    "batch": lambda cell, n: replace(cell, workload=replace(cell.workload, batch=n)),
    "threads": lambda cell, n: replace(cell, threads=n),
}


def parse(text: str) -> Sweep:
    """``prompt=64..2048``, ``threads=1..4``, ``batch=1,3,8``. Raises :class:`BadSweep`."""
    axis, equals, values = text.partition("=")
    if axis not in AXES or not equals:
        raise BadSweep(f"{text!r} is no sweep; {did_you_mean(axis, AXES)}AXIS=FIRST..LAST with {', '.join(AXES)}")
    first, dots, last = values.partition("..")
    if dots:
        points = _range(axis, _whole(first, text), _whole(last, text))
    else:
        points = tuple(_whole(value, text) for value in values.split(","))
    if list(points) != sorted(set(points)):
        raise BadSweep(f"sweep {text!r}: values must rise")
    if not 2 <= len(points) <= MOST_POINTS:
        raise BadSweep(f"sweep {text!r} has {len(points)} point(s); 2 to {MOST_POINTS} make a sweep")
    return Sweep(axis, points)


def swept(planned: Plan, sweep: Sweep | None) -> Plan:
    """The plan with every cell at every point, the points of one cell together."""
    if sweep is None:
        return planned
    at = AXES[sweep.axis]
    return replace(planned, cells=tuple(at(cell, point) for cell in planned.cells for point in sweep.points))


def _range(axis: str, first: int, last: int) -> tuple[int, ...]:
    if axis == "threads" and last - first < EVERY:
        return tuple(range(first, last + 1))
    points = []
    while first < last:
        points.append(first)
        first *= 2
    return (*points, last)


def _whole(word: str, text: str) -> int:
    if not word.isascii() or not word.isdigit() or len(word) > 9 or not 1 <= int(word) <= MOST_VALUE:
        raise BadSweep(f"sweep {text!r}: {word[:20]!r} is not a whole number from 1 to {MOST_VALUE}")
    return int(word)
