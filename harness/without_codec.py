"""Schemes that only their own system can read: no kernel parity, but two things that can still be said.

The session is held against itself: whatever its weights are, decode, prefill, chunks and replayed states
must agree. And its logits are held against the model's own weights, which judges scheme and kernel together:
quality, not parity. Beyond a limit, which another scheme of the class sets, that is a failure. What passes is
not judged: its speeds stand without a PASS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from backends.api import Session, State, StateAccess
from harness.budget import hold
from harness.checks import call, problem
from harness.compare import kl_divergence, top1_agreement, topk_overlap
from harness.tolerance import Truth, derive
from reference.errors import ConfigError
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.schemes import SCHEMES, apply, stored_bytes
from reference.weights import Weights

#: Both sides of a comparison of a session with itself may be off.
BOTH_SIDES = 2.0


class NotComparable(Exception):
    """The session's first run already gave something that is no logits; one line."""


@dataclass(frozen=True)
class Quality:
    """Distance of a session's logits from those of the fp32 weights, over ``positions`` of one prompt.

    limit    divergence beyond which the session is wrong, whatever its scheme
    """

    positions: int
    limit: float
    kl_divergence: float
    top1_agreement: float
    top5_agreement: float


def has_codec(scheme: str) -> bool:
    """Whether the weights that a scheme stores are known here."""
    return scheme in SCHEMES and SCHEMES[scheme].codec is not None


def truth_for(
    session: Session, weights: Weights, scheme: str, arithmetic: Arithmetic, tokens: Sequence[int], key: str | None
) -> Truth:
    """What a session is compared with: truth where the scheme has a codec, else its own single steps."""
    if has_codec(scheme):
        return derive(weights, scheme, arithmetic, tokens, key)
    return own_truth(session, weights, arithmetic, tokens, key)


def own_truth(
    session: Session, weights: Weights, arithmetic: Arithmetic, tokens: Sequence[int], key: str | None
) -> Truth:
    """The session's own single steps in the place of truth, with bounds for two runs that may both be off.

    The size of the unavoidable error is that of the declared arithmetic on the fp32 weights. Raises
    :class:`NotComparable`.
    """
    exact = derive(weights, "fp32", arithmetic, tokens, key)
    logits, states = steps(session, tokens, weights.config.n_vocab)
    half = max(1, len(tokens) // 2)
    found = replace(
        exact,
        logits=logits.astype(np.float64),
        **{name: BOTH_SIDES * getattr(exact, name) for name in ("e_rms", "e_worst", "e_peak")},
        **{name: BOTH_SIDES * getattr(exact, name) for name in ("e_state_rms", "e_state_worst")},
    )
    if isinstance(session, StateAccess):
        end, middle = (session.export_state(states[i]).astype(np.float64) for i in (-1, half - 1))
        found = replace(found, state=end, middle=middle)
    return found


def quality(session: Session, weights: Weights, scheme: str, tokens: Sequence[int]) -> Quality:
    """Over every position of ``tokens``, fed one at a time. Raises :class:`NotComparable`."""
    exact, _ = forward(weights, tokens, all_logits=True)
    logits, _ = steps(session, tokens, weights.config.n_vocab)
    return Quality(
        len(tokens),
        _limit(weights, scheme, tokens, exact),
        kl_divergence(logits, exact),
        top1_agreement(logits, exact),
        topk_overlap(logits, exact, min(5, exact.shape[-1])),
    )


#: A scheme may be this many times as far from the fp32 weights as another of its class whose weights are known:
#: twice the largest ratio among the 4 and 5 bit schemes with a codec, 2.1 (sym_int5 to Q5_0 on the embedded
#: model; `python scripts/scheme_error.py numpy`).
WORSE = 4.0


def _limit(weights: Weights, scheme: str, tokens: Sequence[int], exact: np.ndarray) -> float:
    """Half of what a model without memory is off by; where the class has a known scheme, WORSE times that one's."""
    forgetful = np.concatenate([forward(weights, [token], all_logits=True)[0] for token in tokens])
    limit = kl_divergence(forgetful, exact) / 2
    for known in _alike(weights, scheme):
        stored = hold(apply(weights, known))
        return min(limit, WORSE * kl_divergence(forward(stored, tokens, all_logits=True)[0], exact))
    return limit


def _alike(weights: Weights, scheme: str) -> Iterator[str]:
    """Schemes of the same class whose weights are known here and that can store this model; ggml's first."""
    if scheme not in SCHEMES:
        return
    same = [s.name for s in SCHEMES.values() if s.codec and s.scheme_class == SCHEMES[scheme].scheme_class]
    for name in sorted(same, key=lambda name: not name.startswith("Q")):
        with suppress(ConfigError):
            stored_bytes(weights.config, name)
            yield name


def steps(session: Session, tokens: Sequence[int], n_vocab: int) -> tuple[np.ndarray, list[State]]:
    """Logits ``(T, n_vocab)`` and the state after each token, fed one at a time."""
    rows: list[np.ndarray] = []
    states: list[State] = []
    state: State | None = None
    for position, token in enumerate(tokens):
        logits, state = call(session, [token], state)
        bad = problem(logits, (n_vocab,))
        if bad is not None:
            raise NotComparable(f"position {position}: {bad}")
        rows.append(logits)
        states.append(state)
    return np.stack(rows), states
