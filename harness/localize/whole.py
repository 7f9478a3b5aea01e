"""The whole model with a hypothesis in one layer or in all, from the layer where it begins."""

from __future__ import annotations

from collections.abc import Collection, Generator
from functools import cached_property

import numpy as np

from harness.localize.hypotheses import Hypothesis
from harness.localize.part import ENDS, Part
from reference.config import count_parameters
from reference.forward import AA, ATT_X, BB, FFN_X, PP, initial_state
from reference.numerics import Exact, Op
from reference.operations import BLOCK, FIRST
from reference.weights import Weights

ALL_ROWS = (FFN_X, ATT_X, AA, BB, PP)


#: Parameters of a model that is held in the compute type, rather than converted at every product.
_SMALL = 1 << 23


class Model:
    """One model and one prompt ``(T,)`` from the initial state.

    op  the arithmetic; float64 for truth
    """

    def __init__(self, weights: Weights, tokens: np.ndarray, op: Op | None = None) -> None:
        self._op = op or Exact(np.float64)
        small = count_parameters(weights.config) <= _SMALL
        self.weights, self.tokens = weights.in_memory(self._op.dtype) if small else weights, tokens
        self._past = initial_state(weights.config, self._op.dtype)
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def _part(self, layer: int | None, x: np.ndarray | None, hypothesis: Hypothesis | None = None) -> Part:
        past = self.tokens if layer is None else self._past[layer]
        known = {} if x is None else {"x": x}
        return Part(self.weights, layer, past, self._op, known, hypothesis.computes if hypothesis else None)

    @cached_property
    def _passed(self) -> tuple[list[np.ndarray], np.ndarray]:
        streams, rows = [self._part(None, None)("blocks.0.ln0")], []
        for layer in range(self.weights.config.n_layer):
            part = self._part(layer, streams[-1])
            streams.append(part("ffn.residual"))
            rows.append(part.state(ALL_ROWS))
        return streams, np.stack(rows)

    @property
    def streams(self) -> list[np.ndarray]:
        """What enters each block and ``ln_out``: ``n_layer + 1`` arrays ``(T, C)``."""
        return self._passed[0]

    @property
    def state(self) -> np.ndarray:
        """The state after the prompt, ``(n_layer, 5, C)``."""
        return self._passed[1]

    def _unaffected(self, layer: int, hypothesis: Hypothesis | None) -> dict[str, np.ndarray]:
        """Results of a block that a hypothesis in it leaves as they are."""
        affected: set[str] = set(hypothesis.computes) if hypothesis else set()
        for name, operation in BLOCK.items():
            if affected.intersection(operation.inputs):
                affected.add(name)
        if layer not in self._kept:
            while len(self._kept) > 1:
                self._kept.pop(next(iter(self._kept)))
            self._kept[layer] = self.results(layer)
        return {name: value for name, value in self._kept[layer].items() if name not in affected}

    def results(self, layer: int | None) -> dict[str, np.ndarray]:
        """Every result of one part, by its name within it; the logits are left out."""
        part = self._part(layer, self.streams[-1 if layer is None else layer])
        names = [name for name in (BLOCK if layer is not None else ENDS) if name != "logits"]
        return {"x": part("x"), **{name: part(name) for name in names}}

    def rows(
        self, hypothesis: Hypothesis | None, layers: Collection[int]
    ) -> Generator[tuple[int, tuple[int, ...], np.ndarray], None, np.ndarray]:
        """Rows of the state as they follow: (layer, rows, values ``(rows, C)``); at last the stream that is left.

        layers  where the hypothesis is at work; embedding and ``ln0`` always are
        """
        n_layer = self.weights.config.n_layer
        early = hypothesis is not None and any(name in FIRST for name in hypothesis.computes)
        first = 0 if early else min([*layers, n_layer])
        for layer in range(first):
            yield layer, ALL_ROWS, self.state[layer]
        x = self._part(None, None, hypothesis)("blocks.0.ln0") if early else self.streams[first]
        for layer in range(first, n_layer):
            here = hypothesis if layer in layers else None
            part = self._part(layer, x, here)
            if layer == first and not early:
                part.know(self._unaffected(layer, here), self.state[layer])
            other = here.rows if here else None
            for rows in ((ATT_X,), (AA, BB, PP), (FFN_X,)):
                yield layer, rows, part.state(rows, other)
            x = part("ffn.residual")
        return x

    def whole(self, hypothesis: Hypothesis | None, layers: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
        """The state after the prompt, and the stream that is left."""
        state = np.empty_like(self.state)
        rows = self.rows(hypothesis, layers)
        while True:
            try:
                layer, names, values = next(rows)
            except StopIteration as end:
                return state, end.value
            state[layer, list(names)] = values

    def logits(self, x: np.ndarray, hypothesis: Hypothesis | None = None) -> np.ndarray:
        """Of the stream ``(T, C)`` that leaves the last layer: ``(T, n_vocab)``."""
        return self._part(None, x, hypothesis)("logits")
