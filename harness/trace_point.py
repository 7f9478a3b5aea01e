"""Where a wrong backend first goes wrong, for a failing parity row."""

from __future__ import annotations

from dataclasses import dataclass

from backends.api import Session, Traceable
from harness.localize.answer import start
from harness.localize.trace import trace
from reference.forward import Tokens
from reference.numerics import Arithmetic
from reference.weights import Weights


@dataclass(frozen=True)
class BadPoint:
    """The trace point where it begins: non-finite, or farther from what it should be than its own bound."""

    name: str
    error: float | None
    bound: float | None
    problem: str | None

    def __str__(self) -> str:
        what = self.problem or f"error {self.error:.2e} exceeds bound {self.bound:.2e}"
        return f"first bad trace point {self.name}: {what}"


def first_bad_point(session: Session, weights: Weights, arithmetic: Arithmetic, tokens: Tokens) -> BadPoint | None:
    """Look for it in one traced run; ``weights`` are the scheme's.

    ``None`` where the backend shows no trace, or all that it shows is right.
    """
    if not isinstance(session, Traceable):
        return None
    found = start(trace(session, weights, arithmetic, tokens))
    if found is None:
        return None
    problem = found.problem and f"{found.problem} at token {found.token}, channel {found.channel}"
    return BadPoint(found.step.point, found.error, found.bound, problem or None)
