"""The reference beside a backend that is being traced, one layer at a time.

Nothing is dumped: of truth, and of what the backend shows, one layer is held; of the emulated runs, which give the
bounds, one layer while it is computed and the stream after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from reference.config import Config
from reference.forward import AA, ATT_X, FFN_X, PP, initial_state
from reference.numerics import Op
from reference.operations import Step, compute, here, recurrence, steps
from reference.weights import Weights

Results = Mapping[str, np.ndarray]


def layers(config: Config) -> Iterator[list[Step]]:
    """The operations of a model in execution order: those before the first block, each block's, those after."""
    for _, group in groupby(steps(config), key=_layer):
        yield list(group)


def _layer(step: Step) -> int:
    if step.layer is not None:
        return step.layer
    return -1 if step.name in ("emb", "blocks.0.ln0") else 1 << 30


class Stream:
    """One run of the reference in the arithmetic of ``op``, of which only the present layer is kept."""

    def __init__(self, weights: Weights, tokens: np.ndarray, op: Op, state: np.ndarray | None = None) -> None:
        self._weights, self._tokens, self._op = weights, tokens, op
        self._state: np.ndarray = initial_state(weights.config, op.dtype) if state is None else state.astype(op.dtype)
        self._results: dict[str, np.ndarray] = {}

    def layer(self, group: Sequence[Step]) -> Results:
        """Results of the next layer, by trace point."""
        kept = {name: x for name, x in self._results.items() if name in group[0].inputs}
        self._results = kept
        for step in group:
            self._results[step.point] = one(step, self._results, self._weights, self._tokens, self._state, self._op)
        return self._results


class Own:
    """What the backend shows of one layer, and what follows from it where it shows less.

    ``shown`` of this layer and what it takes from the one before. Whatever is not there is computed from what is.
    """

    def __init__(
        self,
        shown: Results,
        group: Sequence[Step],
        weights: Weights,
        tokens: np.ndarray,
        state: np.ndarray | None,
        op: Op,
    ) -> None:
        self._steps = {step.point: step for step in group}
        self._weights, self._tokens, self._op = weights, tokens, op
        self._state: np.ndarray = initial_state(weights.config, op.dtype) if state is None else state.astype(op.dtype)
        self._shown = shown
        self._follows: dict[str, np.ndarray] = {}

    def read(self, point: str) -> np.ndarray:
        """As shown, else as it follows."""
        if point in self._shown:
            return self._shown[point].astype(self._op.dtype, copy=False)
        if point not in self._follows:
            self._follows[point] = self.made(self._steps[point])
        return self._follows[point]

    def made(self, step: Step) -> np.ndarray:
        """What an operation should make of the backend's own results."""
        with np.errstate(all="ignore"):
            return compute(step, self.read, self._weights, self._tokens, self._state, self._op)

    def state(self) -> np.ndarray:
        """The state ``(5, C)`` that follows from the layer's results; moved on from the one before."""
        layer = next(step.layer for step in self._steps.values() if step.layer is not None)
        at = f"blocks.{layer}."
        with np.errstate(all="ignore"):
            past = here(self._steps[at + "att.wkv"], self.read, self._weights, self._tokens, self._state, self._op)
            after = np.array(self._state[layer])
            _, after[AA : PP + 1] = recurrence(past)
        after[ATT_X], after[FFN_X] = self.read(at + "ln1")[-1], self.read(at + "ln2")[-1]
        return after


def hidden(step: Step, shown: Results, group: Sequence[Step]) -> list[Step]:
    """Operations that the backend does not show between ``step`` and what it does show, in execution order."""
    by_point = {other.point: other for other in group}
    wanted: set[str] = set()
    left = [point for point in step.inputs if point not in shown]
    while left:
        point = left.pop()
        if point in by_point and point not in wanted:
            wanted.add(point)
            left += [name for name in by_point[point].inputs if name not in shown]
    return [other for other in group if other.point in wanted]


def one(step: Step, results: Results, weights: Weights, tokens: np.ndarray, state: np.ndarray, op: Op) -> np.ndarray:
    """One operation; an emulated overflow is its result and no warning."""
    with np.errstate(all="ignore"):
        return compute(step, results.__getitem__, weights, tokens, state, op)
