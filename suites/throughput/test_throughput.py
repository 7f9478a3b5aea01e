"""Prefill and decode of every cell as pytest-benchmark's records, by the command line's own measuring functions.

``pytest suites/throughput --benchmark-json now.json`` and ``--benchmark-compare`` work as usual. The
samples are taken by :mod:`harness.measure` and replayed to pytest-benchmark through its timer, so that
both report the same nanoseconds. A session that fails its parity gate is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.measure import Samples, Sampling
from harness.models import Model, gate_tokens
from harness.parity import gate
from harness.plan import Cell
from harness.session import Opened
from harness.tolerance import Truth

#: Speed is of the whole machine unless --threads says otherwise; the other suites judge with one thread.
DEFAULT_THREADS = None

SAMPLING = Sampling(repeats=7, warmup=1, budget_s=20.0, minimum=6)


class Replay:
    """A clock, in seconds, that stands still except where a sample is replayed: then it moves by that sample."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ahead: Iterator[int] = iter(())

    def __call__(self) -> float:
        return self.now

    def into(self, benchmark: BenchmarkFixture, samples: Samples) -> None:
        """Hand every sample to pytest-benchmark as one round."""
        self._ahead = iter(samples.ns)
        benchmark.pedantic(self._next, rounds=len(samples.ns), iterations=1)
        benchmark.extra_info["tokens"] = samples.tokens
        benchmark.extra_info["tok_per_s"] = [round(samples.tokens * 1e9 / ns, 2) for ns in samples.ns]
        benchmark.extra_info["driver"] = samples.driver
        benchmark.extra_info["stopped"] = samples.stopped

    def _next(self) -> None:
        self.now += next(self._ahead, 0) / 1e9


REPLAY = Replay()


@pytest.fixture(scope="module")
def proven(cell: Cell, opened: Opened, truth: Truth) -> Opened:
    """A session that has passed the gate; a wrong backend has no speed."""
    found = gate(opened.session, truth)
    if not found.passed:
        pytest.fail(f"{cell}: not timed: {found.first_bad}", pytrace=False)
    return opened


@pytest.mark.benchmark(group="prefill", timer=REPLAY)
def test_prefill(benchmark: BenchmarkFixture, cell: Cell, proven: Opened, model: Model) -> None:
    """One ``forward`` over the whole prompt from the initial state."""
    prompt = gate_tokens(model, cell.workload.prompt_tokens)
    record(benchmark, cell, proven.meter.prefill(prompt, SAMPLING, _silent))


@pytest.mark.benchmark(group="decode", timer=REPLAY)
def test_decode(benchmark: BenchmarkFixture, cell: Cell, proven: Opened, model: Model) -> None:
    """Greedy single-token steps after the prompt."""
    prompt = gate_tokens(model, cell.workload.prompt_tokens)
    record(benchmark, cell, proven.meter.decode(prompt, cell.workload.decode_tokens, SAMPLING, _silent))


def _silent(text: str) -> None:
    """pytest-benchmark shows its own progress."""


def record(benchmark: BenchmarkFixture, cell: Cell, samples: Samples) -> None:
    """Into pytest-benchmark, unless a result was not finite."""
    if samples.non_finite_at is not None:
        pytest.fail(f"{cell}: {samples.non_finite_at}", pytrace=False)
    REPLAY.into(benchmark, samples)
