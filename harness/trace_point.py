"""Where a wrong backend first goes wrong: its trace points against the reference's, in execution order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.api import Session, Traceable
from harness.compare import first_non_finite, nrms
from harness.tolerance import FLOOR, K
from reference.forward import Tokens, forward
from reference.numerics import UNIT_ROUNDOFF, Arithmetic
from reference.weights import Weights

#: Draws per trace point. Fewer than for the verdict: this says where a backend fails, not whether.
_DRAWS = 2


@dataclass(frozen=True)
class BadPoint:
    """The first trace point that is non-finite, or farther from truth than its own bound."""

    name: str
    error: float
    bound: float
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
    truth: dict[str, np.ndarray] = {}
    bounds: dict[str, float] = {}
    forward(weights, tokens, dtype=np.float64, tap=lambda name, x: truth.__setitem__(name, x.astype(np.float32)))

    def widen(name: str, x: np.ndarray) -> None:
        error = nrms(x, truth[name])
        floor = FLOOR * UNIT_ROUNDOFF[arithmetic.activations]
        bounds[name] = max(bounds.get(name, 0.0), K * max(floor, error if np.isfinite(error) else 0.0))

    for seed in range(_DRAWS):
        forward(weights, tokens, tap=widen, arithmetic=arithmetic, seed=seed)
    found: list[BadPoint] = []

    def look(name: str, x: np.ndarray) -> None:
        if name not in truth or found:
            return
        bad = first_non_finite(x)
        error = float("nan") if bad or x.shape != truth[name].shape else nrms(x, truth[name])
        if not error <= bounds[name]:
            problem = f"{bad[0]} at token {bad[1][0]}, channel {bad[1][1]}" if bad else None
            if problem is None and x.shape != truth[name].shape:
                problem = f"shape {x.shape}, not {truth[name].shape}"
            found.append(BadPoint(name, error, bounds[name], problem))

    session.trace([int(t) for t in tokens], None, look)
    return found[0] if found else None
