"""Backends with some operations replaced, that show everything, their state, or only logits; and one look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from backends.api import Session
from harness.localize import localize
from harness.localize.evidence import Opener
from harness.localize.finding import (
    STATE,
    TRACE,
    TRUNCATION,
    Finding,
)
from reference.config import Config
from reference.numerics import Arithmetic, Emulated, Exact, Op
from reference.operations import Here, recurrence, run
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

CONFIG = Config(n_layer=4, n_embd=64, n_ffn=128, n_vocab=96)
WEIGHTS = synthetic(CONFIG, 5).in_memory(np.float32)
TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 40)]
FP32, FP16 = Arithmetic(), Arithmetic("fp16", "fp32", "fp16")

Faults = Mapping[str, Callable[[Here], Any]]


def log_decay(h: Here) -> Any:
    """The stored logarithm taken for the decay itself: layers decay at another speed."""
    weights = h.weights.map(
        lambda name, t: Tensor.of(t.array() + np.float32(0.1)) if name.endswith("time_decay") else t
    )
    return recurrence(h._replace(weights=weights))


def no_square(h: Here) -> np.ndarray:
    return np.asarray(np.maximum(h.read("ffn.k"), 0))


def unshifted(h: Here) -> np.ndarray:
    """The present token where the one before belongs."""
    return h.read("ln1")


def scaled(name: str, weight: str) -> Callable[[Here], np.ndarray]:
    """A product with a scale that is 3 % off."""
    return lambda h: h.op.linear(h.read(name), h.weights[h.at + weight]) * np.float32(1.03)


class Faulty:
    """The reference with some operations replaced; shows logits only."""

    def __init__(self, weights: Weights, faults: Faults, arithmetic: Arithmetic = FP32) -> None:
        self.weights, self.arithmetic, self.calls = weights, arithmetic, 0
        points = {f"blocks.{i}." for i in range(weights.config.n_layer)}
        self.faults = {p: f for p, f in faults.items() if not p.startswith("blocks.") or p[:9] in points}

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        op: Op = Exact() if self.arithmetic == FP32 else Emulated(self.arithmetic)
        return run(self.weights, tokens, state, op, tap, self.faults)

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = self._run(tokens, state)
        return logits[-1].astype(np.float32), after


class Stateful(Faulty):
    """Shows its state as well."""

    def export_state(self, state: Any) -> np.ndarray:
        return np.array(state, dtype=np.float32)

    def import_state(self, canonical: np.ndarray) -> Any:
        return np.array(canonical, dtype=np.float32)


class Traced(Stateful):
    """Shows everything, or the trace points that end in ``shown``."""

    shown: tuple[str, ...] = ("",)

    def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
        def look(name: str, x: np.ndarray) -> None:
            if name.endswith(self.shown):
                tap(name, x.astype(np.float32))

        logits, after = self._run(tokens, state, look)
        return logits[-1].astype(np.float32), after


def opener(make: Callable[[Weights], Session]) -> Opener:
    @contextmanager
    def opened(weights: Weights) -> Iterator[Session]:
        yield make(weights)

    return opened


def found(
    make: Callable[[Weights], Any], arithmetic: Arithmetic = FP32, weights: Weights = WEIGHTS, **options: Any
) -> Finding:
    options = {"fix": False, **options}
    return localize(opener(make), weights, "fp32", arithmetic, options.pop("tokens", TOKENS), **options)


KINDS: dict[str, type[Faulty]] = {TRACE: Traced, STATE: Stateful, TRUNCATION: Faulty}
FAULTS: dict[str, Faults] = {
    "blocks.2.att.wkv": {"blocks.2.att.wkv": log_decay},
    "blocks.1.ffn.k2": {"blocks.1.ffn.k2": no_square},
    "blocks.3.att.xk": {"blocks.3.att.xk": unshifted},
    "blocks.0.ffn.v": {"blocks.0.ffn.v": scaled("ffn.k2", "ffn.value.weight")},
    "logits": {"logits": scaled("ln_out", "head.weight")},
}


#: Of layer 1, ffn.k2 overflows fp16.
LOUD = WEIGHTS.map(lambda n, t: Tensor.of(t.array() * np.float32(600)) if n == "blocks.1.ffn.key.weight" else t)
