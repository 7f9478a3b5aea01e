"""Which cells of two files are one.

A cell is what was measured, on which machine, with which weights: two machines of one short name are two cells, and so
are two checkpoints of one path. Where a file does not say one of these, its cell is the only one it can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.rows import Row, cell
from reports.cells import machine_of


@dataclass(frozen=True)
class Key:
    """One cell; ``what``: without machine and weights, and without the driver, which parity rows do not have.

    machine, weights  full name, and sha256; empty where the rows do not say
    """

    what: tuple[Any, ...]
    machine: str
    weights: str

    def may_be(self, other: Key) -> bool:
        """Whether nothing that both say tells them apart."""
        both = ((self.machine, other.machine), (self.weights, other.weights))
        return self.what == other.what and all(a == b or not a or not b for a, b in both)


def key_of(row: Row) -> Key:
    """The cell of a row."""
    return Key(cell(replace(row, driver=None, quality=None)), machine_of(row), row.model_sha256 or "")


def paired(base: Iterable[Key], head: Iterable[Key]) -> list[tuple[Key, Key]]:
    """Cells of base with what they are in head, in base's order."""
    left, right = dict.fromkeys(base), dict.fromkeys(head)
    found = {key: key for key in left if key in right}
    by_what: dict[tuple[Any, ...], tuple[list[Key], list[Key]]] = {}
    for side, keys in enumerate((left, right)):
        for key in keys:
            if key not in found:
                by_what.setdefault(key.what, ([], []))[side].append(key)
    for ours, theirs in by_what.values():
        for key in ours:
            mates = [other for other in theirs if key.may_be(other)]
            if len(mates) == 1 and sum(mates[0].may_be(other) for other in ours) == 1:
                found[key] = mates[0]
    return [(key, found[key]) for key in left if key in found]


def parted(base: Sequence[Key], head: Sequence[Key], names: tuple[str, str]) -> list[str]:
    """Why cells that only base has and cells that only head has are not one, where only machine or weights differ."""
    said: dict[str, int] = {}
    for key in dict.fromkeys(base):
        for other in dict.fromkeys(other for other in head if other.what == key.what):
            if key.machine and other.machine and key.machine != other.machine:
                text = f"measured on {key.machine} in {names[0]}, on {other.machine} in {names[1]}"
            elif key.weights == other.weights or not key.weights or not other.weights:
                text = f"more than one cell of {names[1]} may be that of {names[0]}, which does not say all of it"
            else:
                text = f"with weights {key.weights[:12]} in {names[0]}, {other.weights[:12]} in {names[1]}"
            said[text] = said.get(text, 0) + 1
    return [f"not compared, {count} cell{'s' * (count != 1)}: {text}" for text, count in said.items()]
