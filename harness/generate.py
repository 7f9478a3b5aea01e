"""Text from a session: sampling, and the time the session took for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from backends.api import Session
from harness.compare import first_non_finite


class NonFiniteLogits(Exception):
    """A backend gave NaN or Inf while generating; one line."""


@dataclass
class Speed:
    """Times of one generation: filled in while it runs. Sampling and printing are outside."""

    prompt_tokens: int = 0
    prompt_ns: int = 0
    decode_tokens: int = 0
    decode_ns: int = 0


def speeds(speed: Speed) -> str:
    """``prefill 8 tokens at 17.0 tok/s, decode ...``."""
    parts = (("prefill", speed.prompt_tokens, speed.prompt_ns), ("decode", speed.decode_tokens, speed.decode_ns))
    return ", ".join(
        f"{name} {count} {'token' if count == 1 else 'tokens'} at {count * 1e9 / max(ns, 1):.1f} tok/s"
        for name, count, ns in parts
        if count
    )


def generate(
    session: Session,
    prompt: Sequence[int],
    n: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.9,
    seed: int = 0,
    stop: int | None = None,
    speed: Speed | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Iterator[int]:
    """Yield up to ``n`` token ids that continue ``prompt``; ends early at the id ``stop``.

    ``temperature=0`` takes the arg-max. Raises :class:`NonFiniteLogits`.
    """
    speed = Speed() if speed is None else speed
    rng = np.random.default_rng(seed)
    start = clock()
    logits, state = session.forward(prompt, None)
    speed.prompt_tokens, speed.prompt_ns = len(prompt), clock() - start
    for position in range(n):
        bad = first_non_finite(logits)
        if bad is not None:
            raise NonFiniteLogits(f"{bad[0]} in logit {bad[1][0]} at generated token {position}")
        token = choose(logits, temperature, top_p, rng)
        if token == stop:
            return
        yield token
        if position + 1 < n:
            start = clock()
            logits, state = session.forward([token], state)
            speed.decode_ns += clock() - start
            speed.decode_tokens += 1


def choose(logits: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """One id: nucleus sampling (https://arxiv.org/abs/1904.09751) at ``temperature``, arg-max at 0."""
    if temperature == 0 or top_p == 0:
        return int(np.argmax(logits))
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1  # the smallest set that reaches top_p
    candidates = order[:kept]
    weights = p[candidates] / p[candidates].sum()
    return int(rng.choice(candidates, p=weights))
