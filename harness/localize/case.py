"""What is being localized, and what a method has found of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.localize.evidence import Evidence, Opener
from harness.localize.finding import Finding
from harness.localize.whatif import harmful
from harness.tolerance import Truth
from reference.numerics import Arithmetic, Emulated
from reference.operations import run
from reference.weights import Weights

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One backend over one model and one prompt.

    stored      the weights as the scheme stores them, dequantized; ``weights`` before that
    arithmetic  that the backend declares
    tokens      the prompt ``(T,)``, from the initial state
    """

    opener: Opener
    weights: Weights
    stored: Weights
    scheme: str
    arithmetic: Arithmetic
    tokens: np.ndarray
    truth: Truth
    tell: Tell

    @property
    def ids(self) -> list[int]:
        """The prompt as a session takes it."""
        return [int(token) for token in self.tokens]

    def evidence(self) -> Evidence:
        """What is known before anything was found."""
        return Evidence(self.weights, self.stored, self.scheme, self.arithmetic, self.tokens)


@dataclass(frozen=True)
class Located:
    """Where a fault is, and what its cause is concluded from; ``cause``: where it is plain already."""

    finding: Finding
    evidence: Evidence
    cause: str = ""


def overflow(case: Case, span: Sequence[str]) -> str | None:
    """The trace point of ``span`` where the declared arithmetic overflows first, if it does so in there."""
    first: list[str] = []

    def tap(name: str, x: np.ndarray) -> None:
        if not first and not np.isfinite(harmful(name, x)).all():
            first.append(name)

    run(case.stored, case.tokens, None, Emulated(case.arithmetic), tap)
    return first[0] if first and first[0] in span else None
