"""A block, or what is before the first and after the last, each result computed when it is asked for.

:func:`reference.operations.run` computes everything in order. A hypothesis about one operation needs that operation
and what it reads, possibly what the right one would not have read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reference.forward import AA, ATT_X, FFN_X
from reference.numerics import Op
from reference.operations import BLOCK, FIRST, LAST, Here, Operation, recurrence
from reference.weights import Weights

#: Another computation of an operation; that of ``att.wkv`` gives the state too, as ``recurrence`` does.
Compute = Callable[[Here], Any]

ENDS: Mapping[str, Operation] = {**FIRST, **LAST}


class Unknown(LookupError):
    """A result that is neither known nor follows from what is known; its name."""


class Part:
    """Results by their name within the block: ``part("att.k")`` is ``(T, C)``.

    layer     of the block; ``None``: the embedding, ``ln0``, ``ln_out`` and the head
    past      the layer's state before the prompt ``(5, C)``; for ``None`` the tokens ``(T,)``
    known     results that are not to be computed; ``x``: the stream that enters the block, or ``ln_out``
    replaced  other computations, by operation
    """

    def __init__(
        self,
        weights: Weights,
        layer: int | None,
        past: np.ndarray,
        op: Op,
        known: Mapping[str, np.ndarray],
        replaced: Mapping[str, Compute] | None = None,
    ) -> None:
        self._operations = ENDS if layer is None else BLOCK
        self._made = {name: np.asarray(value, dtype=op.dtype) for name, value in known.items()}
        self._replaced = replaced or {}
        self._here = Here(self, weights, "" if layer is None else f"blocks.{layer}.", past, op)
        self._computing: set[str] = set()
        #: Names of what was asked for.
        self.read: set[str] = set()

    def __call__(self, name: str) -> np.ndarray:
        self.read.add(name)
        if name in self._made:
            return self._made[name]
        if name not in self._operations:
            raise Unknown(name)
        if name in self._computing:
            raise Unknown(f"{name}, which would follow from itself")
        self._computing.add(name)
        self._made[name] = self._compute(name)
        return self._made[name]

    def _compute(self, name: str) -> np.ndarray:
        usual: Compute = recurrence if name == "att.wkv" else self._operations[name].compute
        with np.errstate(all="ignore"):  # what overflows here may be what the backend does
            made = self._replaced.get(name, usual)(self._here)
        if name == "att.wkv":
            made, self._sums = made
        return np.asarray(made)

    def know(self, results: Mapping[str, np.ndarray], state: np.ndarray) -> None:
        """Take over what others have computed; ``state``: rows after the prompt, right if ``att.wkv`` is."""
        self._made.update(results)
        self._sums = state[AA:]

    def state(self, rows: Sequence[int], other: Mapping[int, Compute] | None = None) -> np.ndarray:
        """Rows of the layer's state after the prompt; ``other``: what some of them are made of instead."""
        return np.stack([self._row(row, (other or {}).get(row)) for row in rows])

    def _row(self, row: int, other: Compute | None) -> np.ndarray:
        if other is not None:
            return np.asarray(other(self._here))
        if row in (ATT_X, FFN_X):
            return np.asarray(self("ln1" if row == ATT_X else "ln2")[-1])
        self("att.wkv")
        return np.asarray(self._sums[row - AA])


def needed(layer: int | None, point: str, known: Mapping[str, Any]) -> list[str]:
    """The operations that ``point`` is computed by, given ``known``; raises :class:`Unknown`."""
    operations, found = (ENDS if layer is None else BLOCK), []

    def visit(name: str) -> None:
        if name in known or name in found:
            return
        if name not in operations:
            raise Unknown(name)
        for source in operations[name].inputs:
            visit(source)
        found.append(name)

    visit(point)
    return found
