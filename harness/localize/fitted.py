"""A wrong result described by what can be fitted to it: factors, offsets, limits, steps, single weights."""

from __future__ import annotations

import numpy as np

from harness.compare import nrms
from harness.localize.describe import channels_in_words, rearranged, tokens_in_words, wrong_lines

#: A fit explains an error where it leaves at most this fraction of it.
_ENOUGH = 0.1


def explained(got: np.ndarray, right: np.ndarray, bound: float) -> str:
    """What makes the right result the one shown, fitted where it is wrong at all; empty where nothing does."""
    lines = zip(wrong_lines(got, right, bound), got.shape, strict=True)
    tokens, channels = (wrong if wrong.size < 0.9 * n else np.arange(n) for wrong, n in lines)
    if not tokens.size or not np.isfinite(got).all():
        return ""
    inside = np.ix_(tokens, channels)
    some, should = got[inside], right[inside]
    enough = max(bound, _ENOUGH * nrms(some, should))
    found = _fit(some, should, enough) or "; ".join(rearranged(some, should, bound)) or _limited(some, should, enough)
    return ", ".join([*where(got, right, bound), found]) if found else ""


def where(got: np.ndarray, right: np.ndarray, bound: float) -> list[str]:
    """Tokens and channels that are wrong, in words; nothing where all are."""
    tokens, channels = wrong_lines(got, right, bound)
    found = []
    if 0 < tokens.size < got.shape[0]:
        found.append(tokens_in_words(tokens, got.shape[0]))
    if 0 < channels.size < got.shape[1]:
        found.append(channels_in_words(channels, got.shape[1]))
    return found


def described(got: np.ndarray, right: np.ndarray, bound: float) -> str:
    """Error, where, how far it is related to the right result."""
    wrong = nrms(got, right)
    share = float(np.corrcoef(got.ravel(), right.ravel())[0, 1]) if np.std(got) and np.std(right) else float("nan")
    parts = [f"error {wrong:.1e} where {bound:.1e} is allowed", *where(got, right, bound)]
    parts.append(f"correlation with the right result {share:.3f}")
    if wrong < 0.05:
        parts.append(f"as large as if rounded to {-np.log2(wrong) - 1.3:.0f} significant bits")
    return ", ".join(parts)


def _fit(got: np.ndarray, right: np.ndarray, enough: float) -> str:
    """A factor and an offset by least squares: over everything, per channel, per token."""
    if not np.any(got):
        return "all zero there"
    if got.size < 4:
        return ""
    if np.all(got == got.flat[0]):
        return f"every value is {got.flat[0]:.6g} there"
    factor = float((got * right).sum() / np.square(right).sum()) if np.any(right) else 0.0
    left = nrms(got, factor * right)
    if left <= enough:
        return f"a constant factor of {factor:.6g}{_known(factor)} explains it to {left:.1e}"
    matrix = np.stack([right.ravel(), np.ones(right.size)], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(matrix, got.ravel(), rcond=None)
    left = nrms(got, slope * right + offset)
    if left <= enough:
        return f"{slope:.6g} times the right result plus {offset:.4g} explains it to {left:.1e}"
    for axis, kind in ((0, "channel"), (1, "token")):
        found = _per_line(got, right, axis, kind, enough) if got.shape[axis] >= 4 else ""
        if found:
            return found
    return ""


def _limited(got: np.ndarray, right: np.ndarray, enough: float) -> str:
    """Values clipped at a limit, or all of them multiples of one step."""
    for name, limit, clip in (("above", got.max(), np.minimum), ("below", got.min(), np.maximum)):
        left = nrms(got, clip(right, limit))
        if left <= enough and int((got == limit).sum()) > 1:
            return f"values are clipped {name} {limit:.6g}, which explains it to {left:.1e}"
    for power in range(-10, 4):
        step = 2.0**power
        if np.array_equal(np.round(got / step) * step, got) and nrms(got, np.round(right / step) * step) <= enough:
            return f"every value is a multiple of {step:g}"
    return ""


def _per_line(got: np.ndarray, right: np.ndarray, axis: int, kind: str, enough: float) -> str:
    factors = (got * right).sum(axis=axis, keepdims=True) / np.maximum(
        np.square(right).sum(axis=axis, keepdims=True), 1e-300
    )
    left = nrms(got, factors * right)
    if left <= enough:
        return f"a factor per {kind}, {factors.min():.4g} to {factors.max():.4g}, explains it to {left:.1e}"
    offsets = (got - right).mean(axis=axis, keepdims=True)
    left = nrms(got, right + offsets)
    if left <= enough:
        return f"an offset per {kind}, {offsets.min():.4g} to {offsets.max():.4g}, explains it to {left:.1e}"
    return ""


def _known(factor: float) -> str:
    """What a factor that stands out may be."""
    power = np.log2(abs(factor)) if factor else 0.5
    if abs(power - round(power)) < 1e-3 and round(power) != 0:
        return f" (2^{round(power)}: rescaling that is not undone, or undone twice)"
    for a, b in ((7, 8), (8, 7), (127, 128), (128, 127), (15, 16), (16, 15)):
        if abs(factor - a / b) < 1e-3:
            return f" ({a}/{b})"
    return ""


def one_weight(got: np.ndarray, right: np.ndarray, x: np.ndarray, weight: np.ndarray, bound: float) -> str:
    """A single weight whose being wrong explains a single wrong channel of a product; empty for anything else."""
    _, channels = wrong_lines(got, right, bound)
    if channels.size != 1 or not np.isfinite(got).all():
        return ""
    channel = int(channels[0])
    off = got[:, channel] - right[:, channel]
    sizes = np.maximum(np.square(x).sum(axis=0), 1e-300)
    by = off @ x / sizes
    column = int(np.argmax(np.square(by) * sizes))
    left = float(np.linalg.norm(off - by[column] * x[:, column]) / np.linalg.norm(off))
    if left > _ENOUGH:
        return ""
    wrong, right_one = weight[channel, column] + by[column], weight[channel, column]
    place = f"row {channel}, column {column} is {wrong:.6g}, not {right_one:.6g}"
    return f"one weight explains it, to {left:.1e} of the error: {place}"


def columns_that_miss(got: np.ndarray, x: np.ndarray, weight: np.ndarray, group: int, bound: float) -> str:
    """Which groups of a product's inputs have another share in the result than they should: ``x (T, K)``.

    Fitted over all tokens and outputs at once: one factor for each group of neighbouring columns.
    """
    n_groups = -(-x.shape[1] // group)
    if not np.isfinite(got).all() or n_groups < 2:
        return ""
    parts = np.stack(
        [
            (x[:, g * group : (g + 1) * group] @ weight[:, g * group : (g + 1) * group].T).ravel()
            for g in range(n_groups)
        ],
        axis=1,
    )
    factors, *_ = np.linalg.lstsq(parts, got.ravel(), rcond=None)
    left = nrms(got.ravel(), parts @ factors)
    odd = np.flatnonzero(np.abs(factors - 1) > 1e-3)
    if not 0 < odd.size < n_groups or not left <= max(bound, 0.1 * nrms(got, (parts.sum(axis=1)).reshape(got.shape))):
        return ""
    listed = ", ".join(f"{g * group} to {min((g + 1) * group, x.shape[1]) - 1} ({factors[g]:.3g})" for g in odd[:4])
    more = ", ..." if odd.size > 4 else ""
    return f"input columns {listed}{more} count with another factor than 1, which explains it to {left:.1e}"
