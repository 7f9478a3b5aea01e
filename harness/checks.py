"""One comparison of a session's result with truth, and what makes it pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backends.api import Session, State
from harness.compare import first_non_finite, logits_error, state_error
from harness.tolerance import Truth

NAN = float("nan")


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


def worst(checks: Sequence[Check]) -> Check:
    """The check whose error is largest against its bound."""
    return max(checks, key=lambda check: check.ratio)


def call(session: Session, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
    """``forward`` with its logits copied: a session that reuses its buffer must not rewrite our evidence."""
    logits, new = session.forward(tokens, state)
    return (logits.copy() if isinstance(logits, np.ndarray) else logits), new


def logits_check(
    name: str, got: object, truth: Truth, positions: slice, allowance: float = 1.0, where: str | None = None
) -> Check:
    """Logits ``(T, n_vocab)`` or ``(n_vocab,)`` against truth's at ``positions``; bounds times ``allowance``."""
    first = range(len(truth.logits))[positions][0]
    return against(name, got, truth.logits[positions], truth, first, allowance, where)


def against(
    name: str,
    got: object,
    expected: np.ndarray,
    truth: Truth,
    first: int = 0,
    allowance: float = 1.0,
    where: str | None = None,
) -> Check:
    """Logits against ``expected (T, n_vocab)``, whose first position is ``first``, under truth's bounds."""
    got = got[None] if isinstance(got, np.ndarray) and got.ndim == 1 else got
    bad = problem(got, expected.shape, first)
    if bad is not None or not isinstance(got, np.ndarray):
        return Check(name, "", NAN, NAN, where or "logits", bad)
    error = logits_error(got, expected, truth.unit)
    ratios = truth.logits_ratios(error)
    if len(expected) < len(truth.logits):
        ratios.pop("rms")  # that bound is of the mean over all positions
    place = where or f"position {first + error.position}, token {error.token}"
    return worst([Check(name, statistic, e, allowance * bound, place) for statistic, (e, bound) in ratios.items()])


def state_check(name: str, got: object, truth: Truth) -> Check:
    """A canonical state against truth's at the end of its prompt."""
    bad = problem(got, truth.state.shape)
    if bad is not None or not isinstance(got, np.ndarray):
        return Check(name, "", NAN, NAN, "state", bad)
    error = state_error(got, truth.state)
    place = f"layer {error.layer}, {error.row}"
    if not np.isfinite(error.worst):
        bad = f"not finite at truth's exponent in {place}: its pp cannot be the state's"
        return Check(name, "", NAN, NAN, place, bad)
    return worst([Check(name, s, e, bound, place) for s, (e, bound) in truth.state_ratios(error).items()])


def problem(x: object, shape: tuple[int, ...], first: int = 0, finite: bool = True) -> str | None:
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
