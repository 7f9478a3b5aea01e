"""Faults of the WKV recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.forward import AA, PP, WkvState
from reference.numerics import Rounding
from reference.operations import Here, recurrence
from suites.selftest.planted.fault import Fault, Wrong, operation, rounded, tensor

_POINT = "att.wkv"


@dataclass(frozen=True)
class Now:
    """One token of the recurrence: its key and value, decay and bonus, each ``(C,)``; ``r`` rounds."""

    k: np.ndarray
    v: np.ndarray
    w: np.ndarray
    u: np.ndarray
    r: Rounding
    t: int


def read(past: WkvState, now: Now) -> np.ndarray:
    """The result at one token, from the sums before it."""
    r, uk = now.r, now.r(now.u + now.k)
    top = np.maximum(past.pp, uk)
    old, new = r(np.exp(past.pp - top)), r(np.exp(uk - top))
    return np.asarray(r(r(r(old * past.aa) + r(new * now.v)) / r(r(old * past.bb) + new)))


def keep(past: WkvState, now: Now) -> WkvState:
    """The sums after one token."""
    r = now.r
    pp = np.maximum(r(past.pp - now.w), now.k)
    old, new = r(np.exp(past.pp - now.w - pp)), r(np.exp(now.k - pp))
    return WkvState(r(r(old * past.aa) + r(new * now.v)), r(r(old * past.bb) + new), pp)


def looped(
    read: Callable[[WkvState, Now], np.ndarray] = read,
    keep: Callable[[WkvState, Now], WkvState] = keep,
    vectors: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda decay, u: (np.exp(decay), u),
) -> Wrong:
    """The recurrence token by token, with another way to read, to keep, or to make w and u of the vectors."""

    def wrong(h: Here) -> tuple[np.ndarray, WkvState]:
        op = h.op.at(h.at + _POINT)
        k, v = h.read("att.k"), h.read("att.v")
        w, u = vectors(h.vector("att.time_decay"), h.vector("att.time_first"))
        past = WkvState(*h.past[AA : PP + 1])
        out = np.empty_like(k)
        for t in range(len(k)):
            now = Now(k[t], v[t], w, u, op.wkv, t)
            out[t] = read(past, now)
            past = keep(past, now)
        return op.act(out), past

    return wrong


def _no_bonus_token(past: WkvState, now: Now) -> np.ndarray:
    return np.asarray(now.r(past.aa / past.bb))


def _after(past: WkvState, now: Now) -> np.ndarray:
    return read(keep(past, now), now)


def _decayed_first(past: WkvState, now: Now) -> np.ndarray:
    return read(past._replace(pp=past.pp - now.w), now)


def _denominator_past_only(past: WkvState, now: Now) -> np.ndarray:
    r, uk = now.r, now.r(now.u + now.k)
    top = np.maximum(past.pp, uk)
    old, new = r(np.exp(past.pp - top)), r(np.exp(uk - top))
    below = np.where(past.bb > 0, r(old * past.bb), new)
    return np.asarray(r(r(r(old * past.aa) + r(new * now.v)) / below))


def _guarded(past: WkvState, now: Now) -> np.ndarray:
    r, uk = now.r, now.r(now.u + now.k)
    top = np.maximum(past.pp, uk)
    old, new = r(np.exp(past.pp - top)), r(np.exp(uk - top))
    return np.asarray(r((old * past.aa + new * now.v) / (old * past.bb + new + 1e-2)))


def _naive_read(past: WkvState, now: Now) -> np.ndarray:
    """No exponent taken out: exponentials in float32 as they are."""
    e = np.exp(np.float32(now.u + now.k)).astype(now.k.dtype)
    here = np.exp(np.float32(past.pp)).astype(now.k.dtype)
    return np.asarray((past.aa * here + e * now.v) / (past.bb * here + e))


def _naive_keep(past: WkvState, now: Now) -> WkvState:
    e = np.exp(np.float32(now.k)).astype(now.k.dtype)
    decay = np.exp(past.pp - now.w)
    return WkvState(decay * past.aa + e * now.v, decay * past.bb + e, np.zeros_like(past.pp))


def _decay_lost_at_new_top(past: WkvState, now: Now) -> WkvState:
    usual = keep(past, now)
    new_top = now.k > past.pp - now.w
    old = np.exp(np.minimum(past.pp - usual.pp, 0))
    new = np.exp(now.k - usual.pp)
    aa, bb = old * past.aa + new * now.v, old * past.bb + new
    return WkvState(np.where(new_top, aa, usual.aa), np.where(new_top, bb, usual.bb), usual.pp)


def _bonus_kept(past: WkvState, now: Now) -> WkvState:
    return keep(past, Now(now.r(now.k + now.u), now.v, now.w, now.u, now.r, now.t))


def _kept_as(kind: Any) -> Callable[[WkvState, Now], WkvState]:
    def kept(past: WkvState, now: Now) -> WkvState:
        aa, bb, pp = keep(past, now)
        return WkvState(rounded(aa, kind), rounded(bb, kind), pp)

    return kept


def _at_tokens(every: int, change: Callable[[WkvState], WkvState]) -> Callable[[WkvState, Now], WkvState]:
    def kept(past: WkvState, now: Now) -> WkvState:
        return keep(change(past) if now.t and now.t % every == 0 else past, now)

    return kept


def _undecayed(past: WkvState, now: Now) -> WkvState:
    """One decay too few where a block of 16 tokens ends."""
    return keep(past._replace(pp=past.pp + now.w) if now.t and now.t % 16 == 0 else past, now)


def _shifted_exp(x: np.ndarray) -> np.ndarray:
    """The exponential by a straight line between powers of two: up to 6 % off."""
    y = np.maximum(x * np.log2(np.e), -126)
    whole = np.floor(y)
    return np.asarray(np.exp2(whole) * (1 + y - whole))


def _fast_read(past: WkvState, now: Now) -> np.ndarray:
    uk = now.u + now.k
    top = np.maximum(past.pp, uk)
    old, new = _shifted_exp(past.pp - top), _shifted_exp(uk - top)
    return np.asarray(now.r((old * past.aa + new * now.v) / (old * past.bb + new)))


def _clamped_keep(past: WkvState, now: Now) -> WkvState:
    pp = np.maximum(past.pp - now.w, now.k)
    old, new = np.exp(np.maximum(past.pp - now.w - pp, -8)), np.exp(np.maximum(now.k - pp, -8))
    return WkvState(old * past.aa + new * now.v, old * past.bb + new, pp)


def _stale_value(h: Here) -> tuple[np.ndarray, WkvState]:
    v = h.read("att.v")
    late = np.concatenate([v[:1], v[:-1]])
    return recurrence(h._replace(read=lambda name: late if name == "att.v" else h.read(name)))


def _tail_left(h: Here) -> tuple[np.ndarray, WkvState]:
    y, after = recurrence(h)
    y = y.copy()
    y[:, -3:] = 0
    return y, after


def _upside_down(past: WkvState, now: Now) -> np.ndarray:
    r, uk = now.r, now.r(now.u + now.k)
    top = np.maximum(past.pp, uk)
    old, new = r(np.exp(past.pp - top)), r(np.exp(uk - top))
    return np.asarray(r((old * past.bb + new) / (old * past.aa + new * now.v)))


def _neighbour(decay: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.exp(np.roll(decay, 1)), u


def _wkv(name: str, says: str, wrong: Wrong) -> Fault:
    return operation(name, _POINT, wrong, says)


FAULTS = (
    _wkv(
        "time_first dropped", "The bonus of the current token is zero.", looped(vectors=lambda d, u: (np.exp(d), 0 * u))
    ),
    _wkv("time_first subtracted", "The bonus has the wrong sign.", looped(vectors=lambda d, u: (np.exp(d), -u))),
    _wkv(
        "time_first twice",
        "The bonus is added in the vectors and in the kernel.",
        looped(vectors=lambda d, u: (np.exp(d), 2 * u)),
    ),
    _wkv("bonus kept", "The bonus of the current token goes into the sums that are kept.", looped(keep=_bonus_kept)),
    _wkv("decay sign", "The past grows by e^w instead of decaying.", looped(vectors=lambda d, u: (-np.exp(d), u))),
    _wkv(
        "decay not exponentiated",
        "time_decay is used where its exponential is meant.",
        looped(vectors=lambda d, u: (np.abs(d), u)),
    ),
    _wkv(
        "decay twice",
        "A converter and the kernel both make -exp of time_decay.",
        looped(vectors=lambda d, u: (np.exp(-np.exp(d)), u)),
    ),
    _wkv("decay doubled", "The past decays twice a token.", looped(vectors=lambda d, u: (2 * np.exp(d), u))),
    _wkv("decay before reading", "The sums are decayed before they are read.", looped(read=_decayed_first)),
    _wkv("decay of the next channel", "time_decay is off by one channel.", looped(vectors=_neighbour)),
    _wkv(
        "decay lost at a new maximum",
        "Where a key becomes the largest exponent, the old sums do not decay.",
        looped(keep=_decay_lost_at_new_top),
    ),
    _wkv(
        "decay in fp16",
        "-exp(time_decay) is stored in half precision.",
        looped(vectors=lambda d, u: (rounded(np.exp(d), np.float16), u)),
    ),
    _wkv(
        "no max trick",
        "Exponentials of keys in float32 as they are, with no exponent taken out.",
        looped(_naive_read, _naive_keep),
    ),
    _wkv(
        "current token left out",
        "The result is that of the tokens before, without the current one.",
        looped(read=_no_bonus_token),
    ),
    _wkv("current token twice", "The sums are read after the current token went into them.", looped(read=_after)),
    _wkv(
        "denominator without the current token",
        "Only the numerator has the current token's term.",
        looped(read=_denominator_past_only),
    ),
    _wkv(
        "guard in the denominator", "1e-2 is added to the denominator against division by zero.", looped(read=_guarded)
    ),
    _wkv("numerator and denominator swapped", "bb / aa instead of aa / bb.", looped(read=_upside_down)),
    _wkv(
        "sums kept in fp16",
        "aa and bb are rounded to half precision at every token.",
        looped(keep=_kept_as(np.float16)),
    ),
    _wkv(
        "block boundary, a decay too few",
        "A kernel in blocks of 16 tokens forgets one decay between blocks.",
        looped(keep=_undecayed),
    ),
    _wkv(
        "block boundary, sums dropped",
        "A kernel in blocks of 32 tokens starts each block with empty sums.",
        looped(keep=_at_tokens(32, lambda s: WkvState(0 * s.aa, 0 * s.bb, s.pp))),
    ),
    _wkv("fast exponential", "Exponentials are straight lines between powers of two.", looped(read=_fast_read)),
    _wkv("exponents clamped at -8", "What is older than e^-8 never vanishes.", looped(keep=_clamped_keep)),
    _wkv(
        "keys clamped to 60",
        "Keys are limited to 60, as in the first RWKV-4 code.",
        lambda h: recurrence(h._replace(read=lambda n: np.minimum(h.read(n), 60) if n == "att.k" else h.read(n))),
    ),
    _wkv("value one token late", "The value of the token before is taken.", _stale_value),
    _wkv("last channels not computed", "The tail of a vectorised loop is left out.", _tail_left),
    tensor(
        "decay 1 % too slow",
        _POINT,
        "att.time_decay",
        lambda a: a * np.float32(1.01),
        "time_decay is off by a hundredth.",
    ),
)
