"""The WKV recurrence of reference.forward over all tokens at once, in log2(T) steps.

The state after token t is a sum over the tokens up to t, each decayed by its distance:
``aa_t = sum_i e^{k_i - (t-i) w - pp_t} v_i``. Two such sums over neighbouring spans make one over both, whose
exponent is the larger of the two; so every span of 2, 4, 8, ... tokens that ends in t follows from two of half its
length, for all t at once. No step leaves the stable form, and only T times log2(T) exponentials are taken.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

Array = Any
#: Sums over a span, divided by e^pp: ``aa, bb, pp``, each ``(T, C)``.
Sums = tuple[Array, Array, Array]


def wkv(k: Array, v: Array, w: Array, u: Array, past: Sums) -> tuple[Array, Sums]:
    """Float32 ``k, v (T, C)``, ``w, u (C,)``, ``past`` of ``(1, C)`` each -> ``(T, C)``, sums after the last token."""
    aa, bb, pp = (mx.concatenate([old, new]) for old, new in zip(past, (v, mx.ones_like(k), k), strict=True))
    span = 1  # row t holds the sums over rows max(0, t - span + 1) to t
    while span < len(pp):
        late = join((aa[:-span], bb[:-span], pp[:-span]), (aa[span:], bb[span:], pp[span:]), w * span)
        aa, bb, pp = (mx.concatenate([old[:span], new]) for old, new in zip((aa, bb, pp), late, strict=True))
        span *= 2
    top, bottom, _ = join((aa[:-1], bb[:-1], pp[:-1]), (v, mx.ones_like(k), u + k), mx.zeros_like(w))
    return top / bottom, (aa[-1:], bb[-1:], pp[-1:])


def join(early: Sums, late: Sums, decay: Array) -> Sums:
    """The sums over both of two spans; ``decay (C,)``: what the early one loses in exponent on the way."""
    e = early[2] - decay
    pp = mx.maximum(e, late[2])
    a, b = mx.exp(e - pp), mx.exp(late[2] - pp)
    return a * early[0] + b * late[0], a * early[1] + b * late[1], pp
