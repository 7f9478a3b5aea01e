"""What only some calls get wrong: the second, those of some lengths, scoring, the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from harness.localize.finding import (
    DIVERGED,
    STATE,
    TRACE,
)
from reference.forward import PP
from suites.selftest.wrong_backends import (
    FAULTS,
    Stateful,
    Traced,
    found,
)


class ForgetsShift(Traced):
    """Token shift is not carried from one call to the next."""

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        if state is not None:
            state = np.array(state)
            state[2, 1] = 0
        return super()._run(tokens, state, tap)


def test_what_only_a_second_call_gets_wrong() -> None:
    finding = found(lambda weights: ForgetsShift(weights, {}))
    assert finding.method == TRACE
    assert finding.layer == 2
    assert finding.point in ("blocks.2.att.xk", "blocks.2.state.att_x")
    assert any("one call is right" in note for note in finding.notes)


class Lengths(Traced):
    """Wrong in calls of some lengths."""

    wrong: frozenset[int] = frozenset(range(9, 16))

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        faults, self.faults = self.faults, self.faults if len(tokens) in self.wrong else {}
        try:
            return super()._run(tokens, state, tap)
        finally:
            self.faults = faults


class Length12(Lengths):
    """Only where the row of calls that has it ends, on the state that the others have left."""

    wrong = frozenset([12])


@pytest.mark.parametrize(
    ("made", "words"),
    [(Lengths, "the first 9 tokens in one call"), (Length12, "in calls of 1, 2, 3, 4, 5, 6, 7, 8 tokens")],
)
def test_what_only_calls_of_some_lengths_get_wrong(made: type[Lengths], words: str) -> None:
    tokens = [int(i) for i in np.random.default_rng(0).integers(0, 96, 48)]
    finding = found(lambda weights: made(weights, FAULTS["blocks.0.ffn.v"]), tokens=tokens)
    assert (finding.verdict, finding.method, finding.point) == (DIVERGED, TRACE, "blocks.0.ffn.v")
    assert any(words in note for note in finding.notes)
    if made is Lengths:
        assert "1.03" in finding.cause


class ScoresBadly(Lengths):
    """Logits of many positions in calls of 20 tokens, as no row of the gate's has them."""

    wrong = frozenset([20])

    def logits(self, tokens: Sequence[int], state: Any) -> np.ndarray:
        return np.asarray(self._run(tokens, state)[0].astype(np.float32))


def test_what_only_scoring_gets_wrong() -> None:
    finding = found(lambda weights: ScoresBadly(weights, FAULTS["blocks.0.ffn.v"]))
    assert (finding.method, finding.point) == (TRACE, "blocks.0.ffn.v")


class LosesExponent(Traced):
    """Hands on a state without its exponent, wrong only for the next call."""

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        logits, after = super()._run(tokens, state, tap)
        after = np.array(after)
        after[1, PP] = 0
        return logits, after


def test_a_wrong_state_is_seen_before_it_does_harm() -> None:
    finding = found(lambda weights: LosesExponent(weights, {}))
    assert finding.layer == 1
    assert finding.point in ("blocks.1.state.bb", "blocks.1.state.aa")


class WritesBack(Stateful):
    """The state that is passed in is overwritten."""

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = self._run(tokens, state)
        if state is not None:
            state[...] = after
        return logits[-1].astype(np.float32), after


def test_a_state_that_is_written_to_is_named() -> None:
    finding = found(lambda weights: WritesBack(weights, {}))
    assert finding.method == STATE
    assert "later call has written to it" in finding.cause
