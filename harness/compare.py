"""How far two results are apart: plain functions of arrays. None of them lets a NaN look small.

An empty comparison is an error, never a zero: what compares nothing proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS


class NothingToCompare(ValueError):
    """Two results with no element in common, or of different shapes; one line."""


def _pair(got: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(got, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise NothingToCompare(f"cannot compare shape {a.shape} with shape {b.shape}")
    return a, b


def max_abs(got: np.ndarray, truth: np.ndarray) -> float:
    """Largest absolute difference; NaN where any element is NaN."""
    a, b = _pair(got, truth)
    return float(np.abs(a - b).max())


def nrms(got: np.ndarray, truth: np.ndarray) -> float:
    """Normalised RMS error: ``rms(got - truth) / rms(truth)``; Inf where truth is all zero and got is not."""
    a, b = _pair(got, truth)
    with np.errstate(over="ignore"):  # beyond 1e154 the answer is Inf, which is large enough
        return _ratio(float(np.sqrt(np.mean(np.square(a - b)))), float(np.sqrt(np.mean(np.square(b)))))


def cosine(got: np.ndarray, truth: np.ndarray) -> float:
    """Cosine of the angle between the two, flattened; NaN where one is all zero."""
    a, b = _pair(got, truth)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a.ravel() @ b.ravel() / norms) if norms > 0 else float("nan")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities over the last axis, in float64."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def kl_divergence(got: np.ndarray, truth: np.ndarray) -> float:
    """Mean over positions of KL(truth || got) in nats, from logits ``(..., n_vocab)``."""
    a, b = _pair(got, truth)
    p, q = log_softmax(b), log_softmax(a)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def top1_agreement(got: np.ndarray, truth: np.ndarray) -> float:
    """Fraction of positions whose most likely token is the same."""
    a, b = _pair(got, truth)
    return float(np.mean(a.argmax(axis=-1) == b.argmax(axis=-1)))


def topk_overlap(got: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Mean over positions of ``|top-k of got ∩ top-k of truth| / k``."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in _pair(got, truth))
    tops = [np.argpartition(x, -k, axis=-1)[:, -k:] for x in (a, b)]
    return float(np.mean([len(np.intersect1d(x, y)) / k for x, y in zip(*tops, strict=True)]))


def first_non_finite(x: np.ndarray) -> tuple[str, tuple[int, ...]] | None:
    """``("NaN" | "Inf", index)`` of the first element that is not finite, NaN before Inf."""
    for name, mask in (("NaN", np.isnan(x)), ("Inf", np.isinf(x))):
        if mask.any():
            return name, tuple(int(i) for i in np.argwhere(mask)[0])
    return None


@dataclass(frozen=True)
class LogitsError:
    """Distance of logits ``(T, n_vocab)`` from truth; every figure in units of truth's spread.

    rms    over all positions and tokens        worst  RMS of the worst position
    peak   largest single element               position, token  where the peak is
    """

    rms: float
    worst: float
    peak: float
    position: int
    token: int


def spread(logits: np.ndarray) -> float:
    """The unit of logits' errors: their standard deviation over the vocabulary, RMS over positions.

    An offset common to all logits carries no information, so a large one must not hide an error.
    """
    return float(np.sqrt(np.mean(np.var(np.asarray(logits, dtype=np.float64), axis=-1))))


def logits_error(got: np.ndarray, truth: np.ndarray, unit: float | None = None) -> LogitsError:
    """Compare logits ``(T, n_vocab)``; ``unit`` is the :func:`spread` of truth unless given.

    Give it where only some positions are compared: at one position the logits may all be nearly equal.
    """
    a, b = _pair(got, truth)
    unit = spread(b) if unit is None else unit
    difference = np.abs(a - b)
    rows = np.sqrt(np.mean(np.square(difference), axis=-1))
    position, token = np.unravel_index(int(np.argmax(difference)), difference.shape)
    return LogitsError(
        rms=_ratio(float(np.sqrt(np.mean(np.square(rows)))), unit),
        worst=_ratio(float(rows.max()), unit),
        peak=_ratio(float(difference.max()), unit),
        position=int(position),
        token=int(token),
    )


def at_exponent(state: np.ndarray, pp: np.ndarray) -> np.ndarray:
    """A canonical state ``(n_layer, 5, n_embd)`` moved to the exponents ``pp (n_layer, n_embd)``.

    It stands for ``aa e^pp`` and ``bb e^pp``: a shift of pp, with aa and bb scaled to match, is the same
    state. What cannot be moved becomes Inf or NaN in aa and bb, never small.
    """
    out = np.array(state, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        factor = np.exp(out[:, PP] - pp)
        out[:, AA] *= factor
        out[:, BB] *= factor
    out[:, PP] = pp
    return out


@dataclass(frozen=True)
class StateError:
    """Distance of a state from truth, per layer and row, each normalised by truth's RMS there.

    aa and bb are sums of exponentials: an exponent that is off by d puts them off by ``e^d - 1``. Of them the distance
    is ``log(1 + error)``, the same while it is small; beyond, it adds up as d does, where the error itself multiplies.

    rms    over all layers and rows        worst  the worst layer and row, which ``layer``, ``row`` name

    ``plain_rms`` and ``plain_worst`` are of the errors themselves: terms that add up grow there with position, in the
    exponent only with its logarithm.
    """

    rms: float
    worst: float
    layer: int
    row: str
    plain_rms: float
    plain_worst: float


def state_error(got: np.ndarray, truth: np.ndarray) -> StateError:
    """Compare canonical states ``(n_layer, 5, n_embd)`` at truth's ``pp``, where truth's ``bb`` is at least 1.

    Any other common exponent would be the backend's to choose, and a large one makes every error small.
    """
    a, b = _pair(got, truth)
    a = at_exponent(a, b[:, PP])
    rows = (FFN_X, ATT_X, AA, BB)
    table = np.array([[nrms(a[layer, row], b[layer, row]) for row in rows] for layer in range(len(a))])
    plain = table.copy()
    table[:, [rows.index(AA), rows.index(BB)]] = np.log1p(table[:, [rows.index(AA), rows.index(BB)]])
    layer, row = np.unravel_index(int(np.argmax(table)), table.shape)
    with np.errstate(over="ignore"):
        plain_rms = float(np.sqrt(np.mean(np.square(plain))))
    return StateError(
        rms=float(np.sqrt(np.mean(np.square(table)))),
        worst=float(table.max()),
        layer=int(layer),
        row=STATE_ROWS[rows[row]],
        plain_rms=plain_rms,
        plain_worst=float(plain.max()),
    )


def _ratio(error: float, scale: float) -> float:
    if scale > 0:
        return error / scale
    return 0.0 if error == 0 else float("inf")
