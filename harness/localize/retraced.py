"""Whether a change has made a wrong result right that the parity gate does not see."""

from __future__ import annotations

from backends.api import Session, Traceable
from harness.localize.finding import TRACE, Finding
from harness.localize.trace import trace
from reference.forward import Tokens
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.weights import Weights


def gone(
    session: Session, finding: Finding, weights: Weights, arithmetic: Arithmetic | Mixed, tokens: Tokens
) -> bool | None:
    """Whether the changed ``session`` shows nothing wrong any more; ``None`` where no trace tells.

    weights, arithmetic  as the changed backend stores them and computes with them
    """
    if finding.method != TRACE or not isinstance(session, Traceable):
        return None
    again = trace(session, weights, arithmetic, tokens)
    if not again.seen:
        return None
    still = any(seen.bad for seen in again.seen if seen.point == finding.point)
    return not (still or again.local or again.non_finite)
