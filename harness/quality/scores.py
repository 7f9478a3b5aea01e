"""Logits of a system and of the reference -> what is kept of every position. Everything in float64.

    p   the reference on the fp32 weights
    s   the reference on the weights as the scheme stores them
    q   the system

    KL(p||q) = KL(p||s) + E_p[log s - log q]

The first term is what storing the weights costs, whoever computes; the second what the kernel adds to it, which
may be negative by chance. KL(s||q), never negative, is how far the kernel is from what it should have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from backends.api import Scoring, Session, State
from harness.checks import call as forward_once
from harness.checks import problem
from harness.compare import log_softmax
from harness.models import Model
from harness.quality.baseline import WORK_ELEMENTS, call_length, log_probabilities
from harness.quality.passage import Passage
from harness.without_codec import NotComparable, has_codec

TOP = 5


class BadLogits(NotComparable):
    """A session returned what is no logits. ``where``: the first bad place, for a row's ``first_bad``."""

    def __init__(self, text: str, where: dict[str, int]) -> None:
        super().__init__(text)
        self.where = where


@dataclass(frozen=True)
class Scores:
    """Of every position ``(n,)``: surprise in nats, divergences in nats, agreement between 0 and 1.

    nll, nll_fp32   -log of the probability of the token that follows, by the system and by the fp32 weights
    kl              KL(p||q)
    kl_weights, kl_kernel   KL(p||s), KL(s||q); ``None`` for a scheme without a codec
    top1, top5      whether the likeliest token is the same; the share of the five likeliest that is
    """

    nll: np.ndarray
    nll_fp32: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    kl_weights: np.ndarray | None = None
    kl_kernel: np.ndarray | None = None


def score(
    session: Session, model: Model, scheme: str, passage: Passage, tell: Callable[[str], None] = lambda text: None
) -> Scores:
    """Run a session over a passage beside the reference. Raises :class:`BadLogits`; :class:`NotComparable` where
    the reference itself is not finite."""
    weights, key = model.weights, model.sha256
    exact = log_probabilities(weights, "fp32", passage, key)
    known = has_codec(scheme)
    stored = log_probabilities(weights, scheme, passage, key) if known and scheme != "fp32" else repeat(None)
    rows = []
    for call, base, kept, got in zip(
        passage.calls(call_length(model.config.n_vocab)),
        exact,
        stored,
        session_logits(session, passage, model.config.n_vocab),
        strict=False,
    ):
        same = base if scheme == "fp32" else kept
        for name, reference in (("the fp32 weights", base), (f"the weights as {scheme} stores them", same)):
            if reference is not None and not np.isfinite(reference).all():
                raise NotComparable(f"the reference itself gives NaN or Inf on {name}; rwkv-bench parity says more")
        rows.append(_of_call(got, base, same, passage.following[call.start : call.stop]))
        tell(f"{call.stop} of {len(passage)} tokens of {passage.name}")
    parts = [np.concatenate(part) for part in zip(*rows, strict=True)]
    return Scores(*parts[:5], *(parts[5:] if known else (None, None)))


def session_logits(session: Session, passage: Passage, n_vocab: int) -> Iterator[np.ndarray]:
    """The session's logits ``(positions, n_vocab)``, a call at a time: by ``Scoring``, else in single steps."""
    state: State | None = None
    calls = list(passage.calls(call_length(n_vocab)))
    for number, call in enumerate(calls):
        ids = [int(token) for token in passage.ids[call.start : call.stop]]
        state = None if call.fresh else state
        if isinstance(session, Scoring):
            rows = session.logits(ids, state)
            check_logits(rows, (len(ids), n_vocab), {"position": call.start})
            if number + 1 < len(calls) and not calls[number + 1].fresh:
                rows = rows.copy()  # a session may reuse its buffer
                _, state = session.forward(ids, state)
            yield rows
            continue
        steps = np.empty((len(ids), n_vocab), np.float32)
        for i, token in enumerate(ids):
            logits, state = forward_once(session, [token], state)
            check_logits(logits, (n_vocab,), {"position": call.start + i})
            steps[i] = logits
        yield steps


def check_logits(logits: object, shape: tuple[int, ...], where: dict[str, int]) -> None:
    """Raise :class:`BadLogits` for what is not float32 ``shape`` and finite.

    where  name and number of the place of the first row, such as ``{"position": 3}``
    """
    name, first = next(iter(where.items()))
    bad = problem(logits, shape, finite=False)
    if bad is not None:
        raise BadLogits(f"{name} {first}: {bad}", where)
    found = np.asarray(logits).reshape(-1, shape[-1])
    wrong = np.argwhere(~np.isfinite(found))
    if len(wrong):
        row, token = (int(i) for i in wrong[0])
        kind = "NaN" if np.isnan(found[row, token]) else "Inf"
        raise BadLogits(f"{name} {first + row}: {kind} at token {token}", {name: first + row, "token": token})


def _of_call(
    got: np.ndarray, base: np.ndarray, stored: np.ndarray | None, following: np.ndarray
) -> tuple[np.ndarray, ...]:
    """nll, nll_fp32, kl, top1, top5[, kl_weights, kl_kernel] of the positions of one call."""
    step = max(1, WORK_ELEMENTS // got.shape[-1])
    parts = []
    for a in range(0, len(got), step):
        q, p = log_softmax(got[a : a + step]), log_softmax(base[a : a + step])
        at = np.arange(len(q)), following[a : a + step]
        found = [-q[at], -p[at], divergence(p, q), q.argmax(axis=-1) == p.argmax(axis=-1), overlap(q, p, TOP)]
        if stored is not None:
            s = p if stored is base else log_softmax(stored[a : a + step])
            found += [divergence(p, s), divergence(s, q)]
        parts.append(found)
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p||q) in nats over the last axis, of log-probabilities.

    Summed as ``P (e^-d - 1 + d)`` with ``d = p - q``, which is the same, since both sum to one, and no term of
    which is negative: divergences far below the rounding of ``P d`` come out right.
    """
    d, chance = p - q, np.exp(p)
    near = np.abs(d) < 0.5
    small = chance * (np.expm1(-np.where(near, d, 0.0)) + np.where(near, d, 0.0))
    return np.asarray(np.where(near, small, np.exp(q) - chance + chance * d).sum(axis=-1))


def overlap(q: np.ndarray, p: np.ndarray, k: int) -> np.ndarray:
    """Share of the ``k`` likeliest tokens that two have in common, over the last axis."""
    k = min(k, p.shape[-1])
    a, b = (np.argpartition(x, -k, axis=-1)[..., -k:] for x in (q, p))
    return np.asarray((a[..., :, None] == b[..., None, :]).any(axis=-1).mean(axis=-1))
