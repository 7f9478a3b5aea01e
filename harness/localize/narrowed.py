"""What a state or logits tell beyond the two rows that a fault lies between."""

from __future__ import annotations

import numpy as np

from backends.api import Unavailable, Unsupported
from harness.localize import truncation
from harness.localize.case import Case
from harness.localize.finding import Seen
from harness.localize.normed import broken
from reference.forward import ATT_X, FFN_X, forward
from reference.operations import FIRST, LAST

#: Layer, name and trace points that are in question.
Between = tuple["int | None", str, "list[str]"]

PARTLY = "other logits of the same token are finite: NaN or Inf in front of the head would have been in all of them"


def partly(logits: np.ndarray) -> bool:
    """Whether the first row ``(T, n_vocab)`` that is not finite is so only in part: each logit reads every channel."""
    bad = ~np.isfinite(logits)
    rows = np.flatnonzero(bad.any(axis=1))
    return bool(rows.size) and not bad[rows[0]].all()


def by_norm(states: np.ndarray, case: Case, bad: Seen, found: Between) -> tuple[int | None, str, list[str], str]:
    """The LayerNorm whose row ``(T, n_layer, 5, C)`` is wrong, where no LayerNorm can give it; else what is before it.

    With what tells so; empty where the name stays as it was.
    """
    layer = bad.layer or 0
    row, name = (ATT_X, "ln1") if bad.point.endswith("att_x") else (FFN_X, "ln2")
    point = f"blocks.{layer}.{name}"
    kept: list[np.ndarray] = []
    forward(case.stored, case.tokens, dtype=np.float64, tap=lambda at, x: kept.append(x) if at == point else None)
    if broken(states[:, layer, row], kept[0], case.stored, point, case.arithmetic):
        return layer, point, [], f"no LayerNorm gives what {point} shows, whatever it is given"
    if point == "blocks.0.ln1":
        why = f"what {point} shows is normalised: what it was given is wrong, in one of {', '.join(FIRST)}"
        return None, "emb", list(found[2]), why
    return *found, ""


def of_the_head(case: Case, layer: int | None, point: str, span: list[str]) -> Between:
    """Where the last state is right and the logits are not: whether they are without the last half block too."""
    case.tell("without the last half block")
    quiet = truncation.silenced(case.weights, "ffn")
    try:
        wrong = truncation.fails(case, quiet)
    except (Unavailable, Unsupported, ValueError):  # it cannot be opened over other weights
        return layer, point, span
    inside = [name for name in span if name.startswith("blocks.")]
    return (None, "logits", list(LAST)) if wrong else (layer, point, inside)
