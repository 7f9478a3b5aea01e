"""Which hypotheses reproduce what a backend shows of one operation, and how well.

A match is within K times the error that the declared arithmetic makes in the hypothesis itself, and far nearer than
the right computation. Where only some tokens or channels are wrong, it must hold there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from harness.compare import nrms
from harness.localize.catalogue import of_operations
from harness.localize.decoder import Decoder
from harness.localize.describe import channels_in_words, tokens_in_words, wrong_lines
from harness.localize.evidence import Evidence
from harness.localize.hypotheses import Hypothesis
from harness.localize.part import Part, Unknown, needed
from harness.localize.whole import Model
from harness.tolerance import FLOOR, K
from reference.forward import initial_state
from reference.numerics import UNIT_ROUNDOFF, Arithmetic, Emulated, Exact, Op
from reference.operations import Step, steps
from reference.weights import Tensor, Weights

#: Emulated draws of a hypothesis.
DRAWS = 2
#: A match leaves at most this fraction of the right computation's error.
FAR = 0.25
#: Matches whose errors differ by less than this factor cannot be told apart.
ALIKE = 2.0
#: Rows of the head that hypotheses about it are tried on.
_HEAD_ROWS = 1024


class Match(NamedTuple):
    """A hypothesis that reproduces what is shown.

    error   of the hypothesis, ``right`` of the right computation: normalised RMS; ``bound`` what was allowed
    where   tokens and channels, where it is not all
    """

    name: str
    sentence: str
    error: float
    bound: float
    right: float
    where: str = ""

    def __str__(self) -> str:
        return (
            f"{self.sentence}{self.where}; that reproduces what the backend shows to {self.error:.1e} "
            f"(bound {self.bound:.1e}), the right computation is off by {self.right:.1e}"
        )


@dataclass(frozen=True)
class Place:
    """One operation of one prompt, to try hypotheses on.

    step     the operation; ``layer`` of the part it is in
    known    what the backend gave it, and what else it shows, by name within the part
    others   truth's results of the same part, for hypotheses that read what is not shown
    weights  as stored
    got, right  what the backend made of it and what it should have, ``(T, width)``
    """

    step: Step
    weights: Weights
    past: np.ndarray
    arithmetic: Arithmetic
    known: Mapping[str, np.ndarray]
    others: Mapping[str, np.ndarray]
    got: np.ndarray
    right: np.ndarray

    @cached_property
    def hidden(self) -> list[str]:
        """Operations that may be wrong: this one and those before it that are not shown."""
        try:
            return needed(self.step.layer, self.step.name, self.known)
        except Unknown:
            return [self.step.name]

    def part(self, op: Op, hypothesis: Hypothesis | None = None) -> Part:
        """The part computed with a hypothesis."""
        others = {name: value for name, value in self.others.items() if name not in self.hidden}
        computes = hypothesis.computes if hypothesis else None
        return Part(self.weights, self.step.layer, self.past, op, {**others, **self.known}, computes)

    def made(self, op: Op, hypothesis: Hypothesis | None = None) -> np.ndarray:
        """What the operation gives; raises :class:`Unknown` where the hypothesis does not apply."""
        return self.part(op, hypothesis)(self.step.name)

    def part_right(self) -> Part:
        """The part as it should be, in float64."""
        return self.part(Exact(np.float64))

    @property
    def floor(self) -> float:
        """What rounding alone may make."""
        return FLOOR * UNIT_ROUNDOFF[self.arithmetic.activations]

    def unavoidable(self, hypothesis: Hypothesis | None, exact: np.ndarray) -> float:
        """Largest error of emulated draws."""
        draws = [nrms(self.made(Emulated(self.arithmetic, seed), hypothesis), exact) for seed in range(DRAWS)]
        return max([self.floor, *(e for e in draws if np.isfinite(e))])


def place(evidence: Evidence) -> Place | None:
    """The place of a traced fault; ``None`` where nothing is shown of it."""
    step = next((step for step in steps(evidence.stored.config) if step.point == evidence.point), None)
    if step is None or evidence.got is None or evidence.inputs is None:
        return None
    stream = _stream(evidence.stored.config.n_layer, step.layer)
    known = {}
    for name, value in evidence.inputs.items():
        short = name[len(step.at) :] if name.startswith(step.at) else name
        if name == stream:
            known["x"] = value
        elif name != step.point and (step.layer is None or name.startswith(step.at)):
            known[short] = value
    past = evidence.tokens if step.layer is None else initial_state(evidence.stored.config, np.float64)[step.layer]
    others = _truth_of(evidence, step.layer)
    right = np.empty(0) if evidence.expected is None else evidence.expected
    found = Place(step, evidence.stored, past, evidence.arithmetic, known, others, evidence.got, right)
    if evidence.expected is None:
        found = replace(found, right=found.made(Exact(np.float64)))
    return _narrowed(found) if step.point == "logits" and found.got.shape == found.right.shape else found


def _stream(n_layer: int, layer: int | None) -> str:
    """Trace point of what enters a block, or ``ln_out``."""
    before = n_layer - 1 if layer is None else layer - 1
    return "blocks.0.ln0" if before < 0 else f"blocks.{before}.ffn.residual"


def _truth_of(evidence: Evidence, layer: int | None) -> dict[str, np.ndarray]:
    """Truth's results of one part."""
    return Model(evidence.stored, evidence.tokens).results(layer)


def _narrowed(found: Place) -> Place:
    """A place in the head with so many of its rows that trying hypotheses takes no time."""
    n = found.got.shape[-1]
    if n <= 2 * _HEAD_ROWS:
        return found
    worst = np.argsort(np.abs(np.nan_to_num(found.got - found.right)).max(axis=0))[-_HEAD_ROWS:]
    rows = np.unique(np.concatenate([worst, np.linspace(0, n - 1, _HEAD_ROWS).astype(int)]))

    def cut(name: str, tensor: Tensor) -> Tensor:
        return Tensor.of(tensor.rows(rows)) if name in ("emb.weight", "head.weight") else tensor

    weights = found.weights.map(cut)
    return replace(found, weights=weights, got=found.got[:, rows], right=found.right[:, rows])


def matches(found: Place, decoder: Decoder) -> list[Match]:
    """Every hypothesis that reproduces what the backend shows, the nearest first; those far behind it are left out."""
    wrong = nrms(found.got, found.right)
    parts = _wrong_part(found)
    tried: list[Match] = []
    for hypothesis in of_operations(found.hidden, decoder):
        match = _tried(found, hypothesis, wrong, parts)
        if match is not None:
            tried.append(match)
    whole = [match for match in tried if not match.where]
    return nearest(whole or tried)


def nearest(tried: Sequence[Match]) -> list[Match]:
    """The matches that cannot be told from the nearest, in the catalogue's order: the commonest defects come first."""
    least = min((match.error for match in tried), default=0.0)
    return [match for match in tried if match.error <= ALIKE * max(least, 1e-12)]


class _Wrong(NamedTuple):
    """Tokens and channels that are wrong at all, and in words; ``None`` for all."""

    lines: tuple[np.ndarray, np.ndarray]
    where: str


def _wrong_part(found: Place) -> _Wrong | None:
    """Where the backend is wrong, if that is not everywhere."""
    if not np.isfinite(found.got).all():
        return None
    tokens, channels = wrong_lines(found.got, found.right, K * found.unavoidable(None, found.right))
    if not tokens.size or (tokens.size, channels.size) == found.got.shape:
        return None
    words = []
    if tokens.size < found.got.shape[0]:
        words.append(tokens_in_words(tokens, found.got.shape[0]))
    if channels.size < found.got.shape[1]:
        words.append(channels_in_words(channels, found.got.shape[1]))
    index = np.ix_(tokens, channels)
    return _Wrong((index[0], index[1]), ", " + ", ".join(words))


def _tried(found: Place, hypothesis: Hypothesis, wrong: float, parts: _Wrong | None) -> Match | None:
    exact = Exact(np.float64)
    try:
        part = found.part(exact, hypothesis)
        made = part(found.step.name)
    except Unknown:
        return None
    if made.shape != found.got.shape:
        return None
    if not np.isfinite(found.got).all():
        return _tried_not_finite(found, hypothesis, made)
    error, right, where = nrms(found.got, made), wrong, ""
    if not error <= FAR * wrong and parts is not None:
        inside = found.got[parts.lines], made[parts.lines], found.right[parts.lines]
        error, right, where = nrms(inside[0], inside[1]), nrms(inside[0], inside[2]), parts.where
    if not error < FAR * right:
        return None
    unavoidable = found.unavoidable(hypothesis, made)
    if part.read & set(found.others) - set(found.known) - set(found.hidden):
        unavoidable = max(unavoidable, _of_truth(found))
    bound = K * unavoidable
    return Match(hypothesis.name, hypothesis.sentence, error, bound, right, where) if error <= bound else None


def _tried_not_finite(found: Place, hypothesis: Hypothesis, made: np.ndarray) -> Match | None:
    """A hypothesis that gives NaN and Inf exactly where the backend does, some of them at least, and all else alike."""
    finite = np.isfinite(found.got)
    if not finite.any() or not np.array_equal(finite, np.isfinite(made)):
        return None
    error, right = (nrms(found.got[finite], x[finite]) for x in (made, found.right))
    bound = K * found.unavoidable(None, found.right)
    where = f", which makes {int((~finite).sum())} of {finite.size} elements NaN or Inf"
    if not error <= bound or (right <= bound and not np.isfinite(found.right).all()):
        return None
    return Match(hypothesis.name, hypothesis.sentence, error, bound, right, where)


def _of_truth(found: Place) -> float:
    """How far what the backend shows of the part is from truth: what else it does not show is as far."""
    shared = [nrms(found.known[name], found.others[name]) for name in found.known if name in found.others]
    return 2 * max([found.floor, *(e for e in shared if np.isfinite(e))])
