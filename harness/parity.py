"""Is a loaded session right? One prompt, every way a runtime may be asked to run it, each held against truth.

The checks, in the order in which a failure is most telling:

    decode           one token at a time: logits of every position
    prefill          the whole prompt in one call: logits of the last position
    chunks           the prompt in calls of many lengths, state handed on: the logits at the end of each
    step             one token after all the others in one call: a prefill leaves the right state
    replay           an old state used once more: nobody changed or shares it
    scoring          logits of every position in one call, where the backend offers it
    greedy           the on-device loop chooses what the logits say and leaves the right state, where offered
    state            state after decode and after prefill, where the backend shows it
    handover         the true state taken over half way, where the backend accepts one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from backends.api import Generating, Scoring, Session, State, StateAccess
from harness.checks import NAN, Check, call, logits_check, problem, state_check, worst
from harness.tolerance import K, Truth

#: Below this fraction of its bound, the declared arithmetic is looser than what the backend does.
LOOSE = 0.02

#: Lengths of the calls that a prompt is cut into. Kernels differ between short and long calls, between whole and
#: broken tiles: every length up to 8 is there, every remainder of 8 above it, and a long one.
CALLS = ((1, 2, 3, 4, 5, 6, 7, 8, 12), (9, 10, 11, 13, 5), (1, 16, 31), (14, 15, 19))

#: Tokens that an on-device greedy loop is asked for.
GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Gate:
    """All checks of one session. An empty gate has compared nothing and fails."""

    logits: tuple[Check, ...]
    state: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.logits) and all(check.passed for check in (*self.logits, *self.state))

    @property
    def first_bad(self) -> Check | None:
        """The first failing check in the order of the module's list."""
        return next((check for check in (*self.logits, *self.state) if not check.passed), None)

    @property
    def loose(self) -> bool:
        """Whether even the worst logits stay far below a bound: the declaration claims too much error."""
        return bool(self.logits) and max(check.ratio for check in self.logits) < LOOSE


def gate(session: Session, truth: Truth) -> Gate:
    """Run every check that the session's capabilities allow."""
    tokens = truth.tokens
    steps, states, bad = _steps(session, tokens, truth.logits.shape[-1])
    if bad is not None:
        return Gate((bad,), ())
    decode = logits_check("decode", np.stack(steps), truth, slice(None))
    if decode.problem is not None:
        return Gate((decode,), ())
    whole, end = call(session, tokens, None)
    checks = [
        decode,
        logits_check("prefill", whole, truth, slice(-1, None)),
        *_chunks(session, truth),
        *_step(session, truth),
        *_replay(session, truth, states),
    ]
    if isinstance(session, Scoring):
        checks.append(logits_check("scoring", _scored(session, tokens), truth, slice(None)))
    if isinstance(session, Generating):
        checks += greedy_checks(session, truth, tokens[-1], end)
    state: list[Check] = []
    if isinstance(session, StateAccess):
        state.append(state_check("state after decode", session.export_state(states[-1]), truth))
        state.append(state_check("state after prefill", session.export_state(end), truth))
        if len(tokens) > 1:
            half = len(tokens) // 2
            rest, _ = call(session, tokens[half:], session.import_state(truth.middle.astype(np.float32)))
            checks.append(logits_check("handover", rest, truth, slice(-1, None)))
    return Gate(tuple(checks), tuple(state))


def again(session: Session, truth: Truth) -> list[Check]:
    """The two paths that are timed, judged once more after timing: prefill, then decode from its start."""
    steps, _, bad = _steps(session, truth.tokens, truth.logits.shape[-1])
    if bad is not None:
        return [bad]
    whole, _ = call(session, truth.tokens, None)
    return [
        logits_check("decode after timing", np.stack(steps), truth, slice(None)),
        logits_check("prefill after timing", whole, truth, slice(-1, None)),
    ]


def greedy_checks(session: Session, truth: Truth, token: int, state: State) -> list[Check]:
    """The loop's ids are those its logits choose, and the state it leaves is that of feeding them."""
    assert isinstance(session, Generating)
    ids, end = session.greedy(token, state, GREEDY_TOKENS)
    if len(ids) != GREEDY_TOKENS:
        bad = f"greedy returned {len(ids)} ids where {GREEDY_TOKENS} were asked for"
        return [Check("greedy", "", NAN, NAN, "ids", bad)]
    chosen, state = ids_check("greedy", session, truth, token, state, [int(i) for i in ids])
    after, expected = call(session, [token], end)[0], call(session, [token], state)[0]
    bad_state = problem(after, expected.shape)
    gap = float(np.abs(after - expected).max() / truth.unit) if bad_state is None else NAN
    return [chosen, Check("greedy state", "largest element", gap, 2 * K * truth.e_peak, "next token", bad_state)]


def ids_check(
    name: str, session: Session, truth: Truth, token: int, state: State, ids: Sequence[int]
) -> tuple[Check, State]:
    """Each id must be the arg-max of ``forward``, or tie with it: both logits may be off by the bound."""
    largest, where = 0.0, f"{len(ids)} tokens"
    for position, chosen in enumerate(ids):
        logits, state = call(session, [token], state)
        bad = problem(logits, logits.shape)
        if bad is not None:
            return Check(name, "", NAN, NAN, where, f"generated token {position}: {bad}"), state
        gap = float((logits.max() - logits[chosen]) / truth.unit)
        if gap > largest:
            largest, where = gap, f"generated token {position}"
        token = int(chosen)
    return Check(name, "logit gap", largest, 2 * K * truth.e_peak, where), state


def _steps(session: Session, tokens: Sequence[int], n_vocab: int) -> tuple[list[np.ndarray], list[State], Check | None]:
    """Logits and state after each token; the check that fails at once on a result of the wrong form."""
    rows: list[np.ndarray] = []
    states: list[State] = []
    state: State | None = None
    for position, token in enumerate(tokens):
        logits, state = call(session, [token], state)
        bad = problem(logits, (n_vocab,), finite=False)
        if bad is not None:
            where = f"position {position}"
            return rows, states, Check("decode", "", NAN, NAN, where, f"{where}: {bad}")
        rows.append(logits)
        states.append(state)
    return rows, states, None


def _chunks(session: Session, truth: Truth) -> list[Check]:
    """The prompt in calls of the lengths in each row of CALLS; of each row, the end that is nearest to failing."""
    checks = []
    for lengths in CALLS:
        found, state = [], None
        for start, end in pairwise(cuts(lengths, len(truth.tokens))):
            logits, state = call(session, truth.tokens[start:end], state)
            found.append(logits_check("chunks", logits, truth, slice(end - 1, end)))
        checks.append(worst(found))
    return checks


def cuts(lengths: Sequence[int], n: int) -> list[int]:
    """Where the calls of a prompt of ``n`` tokens begin and end; what is left over is the last call."""
    return sorted({n, *(end for end in accumulate(lengths, initial=0) if end < n)})


def _step(session: Session, truth: Truth) -> list[Check]:
    """All tokens but the last in one call, then the last: the state a prefill leaves is the one decode needs."""
    if len(truth.tokens) < 2:
        return []
    _, state = call(session, truth.tokens[:-1], None)
    logits, _ = call(session, truth.tokens[-1:], state)
    return [logits_check("step", logits, truth, slice(-1, None))]


def _scored(session: Session, tokens: Sequence[int]) -> np.ndarray:
    """Logits of every position: the first half from the start, the rest from the state after it."""
    assert isinstance(session, Scoring)
    half = max(1, len(tokens) // 2)
    first = session.logits(tokens[:half], None)
    if half == len(tokens):
        return first
    _, state = call(session, tokens[:half], None)
    return np.concatenate([first, session.logits(tokens[half:], state)])


def _replay(session: Session, truth: Truth, states: Sequence[State]) -> list[Check]:
    """Old states must still give what they gave: after the first token, half way, before the last."""
    n = len(truth.tokens)
    checks = []
    for p in sorted({1, n // 2, n - 1} & set(range(1, n))):
        again, _ = call(session, [truth.tokens[p]], states[p - 1])
        checks.append(logits_check(f"replay of position {p}", again, truth, slice(p, p + 1)))
    return checks
