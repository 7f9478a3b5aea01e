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
from reference.numerics import UNIT_ROUNDOFF, Arithmetic, Emulated, Exact
from reference.operations import FIRST
from reference.weights import Tensor, Weights

#: Rows of the head that hypotheses are tried on.
_HEAD_ROWS = 512
#: Tokens that hypotheses are tried on first, where only logits are known.
_EARLY = 8
#: Parameters times layers up to which every layer is tried where none is known.
_SMALL = 1 << 26
#: Hypotheses for which it is looked whether the model amplifies errors if they are true.
_CHAOTIC = 4
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

        ``None``: the right computation. Inf once a row of the first two layers in question is so large that all
        together exceed ``enough``. Raises :class:`Unknown` where a hypothesis does not apply.
        """
        return self._apart(self.state, self.logits, self.model, trial, enough)

    def scatter(self, trial: Trial) -> float:
        """Error of emulated runs of a hypothesis against itself: a wrong model may amplify errors as no right one."""
        made, x = self.model.whole(trial.hypothesis, trial.layers)
        logits = None if self.logits is None else self._cut_logits(self.model.logits(x, trial.hypothesis))
        state = None if self.state is None else made
        return max(self._apart(state, logits, drawn, trial) for drawn in self._drawn)

    @cached_property
    def _drawn(self) -> list[Model]:
        arithmetic, tokens = self.evidence.arithmetic, self.evidence.tokens
        return [Model(self.evidence.stored, tokens, Emulated(arithmetic, seed)) for seed in range(DRAWS)]

    def _apart(
        self,
        state: np.ndarray | None,
        logits: np.ndarray | None,
        model: Model,
        trial: Trial | None,
        enough: float = np.inf,
    ) -> float:
        """How far a state and logits are from those of a model with a hypothesis."""
        n = (self.n_layer * len(STATE) if state is not None else 0) + (logits is not None)
        hypothesis, layers = (trial.hypothesis, trial.layers) if trial else (None, ())
        found: list[float] = []
        rows = model.rows(hypothesis, layers)
        while True:
            try:
                layer, names, values = next(rows)
            except StopIteration as end:
                x = end.value
                break
            if state is not None:
                found += row_errors(state[layer], names, values)
                early = layer <= min(layers, default=0) + 1
                if early and not max(found, default=0.0) <= enough * n**0.5:
                    return float("inf")
        if logits is not None:
            found.append(logits_error(logits, self._cut_logits(model.logits(x, hypothesis))))
        return float(np.sqrt(np.mean(np.square(found))))

    def _cut_logits(self, logits: np.ndarray) -> np.ndarray:
        """Of a whole matrix in the head's place there are more than of the head's rows that are kept."""
        return logits if logits.shape[1] == self.ids.size else logits[:, self.ids]

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
        trials = [trial for hypothesis in some for trial in _trials(found, hypothesis, likely)]
        near = [(error, trial) for trial in trials if (error := _error(found, early, trial)) <= FAR * found.off]
        tried = _within(found, near)
        if tried:
            return nearest(tried)
    return []


def _within(found: Whole, near: Sequence[tuple[float, Trial]]) -> list[Match]:
    """Those within the bound of the right computation; where there are none, the best within their own."""
    bound = K * found.unavoidable
    right = [_match(found, trial, error, bound) for error, trial in near if error <= bound]
    if right:
        return right
    best = sorted((pair for pair in near if np.isfinite(pair[0])), key=lambda pair: pair[0])[:_CHAOTIC]
    own = [(error, trial, K * found.scatter(trial)) for error, trial in best]
    return [_match(found, trial, error, bound) for error, trial, bound in own if error <= bound]


def _match(found: Whole, trial: Trial, error: float, bound: float) -> Match:
    hypothesis = trial.hypothesis
    return Match(hypothesis.name, f"{trial.where}{hypothesis.sentence}", error, bound, found.off)


def _error(found: Whole, early: Whole | None, trial: Trial) -> float:
    """Of a trial; Inf where it does not apply, or is soon seen not to be it."""
    try:
        if early is not None and trial.layers:  # what exists once may depend on all tokens
            soon = early.errors(trial)
            if not (soon <= 0.5 * early.off or soon <= K * early.unavoidable):
                return float("inf")
        return found.errors(trial, K * found.unavoidable)
    except Unknown:
        return float("inf")


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
