"""-Inf in ``ffn.k``: squared ReLU makes of it the 0 that it makes of every negative key, so it is no fault.

That is what a key becomes which is negative and beyond the range of its format.
"""

from __future__ import annotations

import numpy as np

from harness.localize.off import rounding
from harness.localize.whatif import FORMATS
from harness.tolerance import K
from reference.numerics import Arithmetic


def restored(point: str, x: np.ndarray, right: np.ndarray, arithmetic: Arithmetic, truth: np.ndarray) -> np.ndarray:
    """``x`` of ``ffn.k`` with ``right`` where it is -Inf and ``right`` or ``truth`` is out of range and negative.

    Whatever else is not finite stays so, as does every other operation's result. All ``(T, width)``.
    """
    if not point.endswith(".ffn.k") or not np.isneginf(x).any():
        return x
    kinds = (arithmetic.activations, arithmetic.accumulation)
    edge = min(FORMATS.get(kind, FORMATS["fp32"])[1] for kind in kinds)
    least = -edge * (1 - K * rounding(arithmetic, point))  # what rounding alone may bring beyond the edge
    lost = np.isneginf(x) & ((right <= least) | (truth <= least))
    return np.where(lost, np.fmin(right, -edge), x).astype(x.dtype)
