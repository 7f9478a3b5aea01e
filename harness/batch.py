"""Sequences side by side behind the contract of one: what is judged and timed where a workload has a batch.

The first sequence is the one that was asked for; the others are the same tokens turned, so that all differ and a row
that leaks into another shows. A call is one call of ``forward_batch``: times are of the whole batch.

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backends.api import Batched, Session, State, Unsupported

#: Distance in the vocabulary between the single tokens of neighbouring sequences; a prime.
_STRIDE = 7919


class BatchSession:
    """A :class:`backends.api.Session` whose every call runs ``size`` sequences; it gives the first one's logits."""

    def __init__(self, session: Batched, size: int, n_vocab: int) -> None:
        self._session, self.size, self.n_vocab = session, size, n_vocab

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        logits, states = self.forward_batch(side_by_side(tokens, self.size, self.n_vocab), state)
        return np.ascontiguousarray(logits[0]), states

    def forward_batch(self, tokens: Sequence[Sequence[int]], states: Any | None) -> tuple[np.ndarray, Any]:
        logits, after = self._session.forward_batch(tokens, states)
        if not isinstance(logits, np.ndarray) or logits.ndim != 2 or len(logits) != len(tokens):
            what = f"shape {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
            raise ValueError(f"forward_batch returned {what}; float32 numpy ({len(tokens)}, n_vocab) is the contract")
        return logits, after

    def close(self) -> None:
        close = getattr(self._session, "close", None)
        if close is not None:
            close()


def side_by_side(tokens: Sequence[int], size: int, n_vocab: int, first: int = 0) -> list[list[int]]:
    """``size`` sequences as long as ``tokens``, which is row ``first``; the others are turned by their distance."""
    ids = [int(token) for token in tokens]
    if len(ids) == 1:
        return [[(ids[0] + (b - first) * _STRIDE) % n_vocab] for b in range(size)]
    turns = [(b - first) % size % len(ids) for b in range(size)]
    return [ids[turn:] + ids[:turn] for turn in turns]


def batched(name: str, session: Session, size: int, n_vocab: int) -> BatchSession:
    """``session`` in batches. Raises Unsupported where the backend has no such call."""
    if not isinstance(session, Batched):
        raise Unsupported(f"{name} has no forward_batch: batch 1 only")
    return BatchSession(session, size, n_vocab)
