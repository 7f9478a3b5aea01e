"""Whether a fault can be seen at all: decided beforehand, by what it does in float64 where everything else is exact.

A correct session and a faulty one, both exact but for the fault, are used in every way that a session is used. Where
the two differ by more than the bound of the arithmetic in question, the fault is visible under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from backends.api import Session, StateAccess
from harness.compare import logits_error, state_error
from harness.timed_check import ALLOWANCE, FOLLOWING, following
from harness.tolerance import Truth
from reference.weights import Weights
from suites.selftest.planted.backend import LOGITS, STATE, TRACE, PlantedBackend
from suites.selftest.planted.fault import Patch
from suites.selftest.planted.subject import GATE, Subject

#: Logits of every position in one call.
SCORING = "scoring"

#: Lengths of a first call.
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 30, 31, 32, 33, 40, GATE - 1, GATE)


class Use(NamedTuple):
    """One result of one way to use a session: logits ``(T, n_vocab)``, or a state; bounds times ``allowance``."""

    name: str
    values: np.ndarray
    is_state: bool = False
    needs_state_access: bool = False
    allowance: float = 1.0


class Effect(NamedTuple):
    """How large a fault is against the bound: above 1 it is visible. ``use``: where it is largest.

    logits  seen in the logits that calls end with; ``state`` also with the state and what it is handed to;
            ``every`` also in logits of every position, which a backend that is traced gives
    plain   in the logits of the gate's prompt in one call from the start, which localization runs
    """

    logits: float
    state: float
    every: float
    plain: float
    use: str

    def shown(self, shows: str) -> float:
        """What of it a backend shows that shows its trace, its state or its logits."""
        return {LOGITS: self.logits, STATE: self.state, TRACE: self.every}[shows]


def effect(patch: Patch, subject: Subject) -> Effect:
    """The effect of a fault under the bound of ``subject``."""
    every = patch.around is not None
    right, wrong = _right(subject, every), list(_uses(PlantedBackend(None, patch, TRACE), subject, every))
    ratios = [_ratio(a, b, subject.truth) for a, b in zip(right, wrong, strict=True)]
    found = list(zip(ratios, right, strict=True))
    plain = next(r for r, use in found if use.name == SCORING)
    state = [r for r, use in found if use.name != SCORING]
    logits = [r for r, use in found if use.name != SCORING and not use.is_state and not use.needs_state_access]
    most = int(np.argmax(ratios))
    return Effect(max(logits), max(state), max(ratios), plain, right[most].name)


@lru_cache(maxsize=4)
def _right(subject: Subject, every: bool) -> list[Use]:
    return list(_uses(PlantedBackend(None, Patch(), TRACE), subject, every))


def _ratio(right: Use, wrong: Use, truth: Truth) -> float:
    """Largest difference of one use over its bound; what is not a number is beyond any."""
    if not np.isfinite(wrong.values).all():
        return float("inf")
    if right.is_state:
        with np.errstate(over="ignore"):  # a state that cannot be moved to the right exponent is far off
            ratios = truth.state_ratios(state_error(wrong.values, right.values))
    else:
        ratios = truth.logits_ratios(logits_error(wrong.values, right.values, truth.unit))
        if len(right.values) < len(truth.logits):
            ratios.pop("rms")
    found = [error / (right.allowance * bound) for error, bound in ratios.values()]
    return float(max(found)) if np.isfinite(found).all() else float("inf")


def _uses(backend: PlantedBackend, subject: Subject, every: bool) -> Iterator[Use]:
    """``every``: those too which an operation that is always wrong does not depend on."""
    session = backend.open(subject.stored)
    tokens = list(subject.truth.tokens)
    yield from _decoded(session, tokens)
    yield Use(SCORING, session.logits(tokens, None))  # type: ignore[attr-defined]
    for n in LENGTHS if every else (GATE - 1, GATE):
        logits, state = session.forward(tokens[:n], None)
        yield Use(f"{n} tokens in one call", logits[None])
        if n == len(tokens):
            yield from _exported(session, f"state after {n} tokens", state)
        logits, _ = session.forward(tokens[-1:], state)
        yield Use(f"a step after {n} tokens", logits[None])
    yield from _chunked(session, tokens)
    yield from _long(session, subject)
    yield from _handed_over(session, tokens, subject)
    if not every:
        return
    yield from _in_turns(session, session, tokens, "two conversations")
    yield from _in_turns(session, backend.open_other(_other(subject.stored)), tokens, "two sessions")
    logits, _ = session.forward(tokens, None)
    yield Use("once more", logits[None])


def _decoded(session: Session, tokens: list[int]) -> Iterator[Use]:
    rows, states, state = [], [], None
    for token in tokens:
        logits, state = session.forward([token], state)
        rows.append(logits)
        states.append(state)
    yield Use("decode", np.stack(rows))
    yield from _exported(session, "state after decode", state)
    for p in (1, len(tokens) // 2, len(tokens) - 1):
        logits, _ = session.forward([tokens[p]], states[p - 1])
        yield Use(f"position {p} once more", logits[None])


def _exported(session: Session, name: str, state: object) -> Iterator[Use]:
    assert isinstance(session, StateAccess)
    yield Use(name, session.export_state(state), is_state=True)


def _chunked(session: Session, tokens: list[int]) -> Iterator[Use]:
    for cuts in ((0, 1, 17, 48), (0, 5, 10, 15, 48), (0, 24, 48), (0, 30, 33, 48), (0, 46, 48)):
        state = None
        for a, b in pairwise(cuts):
            logits, state = session.forward(tokens[a:b], state)
        yield Use(f"cut at {cuts[1:-1]}", logits[None])


def _in_turns(one: Session, other: Session, tokens: list[int], name: str) -> Iterator[Use]:
    ours, theirs = None, None
    for token in tokens[:12]:
        logits, ours = one.forward([token], ours)
        foreign, theirs = other.forward([tokens[-1 - token % 7]], theirs)
    yield Use(name, logits[None])
    yield Use(f"{name}, the other", foreign[None])


def _long(session: Session, subject: Subject) -> Iterator[Use]:
    prompt = subject.prompt
    logits, state = session.forward(prompt, None)
    rows = [logits]
    for token in following(prompt)[:FOLLOWING]:
        logits, state = session.forward([token], state)
        rows.append(logits)
    yield Use(f"{len(prompt)} tokens and {FOLLOWING} steps", np.stack(rows), allowance=max(ALLOWANCE, subject.growth))


def _handed_over(session: Session, tokens: list[int], subject: Subject) -> Iterator[Use]:
    assert isinstance(session, StateAccess)
    logits, _ = session.forward(tokens[len(tokens) // 2 :], session.import_state(subject.truth.middle))
    yield Use("handover", logits[None], needs_state_access=True)


def _other(weights: Weights) -> Weights:
    """Another model of the same shape."""
    names = [name for name in weights if name.endswith((".bias", "time_first"))]
    return weights.map(lambda name, tensor: weights[names[0]] if name in names else tensor)
