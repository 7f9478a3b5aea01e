"""Whether watching changes what is watched: the logits of a traced run against those of an untraced one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.api import Session
from harness.checks import call, logits_check
from harness.tolerance import Truth

SAME, DIFFERS, HIDDEN = "same", "differs", "hidden"


def compared(session: Session, truth: Truth, traced: np.ndarray) -> tuple[str, list[str]]:
    """``same`` to the bit, ``differs``, or ``hidden`` (wrong unwatched, right when watched); and notes.

    ``traced (n_vocab,)``: what the traced run of truth's prompt returned.
    """
    tokens: Sequence[int] = truth.tokens
    plain, _ = call(session, tokens, None)
    if _same(plain, traced):
        return SAME, []
    again, _ = call(session, tokens, None)
    notes = [] if _same(plain, again) else ["two runs that nobody watches differ from each other as well"]
    last = slice(-1, None)
    unseen, seen = logits_check("unwatched", plain, truth, last), logits_check("watched", traced, truth, last)
    if not unseen.passed and seen.passed:
        return HIDDEN, notes
    apart = float(np.abs(plain - traced).max() / truth.unit) if np.shape(plain) == np.shape(traced) else float("nan")
    if np.isfinite(apart):
        notes.append(f"watched and unwatched logits are {apart:.1e} of their spread apart, {seen.bound:.1e} is allowed")
    return DIFFERS, notes


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """To the bit, a NaN being the same as any other."""
    return np.shape(a) == np.shape(b) and bool(np.array_equal(a, b, equal_nan=True))
