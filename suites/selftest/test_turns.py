"""Turns on a fake clock: what is timed, what is not, and what the loop adds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from harness.noise import NoiseWatch
from harness.samples import Taken
from harness.turns import DECODE, PREFILL, SETTLING_NS, Turns
from suites.selftest.scripted import FakeClock, Scripted, ScriptedGreedy

PROMPT = [7, 8, 9]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def turns(session: Scripted) -> Turns:
    return Turns(session, NoiseWatch(), session.clock)


def test_a_turn_of_prefill_keeps_what_whole_measuring_keeps(clock: FakeClock) -> None:
    session = Scripted(clock, [900, 30, 10, 20])
    taking = turns(session)
    assert taking.begin(PREFILL, PROMPT) == 900
    taken = [taking.turn(2, settle=False), taking.turn(1, settle=False)]
    assert [turn.ns for turn in taken] == [(30, 10), (20,)]
    assert taken[0].first_token_ns == (30, 10)
    samples = taking.end()
    assert (samples.ns, samples.warmup_ns, samples.last_prompt) == ((30, 10, 20), (900,), (8, 9, 7))
    assert samples.last_logits is not None


def test_settling_is_apart_and_short(clock: FakeClock) -> None:
    session = Scripted(clock, [50, 7, 30])
    taking = turns(session)
    taking.begin(PREFILL, PROMPT)
    taken = taking.turn(1, settle=True)
    assert (taken.settling_ns, taken.ns) == (7, (30,))
    long = Scripted(clock, [SETTLING_NS + 1])
    taking = turns(long)
    taking.begin(PREFILL, PROMPT)
    taking.turn(1, settle=True)
    assert [len(tokens) for tokens, _ in long.calls] == [3, 1, 3]  # one token only


def test_decode_goes_on_with_other_tokens_from_the_same_state(clock: FakeClock) -> None:
    session = Scripted(clock, [500, 1, 2, 10, 20, 30, 40])
    taking = turns(session)
    taking.begin(DECODE, PROMPT, 2)
    taken = [taking.turn(1, settle=False), taking.turn(1, settle=False)]
    assert [turn.steps for turn in taken] == [((10, 20),), ((30, 40),)]
    samples = taking.end()
    assert (samples.starts, samples.ids_varied, samples.driver) == ((2, 1), False, "loop")


def test_greedy_has_no_steps(clock: FakeClock) -> None:
    taking = turns(ScriptedGreedy(clock, [500], greedy_costs=[90, 40, 60, 7]))
    taking.begin(DECODE, PROMPT, 4)
    assert taking.turn(2, settle=False).steps == ()
    assert taking.end().driver == "greedy"


def test_a_logit_that_is_no_number_is_in_the_turn(clock: FakeClock) -> None:
    taking = turns(Scripted(clock, [10], bad={2: np.nan}))
    taking.begin(PREFILL, PROMPT)
    assert taking.turn(1, settle=False).non_finite_at is None
    found = taking.turn(1, settle=False)
    assert str(found.non_finite_at) == "logit 2 is nan at step 0 of sample 1"
    assert Taken.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_a_step_is_longer_by_one_reading_of_the_clock_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything between two steps costs a second here, and 1 ms steps stay 1 ms: less than 1 % is added."""
    from harness import logits_watch, measure

    clock = FakeClock(read_ns=50)
    see, argmax = logits_watch.Watch.see, measure._argmax

    def slow_see(self: Any, *arguments: Any) -> None:
        clock.now += 1_000_000_000
        see(self, *arguments)

    def slow_argmax(logits: np.ndarray) -> int:
        clock.now += 1_000_000_000
        return argmax(logits)

    monkeypatch.setattr(logits_watch.Watch, "see", slow_see)
    monkeypatch.setattr(measure, "_argmax", slow_argmax)
    taking = turns(Scripted(clock, [1_000_000]))
    taking.begin(DECODE, PROMPT, 64)
    (steps,) = taking.turn(1, settle=False).steps
    assert steps == (1_000_050,) * 64
