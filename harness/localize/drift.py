"""Does the error stay, or does it grow with position? State and logits against truth over thousands of tokens.

The backend, truth (float64) and emulated runs of the declared arithmetic go through one long text side by side, a
few tokens at a time, so that only errors are kept. Some positions, evenly spaced on a logarithmic scale, are looked at.

    level      what the arithmetic must be off by there: the largest of the emulated runs so far
    bound      K times that; of a state K times in the exponent, as the gate takes it (``StateError``)
    exponent   s where the error grows as position^s, with its interval: 0 stays, 1/2 is a random walk, 1 adds up

An error beyond its bound that grows, by more than chance and over the whole text by more than K, grows without limit
as far as anybody has looked. One inside its bound may grow as the arithmetic's own does: in float32 the exponent pp of
a channel with a long memory is rounded at every token.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from backends.api import Session, State, StateAccess
from harness.budget import hold
from harness.checks import call, problem
from harness.compare import logits_error, state_error
from harness.localize.bad_weights import bad_weights
from harness.localize.finding import BAD_WEIGHTS
from harness.localize.report import WIDTH
from harness.tolerance import K, Truth, derive
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

BOUNDED, GROWS, OFF = "bounded", "grows without limit", "beyond its bound, without growing"
#: NaN, Inf or another shape: nothing to fit.
BROKEN = "cannot be compared"

#: Tokens of a call, and positions per decade that are looked at.
CALL, PER_DECADE = 16, 24

#: Emulated runs. Their chains are shorter than declared ones, which only scales what they are off by.
_DRAWS, _LINKS = 2, 8

#: Tokens on which the bound is known from the arithmetic as declared, and where the fit of the exponent begins.
_KNOWN = 48

#: Quantile of the normal distribution for an interval of 99.9 %.
_Z = 3.29


@dataclass(frozen=True)
class Curve:
    """One statistic against position, and what the declared arithmetic is off by there.

    exponent, arithmetic  (estimate, low, high) of the backend, and of the emulated run that grows fastest
    """

    name: str
    positions: np.ndarray
    error: np.ndarray
    bound: np.ndarray
    exponent: tuple[float, float, float]
    arithmetic: tuple[float, float, float]

    @property
    def beyond(self) -> int | None:
        """The first position from which on the error is not inside its bound; ``None``: it always is."""
        bad = np.flatnonzero(~((self.error <= self.bound) & np.isfinite(self.error)))
        return int(self.positions[bad[0]]) if bad.size else None

    @property
    def growing(self) -> bool:
        """By more than chance, and over the positions looked at by a factor that K would not cover."""
        growth = (self.positions[-1] / min(_KNOWN, self.positions[-1])) ** self.exponent[0]
        return bool(self.exponent[1] > 0 and growth > K)

    @property
    def verdict(self) -> str:
        """Of this statistic."""
        if self.beyond is None:
            return BOUNDED
        return GROWS if self.growing else OFF

    def leaves(self) -> float | None:
        """Where an error still inside its bound that grows faster than the arithmetic's own would leave it."""
        if self.beyond is not None or not self.growing or not self.exponent[1] > self.arithmetic[2]:
            return None
        return float(self.positions[-1] * (self.bound[-1] / self.error[-1]) ** (1 / self.exponent[0]))


@dataclass(frozen=True)
class Drift:
    """What became of the error over ``positions`` tokens.

    problem  a result that could not be compared
    weights  what is not finite in the weights themselves; then nothing was run
    """

    positions: int
    curves: tuple[Curve, ...]
    problem: str = ""
    weights: str = ""

    @property
    def verdict(self) -> str:
        """The worst of all curves; what gives NaN or Inf, or no comparison at all, is not bounded."""
        if self.weights:
            return BAD_WEIGHTS
        found = {curve.verdict for curve in self.curves}
        if self.problem or not found:
            return BROKEN
        return next(verdict for verdict in (GROWS, OFF, BOUNDED) if verdict in found)

    @property
    def passed(self) -> bool:
        return self.verdict == BOUNDED

    def text(self) -> str:
        """A few lines of at most 80 columns for people."""
        if self.problem or self.weights:
            return textwrap.fill(f"drift: {self.weights or self.problem}", WIDTH)
        lines = [line for curve in self.curves for line in _lines(curve)]
        return "\n".join([f"drift over {self.positions} tokens: {self.verdict}", *lines])


def drift(
    session: Session,
    weights: Weights,
    scheme: str,
    arithmetic: Arithmetic,
    positions: int = 10_000,
    tell: Callable[[str], None] = lambda text: None,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> Drift:
    """Run ``positions`` tokens (``tokens``, over and over, or random ids) and compare along the way."""
    ids = _ids(weights.config.n_vocab, positions, tokens, seed)
    with threadpool_limits(1, user_api="blas"):
        stored = hold(apply(weights, scheme))
        spoiled = bad_weights(weights, stored, scheme)
        if spoiled is not None:
            return Drift(len(ids), (), weights=spoiled.cause)
        truth = derive(weights, scheme, arithmetic, ids[:_KNOWN])
        runs = _Runs(stored, arithmetic, session)
        looked, errors = [], []
        for end in looked_at(len(ids)):
            bad = runs.advance(ids[runs.position : end], truth)
            if bad:
                return Drift(len(ids), (), f"{bad} at position {end}")
            looked.append(end)
            errors.append(runs.errors)
            tell(f"{end} of {len(ids)} tokens")
    in_state = {"state": truth.e_state_rms, "worst state row": truth.e_state_worst}
    with np.errstate(over="ignore"):
        known = {"logits": truth.e_worst} | {name: float(np.expm1(e)) for name, e in in_state.items()}
    return Drift(len(ids), tuple(_curves(np.array(looked), errors, known)))


def looked_at(positions: int) -> list[int]:
    """Ends of calls that are looked at: multiples of CALL, evenly spaced on a logarithmic scale; and the last."""
    n = max(2, round(PER_DECADE * math.log10(max(10.0, positions / CALL))))
    ends = {CALL * round(end / CALL) for end in np.geomspace(CALL, positions, n)}
    return sorted({end for end in ends if 0 < end < positions} | {positions})


class _Runs:
    """Truth, the emulated runs and the backend, all at the same position."""

    #: Tokens that the reference takes at once.
    PIECE = 256

    def __init__(self, stored: Weights, arithmetic: Arithmetic, session: Session) -> None:
        self._stored = stored
        self._short = replace(arithmetic, chain=min(arithmetic.chain, _LINKS))
        self._session = session
        self._truth: np.ndarray | None = None
        self._draws: list[np.ndarray | None] = [None] * _DRAWS
        self._state: State | None = None
        self.position = 0
        self.errors: dict[str, list[float]] = {}

    def advance(self, ids: list[int], truth: Truth) -> str:
        """Run ``ids``; what is wrong with the form of the backend's result, if anything is.

        ``errors``: statistic -> that of the backend, then those of the emulated runs.
        """
        for at in range(0, len(ids), self.PIECE):
            piece = ids[at : at + self.PIECE]
            right, self._truth = forward(self._stored, piece, self._truth, dtype=np.float64)
            drawn = [self._drawn(i, piece) for i in range(_DRAWS)]
            got = self._called(piece)
            self.position += len(piece)
        bad = problem(got, right.shape)
        if bad is not None:
            return bad
        rows = [got, *drawn]
        self.errors = {"logits": [logits_error(row[None], right[None], truth.unit).rms for row in rows]}
        if not isinstance(self._session, StateAccess):
            return ""
        state = self._session.export_state(self._state)
        assert self._truth is not None
        bad = problem(state, self._truth.shape)
        if bad is not None:
            return f"state: {bad}"
        with np.errstate(over="ignore"):  # a state that cannot be moved to truth's exponent is far off
            states = [state_error(x, self._truth) for x in (state, *self._draws) if x is not None]
        self.errors |= {"state": [e.plain_rms for e in states], "worst state row": [e.plain_worst for e in states]}
        return ""

    def _drawn(self, i: int, piece: list[int]) -> np.ndarray:
        seed = 1 + i + _DRAWS * self.position
        logits, self._draws[i] = forward(self._stored, piece, self._draws[i], arithmetic=self._short, seed=seed)
        return logits

    def _called(self, piece: list[int]) -> np.ndarray:
        for at in range(0, len(piece), CALL):
            got, self._state = call(self._session, piece[at : at + CALL], self._state)
        return got


def _ids(n_vocab: int, positions: int, tokens: Sequence[int] | None, seed: int) -> list[int]:
    if tokens is None:
        return [int(i) for i in np.random.default_rng(seed).integers(0, n_vocab, positions)]
    return [int(tokens[i % len(tokens)]) for i in range(positions)]


def _curves(
    positions: np.ndarray, errors: Sequence[Mapping[str, list[float]]], known: Mapping[str, float]
) -> Iterator[Curve]:
    """``known``: statistic -> what the arithmetic as declared is off by over the first positions."""
    for name in errors[0]:
        table = np.array([found[name] for found in errors])  # (positions, 1 + draws)
        early = float(table[positions <= _KNOWN, 1:].max())
        scale = max(1.0, known[name] / early) if early > 0 else 1.0
        level = np.maximum(known[name], scale * np.maximum.accumulate(table[:, 1:].max(axis=1)))
        with np.errstate(over="ignore"):
            bound = K * level if name == "logits" else np.expm1(K * np.log1p(level))
        fits = [fitted(positions, column) for column in table.T]
        yield Curve(name, positions, table[:, 0], bound, fits[0], max(fits[1:], key=lambda fit: fit[2]))


def fitted(positions: np.ndarray, error: np.ndarray) -> tuple[float, float, float]:
    """The exponent s of ``error ~ position^s`` beyond the first positions, with its interval; NaN below 4 points."""
    chosen = (positions >= _KNOWN) & (error > 0) & np.isfinite(error)
    if np.count_nonzero(chosen) < 4:
        return math.nan, math.nan, math.nan
    x, y = np.log(positions[chosen]), np.log(error[chosen])
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    half = _Z * float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))
    return slope, slope - half, slope + half


def _lines(curve: Curve) -> list[str]:
    where = "inside its bound" if curve.beyond is None else f"beyond its bound from position {curve.beyond} on"
    text = (
        f"{curve.name}: {curve.verdict}; error {curve.error[-1]:.2e} at {curve.positions[-1]},"
        f" bound {curve.bound[-1]:.2e}, {where}; {_growth(curve)}"
    )
    leaves = curve.leaves()
    text += "" if leaves is None else f"; would leave its bound near position {leaves:.0f}"
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _growth(curve: Curve) -> str:
    (s, low, high), (own, _, own_high) = curve.exponent, curve.arithmetic
    if math.isnan(s):
        return "too few positions for a slope"
    text = f"grows as position^{s:.2f} ({low:.2f} to {high:.2f})"
    return text if math.isnan(own) else f"{text}, the arithmetic's own as position^{own:.2f} (up to {own_high:.2f})"
