"""Is a loaded session right? One prompt, every way a runtime may be asked to run it, each held against truth.

The checks, in the order in which a failure is most telling:

    decode           one token at a time: logits of every position
    prefill          the whole prompt in one call: logits of the last position
    chunks           the prompt in uneven calls, state handed on
    replay           an old state used once more: nobody changed or shares it
    scoring          logits of every position in one call, where the backend offers it
    greedy           the on-device loop chooses what the logits say, where the backend offers it
    state            state after decode and after prefill, where the backend shows it
    handover         the true state taken over half way, where the backend accepts one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from backends.api import Generating, Scoring, Session, State, StateAccess
from harness.compare import first_non_finite, logits_error, state_error
from harness.tolerance import K, Truth

#: Below this fraction of its bound, the declared arithmetic is looser than what the backend does.
LOOSE = 0.02


@dataclass(frozen=True)
class Check:
    """One comparison. ``problem`` says what makes an error meaningless: NaN, Inf, a wrong shape."""

    name: str
    statistic: str
    error: float
    bound: float
    where: str
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """Error over bound; Inf for a problem and for NaN."""
        ratio = self.error / self.bound if self.bound > 0 else float("inf")
        return ratio if self.problem is None and ratio == ratio else float("inf")

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        relation = "<=" if self.passed else "exceeds"
        return f"{self.name} ({self.where}): {self.statistic} error {self.error:.2e} {relation} bound {self.bound:.2e}"


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


def worst(checks: Sequence[Check]) -> Check:
    """The check whose error is largest against its bound."""
    return max(checks, key=lambda check: check.ratio)


def gate(session: Session, truth: Truth) -> Gate:
    """Run every check that the session's capabilities allow."""
    tokens = truth.tokens
    steps, states, problem = _steps(session, tokens, truth.logits.shape[-1])
    if problem is not None:
        return Gate((problem,), ())
    decode = _logits("decode", np.stack(steps), truth, slice(None))
    if decode.problem is not None:
        return Gate((decode,), ())
    whole, end = session.forward(tokens, None)
    checks = [
        decode,
        _logits("prefill", whole, truth, slice(-1, None)),
        _logits("chunks", _chunks(session, tokens), truth, slice(-1, None)),
        *_replay(session, truth, states),
    ]
    if isinstance(session, Scoring):
        checks.append(_logits("scoring", session.logits(tokens, None), truth, slice(None)))
    if isinstance(session, Generating):
        checks.append(_greedy(session, truth, end))
    state: list[Check] = []
    if isinstance(session, StateAccess):
        state.append(_state("state after decode", session.export_state(states[-1]), truth))
        state.append(_state("state after prefill", session.export_state(end), truth))
        if len(tokens) > 1:
            half = len(tokens) // 2
            rest, _ = session.forward(tokens[half:], session.import_state(truth.middle.astype(np.float32)))
            checks.append(_logits("handover", rest, truth, slice(-1, None)))
    return Gate(tuple(checks), tuple(state))


def length_check(session: Session, prompt: Sequence[int], truth: Truth) -> Check:
    """The timed prompt in one call against the same prompt in calls no longer than the gate's.

    The gate has proved short calls right; this carries the proof to the length that is timed without
    running the reference over it. Both sides may be off by the bound, hence twice the bound. The
    token after the prompt is run too, so that a wrong state left behind shows.
    """
    one, one_state = session.forward(prompt, None)
    many, many_state = one, None
    for start in range(0, len(prompt), len(truth.tokens)):
        many, many_state = session.forward(prompt[start : start + len(truth.tokens)], many_state)
    after = [session.forward(prompt[:1], state)[0] for state in (one_state, many_state)]
    got, expected = np.stack([one, after[0]]), np.stack([many, after[1]])
    name, where = "long prefill", f"{len(prompt)} tokens in one call against calls of {len(truth.tokens)}"
    problem = _problem(got, expected.shape)
    if problem is not None:
        return Check(name, "", float("nan"), float("nan"), where, problem)
    error = logits_error(got, expected, truth.unit)
    candidates = {
        "worst position": (error.worst, 2 * K * truth.e_worst),
        "largest element": (error.peak, 2 * K * truth.e_peak),
    }
    return _worst_of(name, candidates, where)


def _steps(session: Session, tokens: Sequence[int], n_vocab: int) -> tuple[list[np.ndarray], list[State], Check | None]:
    """Logits and state after each token; the check that fails at once on a result of the wrong form."""
    rows: list[np.ndarray] = []
    states: list[State] = []
    state: State | None = None
    for position, token in enumerate(tokens):
        logits, state = session.forward([token], state)
        problem = _problem(logits, (n_vocab,), finite=False)
        if problem is not None:
            where = f"position {position}"
            return rows, states, Check("decode", "", float("nan"), float("nan"), where, f"{where}: {problem}")
        rows.append(logits)
        states.append(state)
    return rows, states, None


def _chunks(session: Session, tokens: Sequence[int]) -> np.ndarray:
    """Last logits of the prompt run in calls of 1, about a third, and the rest."""
    cuts = sorted({0, min(1, len(tokens) - 1), 1 + len(tokens) // 3, len(tokens)})
    logits, state = np.empty(0, np.float32), None
    for a, b in pairwise(cuts):
        logits, state = session.forward(tokens[a:b], state)
    return logits


def _replay(session: Session, truth: Truth, states: Sequence[State]) -> list[Check]:
    """Old states must still give what they gave: after the first token, half way, before the last."""
    n = len(truth.tokens)
    checks = []
    for p in sorted({1, n // 2, n - 1} & set(range(1, n))):
        again, _ = session.forward([truth.tokens[p]], states[p - 1])
        checks.append(_logits(f"replay of position {p}", again, truth, slice(p, p + 1)))
    return checks


def _greedy(session: Session, truth: Truth, state: State, n: int = 16) -> Check:
    """Every id chosen by ``greedy`` must be the arg-max of ``forward``, or tie with it within the bound."""
    assert isinstance(session, Generating)
    token = truth.tokens[-1]
    ids, _ = session.greedy(token, state, n)
    bound = K * truth.e_peak
    worst_gap, where = 0.0, f"{n} tokens"
    for position, chosen in enumerate(ids):
        logits, state = session.forward([token], state)
        gap = float((logits.max() - logits[chosen]) / truth.unit)
        if not gap <= worst_gap:
            worst_gap, where = gap, f"generated token {position}"
        token = int(chosen)
    problem = None if len(ids) == n else f"greedy returned {len(ids)} ids where {n} were asked for"
    return Check("greedy", "logit gap", worst_gap, 2 * bound, where, problem)


def _logits(name: str, got: np.ndarray, truth: Truth, positions: slice) -> Check:
    expected = truth.logits[positions]
    got = np.asarray(got)
    got = got[None] if got.ndim == 1 else got
    first = range(len(truth.logits))[positions][0]
    problem = _problem(got, expected.shape, first)
    if problem is not None:
        return Check(name, "", float("nan"), float("nan"), "logits", problem)
    error = logits_error(got, expected, truth.unit)
    ratios = truth.logits_ratios(error)
    if len(expected) < len(truth.logits):
        ratios.pop("rms")  # that bound is of the mean over all positions
    return _worst_of(name, ratios, f"position {first + error.position}, token {error.token}")


def _state(name: str, got: np.ndarray, truth: Truth) -> Check:
    problem = _problem(got, truth.state.shape)
    if problem is not None:
        return Check(name, "", float("nan"), float("nan"), "state", problem)
    error = state_error(got, truth.state)
    return _worst_of(name, truth.state_ratios(error), f"layer {error.layer}, {error.row}")


def _worst_of(name: str, candidates: dict[str, tuple[float, float]], where: str) -> Check:
    return worst([Check(name, statistic, error, bound, where) for statistic, (error, bound) in candidates.items()])


def _problem(x: object, shape: tuple[int, ...], first: int = 0, finite: bool = True) -> str | None:
    """Why ``x`` is not a float32 array of ``shape`` without NaN or Inf; the first bad place by index."""
    if not isinstance(x, np.ndarray):
        return f"returned {type(x).__name__}, not a numpy array"
    if x.dtype != np.float32:
        return f"returned {x.dtype}, not float32"
    if x.shape != shape:
        return f"returned shape {x.shape}, not {shape}"
    bad = first_non_finite(x) if finite else None
    if bad is None:
        return None
    kind, index = bad
    names = {1: ("element",), 2: ("position", "token"), 3: ("layer", "row", "channel")}[len(index)]
    places = [i + (first if name == "position" else 0) for i, name in zip(index, names, strict=True)]
    count = int(np.count_nonzero(~np.isfinite(x)))
    return f"{kind} at " + ", ".join(f"{n} {i}" for n, i in zip(names, places, strict=True)) + f" ({count} in all)"
