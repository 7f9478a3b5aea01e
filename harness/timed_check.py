"""The proof carried to what is timed: the length of the prompt, and what the timed calls returned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.api import Session, State
from harness.checks import Check, against, call
from harness.measure import Samples
from harness.parity import again, ids_check
from harness.tolerance import Truth, beyond_gate, growth
from harness.without_codec import has_codec
from reference.numerics import Arithmetic
from reference.weights import Weights

#: Steps after the timed prompt that are judged with it.
FOLLOWING = 4

#: How a check says that truth was not at hand.
AGAINST_ITSELF = ", against itself in short calls only"

#: Against another run of the same backend, both sides may be off: twice the bound allows for that. Against truth
#: farther on than the gate's positions, rounding kept in the state has had longer to add up; by how much more than
#: this, :func:`harness.tolerance.growth` finds out.
ALLOWANCE = 2.0


def long_check(
    session: Session, prompt: Sequence[int], truth: Truth, beyond: np.ndarray | None, grown: float = 1.0
) -> Check:
    """The timed prompt in one call, then FOLLOWING single steps.

    beyond  truth's logits ``(1 + FOLLOWING, n_vocab)`` there; ``None`` where the reference would take too
            long: then against the same backend in calls no longer than the gate's, which finds what
            depends on the length of a call but not what depends on the position.
    grown   how much more than at the gate's positions the arithmetic itself is off there
    """
    got = _prompt_and_steps(session, prompt, len(prompt))
    where = f"{len(prompt)} tokens in one call and {FOLLOWING} steps"
    if beyond is None:
        beyond = _prompt_and_steps(session, prompt, len(truth.tokens))
        where += AGAINST_ITSELF
    return against("timed length", got, beyond, truth, allowance=max(ALLOWANCE, grown), where=where)


def timed_length(
    session: Session,
    weights: Weights,
    scheme: str,
    arithmetic: Arithmetic,
    prompt: Sequence[int],
    truth: Truth,
    key: str,
) -> Check:
    """:func:`long_check` with all that it can be held against; ``key`` is the content hash of ``weights``."""
    steps = following(prompt)
    beyond = beyond_gate(weights, scheme, prompt, steps, key) if has_codec(scheme) else None
    check = long_check(session, prompt, truth, beyond)
    if beyond is None or check.passed:
        return check
    # Only now, since it takes several times as long as truth does.
    return long_check(
        session, prompt, truth, beyond, growth(weights, scheme, arithmetic, prompt, steps, truth, beyond, key)
    )


def prefill_checks(session: Session, truth: Truth, timed: Samples) -> list[Check]:
    """After timing prefill: what the last timed call returned, and the gate's main checks once more."""
    return [*again(session, truth), returned_check("timed prefill", session, truth, timed)]


def returned_check(name: str, session: Session, truth: Truth, timed: Samples) -> Check:
    """The logits of the last timed call over a prompt, against the same prompt in short calls."""
    expected, _ = _in_short_calls(session, timed.last_prompt, len(truth.tokens))
    return against(name, timed.last_logits, expected[None], truth, 0, ALLOWANCE, "against short calls")


def decode_checks(session: Session, prompt: Sequence[int], truth: Truth, timed: Samples) -> list[Check]:
    """After timing decode: the ids of the first and the last sample, and the gate's main checks once more."""
    checks = again(session, truth)
    _, state = call(session, prompt, None)  # as decode was started: in half precision logits tie
    for token, ids in dict.fromkeys(zip(timed.starts, (timed.ids, timed.last_ids), strict=True)):
        checks.append(ids_check("timed decode", session, truth, token, state, ids)[0])
    return checks


def _prompt_and_steps(session: Session, prompt: Sequence[int], length: int) -> np.ndarray:
    """Logits after the prompt in calls of ``length``, then after each of its first FOLLOWING tokens again."""
    logits, state = _in_short_calls(session, prompt, length)
    rows = [logits]
    for token in following(prompt):
        logits, state = call(session, [token], state)
        rows.append(logits)
    return np.stack(rows)


def following(prompt: Sequence[int]) -> list[int]:
    """The tokens that are fed after a timed prompt."""
    return [prompt[i % len(prompt)] for i in range(FOLLOWING)]


def _in_short_calls(session: Session, prompt: Sequence[int], length: int) -> tuple[np.ndarray, State]:
    logits, state = np.empty(0, np.float32), None
    for start in range(0, len(prompt), length):
        logits, state = call(session, prompt[start : start + length], state)
    return logits, state
