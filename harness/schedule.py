"""Who is loaded together, and in which order the loaded cells take their turns.

Cells that are measured one after the other differ by whatever the machine did in between. So those that
memory holds together take turns, in rounds: a random order, then the same backwards (A B C C B A), then
another. A drift that is linear in time cancels within each such pair of rounds, and no cell has a fixed
neighbour. What memory does not hold is measured in groups, one after the other and then back again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

from harness.plan import Cell

T = TypeVar("T")

#: Of the free memory, what cells that are loaded together may be expected to take.
SHARE = 0.7


def groups(
    cells: Sequence[Cell],
    needs: Callable[[Cell], int],
    free: int,
    apart: Callable[[Cell], bool],
) -> list[list[Cell]]:
    """Cells in their order, as many together as memory holds.

    needs  bytes of host memory that a cell is expected to take
    apart  whether a cell has a process of its own

    Cells of different models are never together (two large checkpoints do not fit), nor those in this process
    with different numbers of threads, since they share its thread pools. A cell on another machine, whose idle
    processes cannot be stopped from here, or on a GPU, whose free memory is not known beforehand, is alone.
    """
    found: list[list[Cell]] = []
    taken = 0
    for cell in cells:
        need, last = needs(cell), found[-1] if found else []
        fits = taken + need <= SHARE * free
        if last and fits and all(_sociable(cell, other, apart) for other in last):
            last.append(cell)
            taken += need
        else:
            found.append([cell])
            taken = need
    return found


def _sociable(cell: Cell, other: Cell, apart: Callable[[Cell], bool]) -> bool:
    """Whether two cells may be loaded at the same time."""
    for one in (cell, other):
        if one.hardware.host is not None or one.hardware.device != "cpu":
            return False
    if cell.model != other.model:
        return False
    return cell.threads == other.threads or apart(cell) or apart(other)


def rounds(items: Sequence[T], seed: int) -> Iterator[list[T]]:
    """Endless orders of ``items``: a random one, the same backwards, another random one, and so on."""
    random = Random(seed)
    while True:
        order = list(items)
        random.shuffle(order)
        yield order
        yield order[::-1]


def passes(found: Sequence[T]) -> Iterator[list[T]]:
    """Endless orders of groups: forwards, then backwards, so that the last one need not be loaded twice."""
    while True:
        yield list(found)
        yield list(found)[::-1]
