"""What a wrong state or wrong logits look like, in words and figures, where no hypothesis reproduces them."""

from __future__ import annotations

import numpy as np

from harness.compare import at_exponent, nrms
from harness.localize.describe import rearranged
from harness.localize.fitted import described, explained
from harness.localize.match_whole import STATE, Whole
from harness.tolerance import K
from reference.forward import PP, STATE_ROWS

_ROWS = STATE

#: A line is fitted from this many positions on.
_LEAST = 8


def pattern_of_whole(found: Whole) -> str:
    """Everything that can be said."""
    parts = ["no known defect reproduces it"]
    right_state, right_logits = found.right
    bound = K * found.unavoidable
    if found.state is not None and right_state is not None:
        parts.append(_of_state(found.state, right_state, bound))
    if found.logits is not None and right_logits is not None:
        compared = found.logits, right_logits, bound
        moved = rearranged(found.logits, right_logits, bound)
        parts.append("logits: " + ("; ".join(moved) or explained(*compared) or described(*compared)))
        parts.append(growth(_per_position(found.logits, right_logits), bound))
    return "; ".join(part for part in parts if part)


def _per_position(got: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Error of each position in units of truth's spread, ``(T,)``."""
    unit = np.sqrt(np.mean(np.var(right, axis=-1)))
    return np.asarray(np.sqrt(np.mean(np.square(got - right), axis=-1)) / unit)


def growth(errors: np.ndarray, bound: float) -> str:
    """How an error grows with position or depth ``(n,)``: the slope of a fitted line; empty where it does not."""
    n = errors.size
    if n < _LEAST or not np.isfinite(errors).all() or not errors.max() > 0:
        return ""
    first = np.flatnonzero(errors > bound)
    if first.size and first[0] > n // 4 and (errors[: first[0]] < 0.1 * errors.max()).all():
        return f"right until position {first[0]}, from there on wrong ({errors[first[0]]:.1e})"
    x = np.arange(n)
    slope, start = np.polyfit(x, errors, 1)
    rest = errors - (slope * x + start)
    explained = 1 - float(np.square(rest).sum() / max(np.square(errors - errors.mean()).sum(), 1e-300))
    if explained < 0.5 or slope * n < 0.5 * errors.mean():
        return ""
    return f"the error grows by {slope:.1e} a position (fit over {n}, R^2 {explained:.2f})"


def _of_state(got: np.ndarray, right: np.ndarray, bound: float) -> str:
    """Which rows are wrong, and whether another row of truth stands there."""
    moved = at_exponent(got, right[:, PP])
    table = np.array([[nrms(moved[i, row], right[i, row]) for row in _ROWS] for i in range(len(right))])
    wrong = [(i, row) for i in range(len(right)) for column, row in enumerate(_ROWS) if not table[i, column] <= bound]
    if not wrong:
        return "every row of the state is right"
    named = ", ".join(f"{STATE_ROWS[row]} of layer {i}" for i, row in wrong[:4])
    exchanged = [text for i, row in wrong[:8] if (text := _stands_there(got, right, i, row, bound))]
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    depth = growth(table.max(axis=1), bound).replace("position", "layer")
    parts = [f"wrong in the state: {named}{more} (up to {np.nanmax(table):.1e})", *exchanged[:3], depth]
    return "; ".join(part for part in parts if part)


def _stands_there(got: np.ndarray, right: np.ndarray, layer: int, row: int, bound: float) -> str:
    """Another row, or the same of another layer, in the place of this one."""
    here = f"{STATE_ROWS[row]} of layer {layer}"
    if not np.any(got[layer, row]):
        return f"{here} is all zero"
    for i in range(len(right)):
        for other in range(len(STATE_ROWS)):
            if (i, other) != (layer, row) and nrms(got[layer, row], right[i, other]) <= bound:
                return f"{here} holds {STATE_ROWS[other]} of layer {i}"
    factor = float((got[layer, row] * right[layer, row]).sum() / max(np.square(right[layer, row]).sum(), 1e-300))
    if nrms(got[layer, row], factor * right[layer, row]) <= bound and got[layer, PP] is not None:
        return f"{here} has a factor of {factor:.6g}"
    return ""
