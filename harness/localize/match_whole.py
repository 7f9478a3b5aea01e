"""Which hypotheses reproduce the state or the logits of a backend that shows nothing else.

Each is run through the whole model, in one layer alone and in every layer, and given up at the first row of the state,
or the first few logits, that are not what the backend shows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from harness.compare import nrms, spread
from harness.localize.catalogue import of_model, operations
from harness.localize.decoder import Decoder
from harness.localize.evidence import Evidence
from harness.localize.hypotheses import Hypothesis
from harness.localize.match import DRAWS, FAR, Match, nearest
from harness.localize.part import ENDS, Unknown
from harness.localize.whole import ALL_ROWS, Model
from harness.tolerance import FLOOR, K
from reference.config import count_parameters
from reference.forward import AA, ATT_X, BB, FFN_X, PP, forward
from reference.numerics import UNIT_ROUNDOFF, Arithmetic, Exact
from reference.operations import FIRST
from reference.weights import Tensor, Weights

#: Rows of the head that hypotheses are tried on.
_HEAD_ROWS = 512
#: Tokens that hypotheses are tried on first, where only logits are known.
_EARLY = 8
#: Parameters times layers up to which every layer is tried where none is known.
_SMALL = 1 << 26
#: Rows of the state that are compared, at one pp.
STATE = (FFN_X, ATT_X, AA, BB)


class Trial(NamedTuple):
    """A hypothesis in some layers; in words, where that is."""

    hypothesis: Hypothesis
    layers: tuple[int, ...]
    where: str


class Whole:
    """What a backend shows at its end, over one prompt, and what hypotheses make of it.

    state, logits  as the evidence has them; of large vocabularies, some of the logits
    """

    def __init__(self, evidence: Evidence, dtype: Any = np.float64) -> None:
        n_vocab = evidence.stored.config.n_vocab
        self._given = evidence
        self.ids = np.unique(np.linspace(0, n_vocab - 1, min(n_vocab, _HEAD_ROWS)).astype(int))
        self.evidence = replace(evidence, stored=self._cut(evidence.stored), original=self._cut(evidence.original))
        self.model = Model(self.evidence.stored, evidence.tokens, Exact(dtype))
        self.n_layer = evidence.stored.config.n_layer
        self.state = evidence.state
        self.logits = None if evidence.logits is None else evidence.logits[..., self.ids]

    def _cut(self, weights: Weights) -> Weights:
        def cut(name: str, tensor: Tensor) -> Tensor:
            return Tensor.of(tensor.rows(self.ids)) if name == "head.weight" else tensor

        return weights.map(cut)

    def part_of_prompt(self) -> Whole:
        """The first tokens alone, of which the logits are known, in float32: enough to tell near from far."""
        given = self._given
        logits = None if given.logits is None else given.logits[:_EARLY]
        return Whole(replace(given, tokens=given.tokens[:_EARLY], logits=logits, state=None), np.float32)

    @cached_property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """State and logits of the right computation."""
        return self.model.state, self.model.logits(self.model.streams[-1])

    def errors(self, trial: Trial | None, enough: float = np.inf) -> float:
        """RMS error over the rows of the state and the logits, each in its own unit, of what the backend shows.

        ``None``: the right computation. Inf once a single one is so large that all together exceed ``enough``.
        Raises :class:`Unknown` where a hypothesis does not apply.
        """
        n = (self.n_layer * len(STATE) if self.state is not None else 0) + (self.logits is not None)
        found: list[float] = []
        rows = self.model.rows(trial.hypothesis if trial else None, trial.layers if trial else ())
        while True:
            try:
                layer, names, values = next(rows)
            except StopIteration as end:
                x = end.value
                break
            if self.state is not None:
                found += row_errors(self.state[layer], names, values)
                if not max(found, default=0.0) <= enough * n**0.5:
                    return float("inf")
        if self.logits is not None:
            found.append(self._logits_error(self.model.logits(x, trial.hypothesis if trial else None)))
        return float(np.sqrt(np.mean(np.square(found))))

    def _logits_error(self, made: np.ndarray) -> float:
        assert self.logits is not None
        if made.shape[1] != self.ids.size:
            made = made[:, self.ids]  # of a whole matrix in the head's place
        return logits_error(self.logits, made)

    @cached_property
    def off(self) -> float:
        """How far what the backend shows is from the right computation."""
        return self.errors(None)

    @cached_property
    def unavoidable(self) -> float:
        """Error of emulated runs of the right computation, as :meth:`errors` measures it."""
        found = [self.emulated(self.evidence.arithmetic, seed) for seed in range(DRAWS)]
        return max([FLOOR * UNIT_ROUNDOFF[self.evidence.arithmetic.activations], *(e for e in found if np.isfinite(e))])

    def emulated(self, arithmetic: Arithmetic, seed: int) -> float:
        """Error of one run in an arithmetic."""
        weights, tokens = self.model.weights, self.evidence.tokens
        logits, state = forward(weights, tokens, all_logits=True, arithmetic=arithmetic, seed=seed)
        right_state, right_logits = self.right
        found = [] if self.logits is None else [logits_error(logits, right_logits)]
        if self.state is not None:
            for layer in range(self.n_layer):
                found += row_errors(state[layer], ALL_ROWS, right_state[layer])
        return float(np.sqrt(np.mean(np.square(found))))


def row_errors(got: np.ndarray, names: Collection[int], right: np.ndarray) -> list[float]:
    """Normalised errors of some rows of a layer's state ``got (5, C)``; aa and bb are moved to the right pp."""
    values = dict(zip(names, right, strict=True))
    factor = np.exp(got[PP].astype(np.float64) - values[PP]) if PP in values else 1.0
    return [nrms(got[row] * factor if row in (AA, BB) else got[row], values[row]) for row in values if row != PP]


def logits_error(got: np.ndarray, right: np.ndarray) -> float:
    """RMS error in units of the right logits' spread."""
    return float(np.sqrt(np.mean(np.square(got - right))) / max(spread(right), 1e-300))


def whole(evidence: Evidence) -> Whole | None:
    """What can be concluded from; ``None`` where neither state nor logits of every position are known."""
    config, logits, state = evidence.stored.config, evidence.logits, evidence.state
    if logits is not None and logits.shape != (len(evidence.tokens), config.n_vocab):
        logits = None
    if state is not None and state.shape != (config.n_layer, 5, config.n_embd):
        state = None
    return Whole(replace(evidence, logits=logits, state=state)) if logits is not None or state is not None else None


def matches_of_whole(found: Whole) -> list[Match]:
    """Every hypothesis that reproduces state and logits, the nearest only."""
    evidence = found.evidence
    decoder = Decoder(evidence.original, evidence.stored, evidence.scheme)
    if not found.off > K * found.unavoidable:
        return []
    hypotheses = [h for h in of_model(decoder) if not h.rows or found.state is not None]
    early = found.part_of_prompt() if found.state is None else None
    likely: Sequence[int] = () if evidence.layer is None else _likely(found)
    rounds: list[tuple[list[Hypothesis], Sequence[int]]] = [(hypotheses, likely)]
    if evidence.layer is None and count_parameters(evidence.stored.config) * found.n_layer < _SMALL:
        rounds.append((operations(), range(found.n_layer)))
    for some, likely in rounds:
        trials = (trial for hypothesis in some for trial in _trials(found, hypothesis, likely))
        tried = [match for trial in trials if (match := _tried(found, early, trial))]
        if tried:
            return nearest(tried)
    return []


def _tried(found: Whole, early: Whole | None, trial: Trial) -> Match | None:
    bound = K * found.unavoidable
    try:
        if early is not None and trial.layers:  # what exists once may depend on all tokens
            soon = early.errors(trial)
            if not (soon <= 0.5 * early.off or soon <= K * early.unavoidable):
                return None
        error = found.errors(trial, bound)
    except Unknown:
        return None
    if not (error <= bound and error <= FAR * found.off):
        return None
    hypothesis = trial.hypothesis
    return Match(hypothesis.name, f"{trial.where}{hypothesis.sentence}", error, bound, found.off)


def _trials(found: Whole, hypothesis: Hypothesis, likely: Sequence[int]) -> Iterator[Trial]:
    """Where a hypothesis may be at work: what exists once, there; else in all layers, and in each likely one."""
    layer = found.evidence.layer
    if not hypothesis.rows and all(name in ENDS for name in hypothesis.computes):
        first = any(name in FIRST for name in hypothesis.computes)
        if layer in (None, 0 if first else found.n_layer - 1):
            yield Trial(hypothesis, (), "")
        return
    if layer in (None, 0, 1):  # in every layer it would have been seen before
        yield Trial(hypothesis, tuple(range(found.n_layer)), "in every layer, " if found.n_layer > 1 else "")
    if found.n_layer > 1:
        for one in likely:
            yield Trial(hypothesis, (one,), f"in layer {one} alone, ")


def _likely(found: Whole) -> Sequence[int]:
    """Layers where the fault may be: the one named, and the one before it, whose end only the next one shows."""
    layer = found.evidence.layer or 0
    return [layer] if found.state is None or layer == 0 else [layer - 1, layer]
