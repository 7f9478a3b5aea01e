"""A backend that hides or breaks when it is watched: nothing found is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from backends.api import Session, Unsupported
from harness.localize import localize
from harness.localize.finding import (
    DIVERGED,
    STATE,
    TRACE,
    TRUNCATION,
)
from reference.weights import Weights
from suites.selftest.wrong_backends import (
    CONFIG,
    FAULTS,
    FP32,
    TOKENS,
    WEIGHTS,
    Faults,
    Stateful,
    Traced,
    found,
    no_square,
)


class HidesWhenWatched(Traced):
    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = self._run(tokens, state)
        return logits[-1].astype(np.float32) * np.float32(1.5), after


class BreaksWhenWatched(Stateful):
    def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
        tap("emb", np.zeros((len(tokens), CONFIG.n_embd), np.float32))
        raise RuntimeError("no such kernel")


def test_a_fault_that_hides_when_watched_is_told_as_such() -> None:
    finding = found(lambda weights: HidesWhenWatched(weights, {}))
    assert finding.watched == "hidden"
    assert finding.verdict == DIVERGED
    assert finding.method in (STATE, TRUNCATION)
    assert finding.point == "logits" or "logits" in finding.span


def test_a_backend_that_breaks_while_watched_is_looked_at_otherwise() -> None:
    finding = found(lambda weights: BreaksWhenWatched(weights, FAULTS["blocks.1.ffn.k2"]))
    assert (finding.method, finding.layer) == (STATE, 1)
    assert any("broke while watched: RuntimeError: no such kernel" in note for note in finding.notes)
    with pytest.raises(RuntimeError, match="no such kernel"):
        found(lambda weights: BreaksWhenWatched(weights, {}), method=TRACE)


def test_a_backend_that_refuses_to_be_traced_is_looked_at_otherwise() -> None:
    class Refuses(Stateful):
        def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
            raise Unsupported("not on this device")

    finding = found(lambda weights: Refuses(weights, FAULTS["blocks.1.ffn.k2"]))
    assert (finding.method, finding.layer, finding.broke) == (STATE, 1, False)
    assert "trace: not on this device" in finding.notes
    with pytest.raises(Unsupported, match="not on this device"):
        found(lambda weights: Refuses(weights, {}), method=TRACE)


class DiesLater(Traced):
    """Dies in a call of 20 tokens: no method makes one, the search for a short prompt does."""

    error: type[Exception] = KeyError

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        if len(tokens) == 20 and state is None:
            raise self.error("boom")
        return super()._run(tokens, state, tap)


class DiesOfMemory(DiesLater):
    error = MemoryError


@pytest.mark.parametrize("made", [DiesLater, DiesOfMemory])
def test_a_backend_that_dies_once_it_is_located_loses_nothing(made: type[DiesLater]) -> None:
    faults: Faults = {"blocks.1.ffn.k2": lambda h: no_square(h) ** (1 if len(h.read("ffn.k")) > 19 else 2)}
    finding = found(lambda weights: made(weights, faults))
    assert (finding.verdict, finding.method, finding.point) == (DIVERGED, TRACE, "blocks.1.ffn.k2")
    assert finding.cause
    assert (finding.prompt, finding.prompt_stopped) == (tuple(TOKENS), "a call that broke")
    assert any(f"it broke on 20 tokens: {made.error.__name__}: " in note for note in finding.notes)
    assert finding.broke


def test_a_backend_that_dies_when_it_is_not_watched_any_more_loses_nothing() -> None:
    """Twice: in the run beside the trace, and when it is closed."""

    class Dies(Traced):
        traced = False

        def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
            self.traced = True
            return super().trace(tokens, state, tap)

        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            if self.traced:
                raise RuntimeError("gone")
            return super().forward(tokens, state)

    @contextmanager
    def closes_badly(weights: Weights) -> Iterator[Session]:
        yield Dies(weights, FAULTS["blocks.1.ffn.k2"])
        raise RuntimeError("not closed")

    finding = localize(closes_badly, WEIGHTS, "fp32", FP32, TOKENS, fix=False)
    assert (finding.method, finding.point) == (TRACE, "blocks.1.ffn.k2")
    assert any("run unwatched again: RuntimeError: gone" in note for note in finding.notes)
    assert any("it broke while it was closed: RuntimeError: not closed" in note for note in finding.notes)
