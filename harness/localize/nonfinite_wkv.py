"""What overflows inside WKV: its sums, its exponentials, the exponent that a state starts with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from harness.localize.limits import FP16, FP32, LIMITS
from harness.localize.match import Place
from reference.forward import PP, initial_state

#: Below which exponent ``e^k`` is 0, by type; that of bfloat16 where it is not named.
_VANISHES, _VANISHES_ELSE = {FP16: -17.33, FP32: -103.98}, -92.9


class Candidate(NamedTuple):
    """One way to NaN or Inf.

    text  says what overflows and by how much
    mask  the elements it makes not finite, ``(T, width)``
    """

    text: str
    mask: np.ndarray


def over(what: str, x: np.ndarray, limit: float, kind: str) -> str:
    """By how much the largest of ``x`` is beyond a limit, in words."""
    top = float(np.nanmax(x))
    return f"{what}: {top:.4g} is {top / limit:.2f} times the largest {kind} ({limit:.5g})"


def sums(k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
    """Magnitudes ``(T, C)`` of what WKV adds up from the initial state: ``aa`` and ``bb`` after each token, and the
    numerator and denominator of its result; each kept divided by e^pp, as the paper's stable form keeps it.
    """
    found = {name: np.empty_like(k) for name in ("aa", "bb", "numerator", "denominator")}
    aa, bb, pp = np.zeros_like(w), np.zeros_like(w), np.full_like(w, -np.inf)
    for t in range(len(k)):
        top = np.maximum(pp, u + k[t])
        old, new = np.exp(pp - top), np.exp(u + k[t] - top)
        found["numerator"][t], found["denominator"][t] = np.abs(old * aa + new * v[t]), old * bb + new
        top = np.maximum(pp - w, k[t])
        old, new = np.exp(pp - w - top), np.exp(k[t] - top)
        aa, bb, pp = old * aa + new * v[t], old * bb + new, top
        found["aa"][t], found["bb"][t] = np.abs(aa), bb
    return found


def beyond(found: Place, kind: str, said: str) -> Iterator[Candidate]:
    """Candidates of ``att.wkv`` where its sums and exponentials are of ``kind``."""
    yield from _sums(found, kind, said)
    yield from _exponentials(found, kind, said)


def _sums(found: Place, kind: str, said: str) -> Iterator[Candidate]:
    """What has overflowed once stays so: the sums are carried on."""
    part, at, limit = found.part_right(), found.step.at, LIMITS[kind]
    w = np.exp(found.weights[at + "att.time_decay"].array(np.float64))
    u = found.weights[at + "att.time_first"].array(np.float64)
    made = sums(part("att.k"), part("att.v"), w, u)
    for kept, now, what in (("aa", "numerator", "sum aa (of values)"), ("bb", "denominator", "sum bb (of weights)")):
        carried = np.logical_or.accumulate(made[kept] > limit, axis=0)
        mask = (made[now] > limit) | np.concatenate([np.zeros_like(carried[:1]), carried[:-1]])
        largest = np.maximum(made[kept], made[now])
        if mask.any():
            token, channel = np.argwhere(largest > limit)[0]
            text = over(f"WKV's {what} overflows", largest, limit, said)
            yield Candidate(f"{text}, first at token {token}, channel {channel}", mask)


def _exponentials(found: Place, kind: str, said: str) -> Iterator[Candidate]:
    """WKV without the max trick; a state that starts at what the type does not hold."""
    part, limit = found.part_right(), LIMITS[kind]
    k, top = part("att.k"), float(np.log(limit))
    largest = np.maximum.accumulate(k, axis=0)
    first = found.weights[found.step.at + "att.time_first"].array(np.float64)
    text = f"e^k overflows {said} from k = {top:.4g} on: WKV without the max trick; k reaches {k.max():.4g}"
    yield Candidate(text, (largest > top) | (k + first > top))
    tiny = _VANISHES.get(kind, _VANISHES_ELSE)
    low = np.maximum(np.concatenate([np.full_like(k[:1], -np.inf), largest[:-1]]), k + first) < tiny
    text = (
        f"0/0: every e^k so far is 0 {said} below k = {tiny:.4g}, without the max trick; k starts at {k[0].min():.4g}"
    )
    yield Candidate(text, low)
    if kind == FP16 and not np.isfinite(found.got[0]).any():  # it would show from the first token on, everywhere
        start = initial_state(found.weights.config)[0, PP, 0]
        text = f"the state's pp starts at {start:.0e}, which is -Inf in {said}, and -Inf - -Inf is NaN"
        yield Candidate(text, np.ones(k.shape, dtype=bool))
