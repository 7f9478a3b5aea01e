"""Whether a row of LayerNorm results can be one at all, whatever it was given.

Taken back through weight and bias, the results of a right LayerNorm have mean 0 over the channels and a variance of
s / (s + eps), s being that of its input: a fault before it does not show in either, one of its own nearly always does.
"""

from __future__ import annotations

import numpy as np

from harness.localize.off import rounding
from harness.tolerance import K
from reference.numerics import Arithmetic
from reference.weights import Weights

#: Channels with smaller weights than this, of the largest, are too noisy to be taken back; if they are many, nothing
#: is concluded.
_LEAST_WEIGHT, _MOST_LEFT_OUT = 1e-3, 0.05

#: So many times smaller may a fault before it make its input (as a variance) and eps count for that much more.
_SHRUNK = 100.0


def broken(own: np.ndarray, right: np.ndarray, weights: Weights, name: str, arithmetic: Arithmetic) -> bool:
    """Whether ``own (T, C)``, where ``right`` is, cannot come from LayerNorm ``name`` (``blocks.3.ln2``).

    What rounding may make of them, at worst, is allowed.
    """
    weight, bias = (weights[f"{name}.{part}"].array(np.float64) for part in ("weight", "bias"))
    used = np.abs(weight) > _LEAST_WEIGHT * np.abs(weight).max()
    if not used.mean() >= 1 - _MOST_LEFT_OUT:
        return False
    (mean, variance, largest), (known_mean, known, _) = (_taken_back(x, weight, bias, used) for x in (own, right))
    tolerance = K * rounding(arithmetic, name.rpartition(".")[2]) * largest
    deficit = np.maximum(1 - known, 0)
    off = np.abs(mean - known_mean) > tolerance
    off |= variance > 1 + 2 * tolerance
    off |= 1 - variance > _SHRUNK * deficit + 2 * tolerance
    return bool(off.any())


def _taken_back(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and variance over the channels, and what a relative error of 1 of one element would come to: ``(T,)``."""
    y = (np.asarray(x, np.float64)[:, used] - bias[used]) / weight[used]
    size = (np.abs(x[:, used]) + np.abs(bias[used])) / np.abs(weight[used])
    return y.mean(axis=1), y.var(axis=1), size.max(axis=1)
