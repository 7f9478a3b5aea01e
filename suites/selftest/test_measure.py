"""Measuring with a scripted session on a fake clock: every number is known beforehand."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from backends.api import Generating
from harness import measure
from harness.measure import (
    MeasureError,
    NonFinite,
    Samples,
    Sampling,
    Workload,
    measure_decode,
    measure_first_call,
    measure_prefill,
    timed_load,
)
from reference.errors import InputError
from suites.selftest.scripted import FakeClock, Scripted, ScriptedGreedy

PROMPT = [7, 8, 9]
SECOND = 1_000_000_000


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(autouse=True)
def _gc_as_found() -> Iterator[None]:
    """No test may leave the collector other than it was."""
    was = gc.isenabled()
    yield
    now = gc.isenabled()
    gc.enable() if was else gc.disable()
    assert now == was


class TestPrefill:
    def test_one_sample_per_repeat_and_warm_up_apart(self, clock: FakeClock) -> None:
        session = Scripted(clock, [900, 800, 30, 10, 20])
        found = measure_prefill(session, PROMPT, Sampling(repeats=3, warmup=2), clock)
        assert found == Samples(
            tokens=3,
            ns=(30, 10, 20),
            warmup_ns=(900, 800),
            first_token_ns=(30, 10, 20),
            stopped="repeats reached",
            last_prompt=(9, 7, 8),
        )
        # Every call gets the prompt turned by one token more: a cache of prompts is not what is timed.
        assert session.calls == [
            ([8, 9, 7], None),
            ([9, 7, 8], None),
            (PROMPT, None),
            ([8, 9, 7], None),
            ([9, 7, 8], None),
        ]

    def test_the_span_is_one_reading_of_the_clock_wide(self) -> None:
        clock = FakeClock(read_ns=1)
        found = measure_prefill(Scripted(clock, [100]), PROMPT, Sampling(repeats=2, warmup=0), clock)
        assert found.ns == (101, 101)
        assert found.first_token_ns == (102, 102)

    def test_first_token_includes_the_arg_max_and_prefill_does_not(
        self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spend_in_argmax(monkeypatch, clock, 7)
        found = measure_prefill(Scripted(clock, [100]), PROMPT, Sampling(repeats=2, warmup=1), clock)
        assert found.ns == (100, 100)
        assert found.warmup_ns == (100,)
        assert found.first_token_ns == (107, 107)

    def test_first_call_is_one_sample(self, clock: FakeClock) -> None:
        session = Scripted(clock, [5_000, 10])
        assert measure_first_call(session, PROMPT, clock) == Samples(
            tokens=3, ns=(5_000,), stopped="single call", last_prompt=(7, 8, 9)
        )
        assert session.calls == [(PROMPT, None)]

    def test_load_gives_what_was_loaded_and_its_time(self, clock: FakeClock) -> None:
        def load() -> str:
            clock.now += 42
            return "session"

        assert timed_load(load, clock) == ("session", 42)


class TestDecode:
    def test_loop_keeps_every_step_and_starts_each_sample_from_the_prompts_state(self, clock: FakeClock) -> None:
        session = Scripted(clock, [500, 1, 2, 10, 20, 30, 40])
        found = measure_decode(session, PROMPT, 2, Sampling(repeats=2, warmup=1), clock)
        assert found == Samples(
            tokens=2,
            ns=(30, 70),
            warmup_ns=(3,),
            steps=((10, 20), (30, 40)),
            ids=(4, 0),
            last_ids=(4, 0),
            starts=(2, 1),
            driver="loop",
            stopped="repeats reached",
        )
        # The prompt once, then from its state (three tokens seen) for each sample anew: the most likely token
        # first, others after it, and the first sample's once more, untimed.
        assert session.calls == [(PROMPT, None)] + [call for t in (3, 2, 1, 2) for call in (([t], 3), ([4], 4))]

    def test_sampling_between_steps_is_not_timed(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
        spend_in_argmax(monkeypatch, clock, 1_000)
        found = measure_decode(Scripted(clock, [10]), PROMPT, 3, Sampling(repeats=1, warmup=0), clock)
        assert found.steps == ((10, 10, 10),)

    def test_greedy_is_timed_per_block(self, clock: FakeClock) -> None:
        session = ScriptedGreedy(clock, [500], greedy_costs=[90, 40, 60, 7])
        assert isinstance(session, Generating)
        found = measure_decode(session, PROMPT, 4, Sampling(repeats=2, warmup=1), clock)
        assert found == Samples(
            tokens=4,
            ns=(40, 60),
            warmup_ns=(90,),
            ids=(4, 0, 1, 2),
            last_ids=(4, 0, 1, 2),
            starts=(2, 1),
            driver="greedy",
            stopped="repeats reached",
        )
        assert session.blocks == [(token, 3, 4) for token in (3, 2, 1, 2)]
        assert session.greedy_gc == [False] * 4

    def test_a_runtime_that_remembers_is_not_timed_at_remembering(self, clock: FakeClock) -> None:
        class Remembering(Scripted):
            """What has been computed once, from the same tokens in the same order, costs nothing."""

            def __init__(self, clock: FakeClock) -> None:
                super().__init__(clock, [0])
                self.seen: set[tuple[int, ...]] = set()

            def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
                history = (*(state or ()), *tokens)
                self.clock.now += 0 if history in self.seen else 100
                self.seen.add(history)
                logits = np.zeros(1000, np.float32)
                logits[len(history)] = 1
                return logits, history

        found = measure_decode(Remembering(clock), PROMPT, 3, Sampling(repeats=4, warmup=1), clock)
        assert found.steps == ((100, 100, 100),) * 4
        assert not found.ids_varied

    def test_loop_on_request_gives_the_ids_of_greedy(self, clock: FakeClock) -> None:
        session = ScriptedGreedy(clock, [10], greedy_costs=[1, 1])
        sampling = Sampling(repeats=1, warmup=0)
        loop = measure_decode(session, PROMPT, 4, sampling, clock, driver="loop")
        assert (loop.driver, loop.steps, session.blocks) == ("loop", ((10, 10, 10, 10),), [])
        assert measure_decode(session, PROMPT, 4, sampling, clock).ids == loop.ids

    def test_greedy_that_does_less_than_asked_is_no_measurement(self, clock: FakeClock) -> None:
        session = ScriptedGreedy(clock, [10], greedy_costs=[1], short=1)
        with pytest.raises(MeasureError, match="greedy gave 3 ids where 4 were asked"):
            measure_decode(session, PROMPT, 4, Sampling(), clock)

    @pytest.mark.parametrize(
        ("n", "driver", "says"),
        [(0, None, "decode of 0 tokens"), (4, "greedy", "no greedy loop"), (4, "gready", "no decode driver 'gready'")],
    )
    def test_what_cannot_be_measured(self, clock: FakeClock, n: int, driver: str | None, says: str) -> None:
        with pytest.raises(MeasureError, match=says):
            measure_decode(Scripted(clock, [10]), PROMPT, n, Sampling(), clock, driver)

    def test_ids_that_vary_are_reported(self, clock: FakeClock) -> None:
        class Leaky(Scripted):
            """Breaks the contract: what it has seen, not the state passed in, decides."""

            def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
                return super().forward(tokens, len(self.calls))

        sampling = Sampling(repeats=2, warmup=0)
        assert measure_decode(Leaky(clock, [1]), PROMPT, 2, sampling, clock).ids_varied
        assert not measure_decode(Scripted(clock, [1]), PROMPT, 2, sampling, clock).ids_varied


class TestStopping:
    def test_budget_ends_measuring_early(self, clock: FakeClock) -> None:
        found = measure_prefill(Scripted(clock, [SECOND]), PROMPT, Sampling(repeats=10, warmup=1, budget_s=5), clock)
        assert (len(found.warmup_ns), len(found.ns), found.stopped) == (1, 4, "time budget")

    def test_never_below_the_minimum(self, clock: FakeClock) -> None:
        sampling = Sampling(repeats=10, warmup=3, budget_s=1, minimum=2)
        found = measure_prefill(Scripted(clock, [5 * SECOND]), PROMPT, sampling, clock)
        assert found.ns == (5 * SECOND, 5 * SECOND)
        assert found.warmup_ns == (5 * SECOND,)  # warming up ends with the budget too
        assert found.stopped == "time budget"

    def test_all_repeats_are_all_even_if_the_budget_ended_with_the_last(self, clock: FakeClock) -> None:
        sampling = Sampling(repeats=3, warmup=0, budget_s=3, minimum=1)
        found = measure_prefill(Scripted(clock, [SECOND]), PROMPT, sampling, clock)
        assert (len(found.ns), found.stopped) == (3, "repeats reached")

    def test_fewer_repeats_than_the_minimum_are_enough(self, clock: FakeClock) -> None:
        sampling = Sampling(repeats=1, warmup=0, budget_s=0, minimum=3)
        found = measure_prefill(Scripted(clock, [SECOND]), PROMPT, sampling, clock)
        assert (len(found.ns), found.stopped) == (1, "repeats reached")

    def test_untimed_work_counts_towards_the_budget(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
        spend_in_argmax(monkeypatch, clock, SECOND)
        sampling = Sampling(repeats=10, warmup=0, budget_s=4, minimum=1)
        found = measure_decode(Scripted(clock, [1]), PROMPT, 2, sampling, clock)
        assert (len(found.ns), found.stopped) == (2, "time budget")

    @pytest.mark.parametrize(
        "wrong", [{"repeats": 0}, {"warmup": -1}, {"minimum": 0}, {"budget_s": -1.0}, {"budget_s": float("nan")}]
    )
    def test_impossible_sampling(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=f"sampling: {next(iter(wrong))}"):
            Sampling(**wrong)

    @pytest.mark.parametrize("wrong", [(0, 4, 1), (4, -1, 1), (4, 4, 0)])
    def test_impossible_workload(self, wrong: tuple[int, int, int]) -> None:
        with pytest.raises(InputError, match="workload"):
            Workload(*wrong)


class TestNonFinite:
    @pytest.mark.parametrize(("value", "name"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
    def test_prefill_says_where(self, clock: FakeClock, value: float, name: str) -> None:
        session = Scripted(clock, [10], bad={3: value, 4: np.nan})
        found = measure_prefill(session, PROMPT, Sampling(repeats=5, warmup=2), clock)
        assert found.non_finite_at == NonFinite("sample", sample=1, step=0, index=2, value=name)
        assert len(found.ns) == 5

    @pytest.mark.parametrize(
        ("call", "where"),
        [
            (0, NonFinite("prompt", 0, 0, 2, "nan")),
            (1, NonFinite("warm-up", 0, 0, 2, "nan")),
            (6, NonFinite("sample", 0, 2, 2, "nan")),
            (9, NonFinite("sample", 1, 2, 2, "nan")),
        ],
    )
    def test_decode_says_where(self, clock: FakeClock, call: int, where: NonFinite) -> None:
        session = Scripted(clock, [10], bad={call: np.nan})
        found = measure_decode(session, PROMPT, 3, Sampling(repeats=2, warmup=1), clock)
        assert found.non_finite_at == where

    def test_greedy_is_looked_at_through_its_state(self, clock: FakeClock) -> None:
        session = ScriptedGreedy(clock, [10], greedy_costs=[1, 1, 1])
        session.bad = {2: np.inf}  # call 0 is the prompt, 1 and 2 follow a block each
        found = measure_decode(session, PROMPT, 3, Sampling(repeats=2, warmup=0), clock)
        assert found.non_finite_at == NonFinite("sample", 1, 3, 2, "inf")
        assert found.ns == (1, 1)

    def test_first_call(self, clock: FakeClock) -> None:
        found = measure_first_call(Scripted(clock, [10], bad={0: np.nan}), PROMPT, clock)
        assert str(found.non_finite_at) == "logit 2 is nan at step 0 of sample 0"

    def test_nan_is_named_before_inf(self, clock: FakeClock) -> None:
        class Both(Scripted):
            def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
                super().forward(tokens, state)
                return np.array([0, -np.inf, 0, np.nan, np.nan], np.float32), 0

        found = measure_first_call(Both(clock, [10]), PROMPT, clock)
        assert found.non_finite_at == NonFinite("sample", 0, 0, 3, "nan")

    @pytest.mark.parametrize("logits", [None, [0.0, 1.0], np.zeros((1, 5)), np.zeros(0), np.float32(1)])
    def test_what_is_not_logits_on_the_host_is_refused(self, clock: FakeClock, logits: Any) -> None:
        class Elsewhere(Scripted):
            def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
                return logits, 0

        session, refused = Elsewhere(clock, [10]), pytest.raises(MeasureError, match="host memory is the contract")
        with refused:
            measure_first_call(session, PROMPT, clock)
        with refused:
            measure_prefill(session, PROMPT, Sampling(), clock)
        with refused:
            measure_decode(session, PROMPT, 2, Sampling(), clock)


class TestGarbageCollector:
    def test_off_in_every_timed_span(self, clock: FakeClock) -> None:
        session = Scripted(clock, [10])
        measure_first_call(session, PROMPT, clock)
        measure_prefill(session, PROMPT, Sampling(repeats=2, warmup=1), clock)
        assert session.gc_enabled == [False] * 4
        session = Scripted(clock, [10])
        measure_decode(session, PROMPT, 2, Sampling(repeats=2, warmup=1), clock)
        assert session.gc_enabled == [True] + [False] * 8  # the prompt before decode is not timed

    def test_left_off_where_it_was_off(self, clock: FakeClock) -> None:
        gc.disable()
        try:
            measure_prefill(Scripted(clock, [10]), PROMPT, Sampling(repeats=1), clock)
            assert not gc.isenabled()
        finally:
            gc.enable()

    @pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt(), SystemExit(3)])
    @pytest.mark.parametrize("call", [0, 1, 4])
    @pytest.mark.parametrize("timing", [measure_prefill, partial(measure_decode, n=2)])
    def test_restored_whatever_is_raised(
        self, clock: FakeClock, error: BaseException, call: int, timing: Callable[..., Samples]
    ) -> None:
        session = Scripted(clock, [10])
        session.raise_at = (call, error)
        with pytest.raises(type(error)) as raised:
            timing(session, PROMPT, sampling=Sampling(repeats=5, warmup=1), clock=clock)
        assert raised.value is error
        assert gc.isenabled()
        assert len(session.calls) == call + 1  # nothing was tried again


def test_samples_survive_json(clock: FakeClock) -> None:
    sampling = Sampling(repeats=2, warmup=1)
    session = Scripted(clock, [10, 20, 30], bad={4: np.inf})
    for found in (
        measure_decode(session, PROMPT, 3, sampling, clock),
        measure_prefill(session, PROMPT, sampling, clock),
    ):
        assert Samples.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_the_real_clock_moves() -> None:
    class Instant:
        def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
            return np.zeros(3, np.float32), 0

    found = measure_decode(Instant(), PROMPT, 4, Sampling(repeats=2))
    assert all(0 < ns < SECOND for ns in found.ns)


def spend_in_argmax(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, ns: int) -> None:
    """Let every arg-max take time on the fake clock."""
    real = measure._argmax

    def slow(logits: np.ndarray) -> int:
        clock.now += ns
        return real(logits)

    monkeypatch.setattr(measure, "_argmax", slow)
