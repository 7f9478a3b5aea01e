"""How large the values of every operation get on a text, in float32: what a narrower format has to hold.

A text is run in chunks with the state handed on, and nothing but the largest values is kept, so memory does not
depend on its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reference.forward import AA, BB, PP, check_tokens
from reference.numerics import CHAIN, Exact
from reference.operations import Here, recurrence, run, steps
from reference.weights import Tensor, Weights

#: Tokens at a time. The widest results, logits, are then some 50 MB.
CHUNK = 256

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of one operation.

    value           of its results that can do harm: what ReLU drops (negative ``ffn.k``) and what saturates
                    (the product under a sigmoid) cannot
    token, channel  where that is
    inner           of what it adds up on the way: partial sums of a product, sums of WKV; 0 where they were not asked
                    for. Counts where these are kept in the narrow format
    """

    point: str
    layer: int | None
    name: str
    value: float = 0.0
    token: int = 0
    channel: int = 0
    inner: float = 0.0

    def largest(self, inner: bool) -> float:
        """With ``inner`` values or without."""
        return max(self.value, self.inner) if inner else self.value


def chunks(tokens: Sequence[int] | np.ndarray, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """``(first position, tokens)`` of each part of a text."""
    ids = np.asarray(tokens)
    for start in range(0, len(ids), size):
        yield start, ids[start : start + size]


def measure(
    weights: Weights,
    tokens: Sequence[int] | np.ndarray,
    inner: bool = False,
    tell: Tell = lambda text: None,
) -> dict[str, Peak]:
    """The peak of every operation, by trace point, in execution order.

    ``inner``: of partial sums too, which takes some time. Raises TokenError for an empty text or a wrong id.
    A magnitude that is not a number or beyond float32 counts as Inf.
    """
    ids = check_tokens(tokens, weights.config.n_vocab)
    layout = list(steps(weights.config))
    found = {step.point: Peak(step.point, step.layer, step.name) for step in layout}
    state: np.ndarray | None = None
    watched = {step.point: _watched(found, step.point) for step in layout if step.name == "att.wkv" and inner}
    for start, part in chunks(ids):
        op = _Watching(found, start, inner)
        _, state = run(weights, part, state, op, replaced=watched)
        tell(f"magnitudes: {start + len(part)} of {len(ids)} tokens")
    return found


class _Watching(Exact):
    """Float32, and a note of the largest magnitude at each point."""

    def __init__(self, found: dict[str, Peak], start: int, inner: bool, point: str = "") -> None:
        super().__init__(np.float32)
        self._found, self._start, self._inner, self._point = found, start, inner, point

    def at(self, point: str, /) -> _Watching:
        return _Watching(self._found, self._start, self._inner, point)

    def act(self, x: np.ndarray, /) -> np.ndarray:
        if x.ndim == 2:  # ``1 - mu`` has one axis, and is no result
            self._see(x)
        return x

    residual = act

    def wkv(self, x: np.ndarray, /) -> np.ndarray:
        return x  # exponents among them; see _watched

    def linear(self, x: np.ndarray, weight: Tensor, /) -> np.ndarray:
        out = super().linear(x, weight)
        if self._inner:
            self._partial(x, weight)
        if not self._point.endswith(".r"):  # a sigmoid takes Inf for what it is
            self._see(out)
        return out

    def _see(self, x: np.ndarray) -> None:
        size = np.maximum(x, 0) if self._point.endswith(".ffn.k") else np.abs(x)
        size = np.where(np.isnan(x), np.float32(np.inf), size)
        token, channel = np.unravel_index(int(np.argmax(size)), size.shape)
        value = float(size[token, channel])
        peak = self._found[self._point]
        if value > peak.value:
            token += self._start
            self._found[self._point] = replace(peak, value=value, token=int(token), channel=int(channel))

    def _partial(self, x: np.ndarray, weight: Tensor) -> None:
        """Sums over growing parts of a row, as a chain of CHAIN roundings sees them; in order, while others shuffle."""
        total = np.zeros((len(x), weight.shape[0]), np.float32)
        w = weight.array(np.float32)
        link = -(-x.shape[1] // CHAIN)
        for start in range(0, x.shape[1], link):
            total += x[:, start : start + link] @ w[:, start : start + link].T
            note_inner(self._found, self._point, total)


def note_inner(found: dict[str, Peak], point: str, x: np.ndarray) -> None:
    """Raise the ``inner`` peak of a point."""
    size = float(np.abs(x).max(initial=0))
    found[point] = replace(found[point], inner=max(found[point].inner, size if size == size else float("inf")))


def _watched(found: dict[str, Peak], point: str) -> Callable[[Here], Any]:
    """WKV, and a note of how large its sums get; exponents may be large and negative, which is harmless."""

    def compute(h: Here) -> Any:
        k, v, w = h.read("att.k"), h.read("att.v"), np.exp(h.vector("att.time_decay"))
        aa, bb, pp = h.past[AA], h.past[BB], h.past[PP]
        for t in range(len(k)):
            top = np.maximum(pp - w, k[t])
            decay, gain = np.exp(pp - w - top), np.exp(k[t] - top)
            aa, bb, pp = decay * aa + gain * v[t], decay * bb + gain, top
            note_inner(found, point, aa)
            note_inner(found, point, bb)
        return recurrence(h)

    return compute
