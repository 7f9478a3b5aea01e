"""Sequences side by side: equal to one at a time, judged row by row, refused where there is no such call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.api import Batched, Unsupported
from harness import open_session
from harness.batch import BatchSession, batched, side_by_side
from harness.batch_checks import batch_checks, in_batches
from harness.meter import HereMeter
from harness.session import Opened
from harness.tolerance import derive
from reference.config import Config
from reference.numerics import Arithmetic
from reference.synthetic import synthetic
from suites.selftest.conftest import Done

WEIGHTS = synthetic(Config(2, 32, 128, 61), 3)
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 61, 34)]
VOCAB = WEIGHTS.config.n_vocab


@contextmanager
def opened(backend: str, scheme: str = "fp32", isolate: bool = False) -> Iterator[Opened]:
    with open_session(backend, WEIGHTS, scheme, threads=1, isolate=isolate) as found:
        yield found


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 8))
def test_rows_hold_the_same_tokens_turned(tokens: list[int], size: int, first: int) -> None:
    rows = side_by_side(tokens, size, VOCAB, first % size)
    assert rows[first % size] == tokens
    assert len(rows) == size
    if len(tokens) > 1:
        assert all(sorted(row) == sorted(tokens) for row in rows)
    assert all(0 <= token < VOCAB for row in rows for token in row)


@pytest.mark.parametrize(("backend", "scheme"), [("numpy", "fp32"), ("torch", "fp32"), ("torch", "bf16")])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_batch_is_its_sequences_one_by_one(backend: str, scheme: str, data: st.DataObject) -> None:
    size, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 60), min_size=length, max_size=length), min_size=size, max_size=size)
    )
    after = data.draw(st.lists(st.integers(0, 60), min_size=size, max_size=size))
    with opened(backend, scheme) as one:
        session: Any = one.session
        logits, states = session.forward_batch(rows, None)
        steps, _ = session.forward_batch([[token] for token in after], states)
        again, _ = session.forward_batch([[token] for token in after], states)
        assert (steps == again).all(), "the states passed in were changed"
        for b, row in enumerate(rows):
            alone, state = session.forward(row, None)
            then, _ = session.forward([after[b]], state)
            near = {"fp32": 1e-4, "bf16": 0.15}[scheme]
            np.testing.assert_allclose(logits[b], alone, atol=near * max(1.0, np.abs(alone).max()))
            np.testing.assert_allclose(steps[b], then, atol=near * max(1.0, np.abs(then).max()))


class Leaking:
    """A batch whose last row sees the first one's state; or whose rows come out in another order; or with NaN."""

    def __init__(self, session: Any, fault: str) -> None:
        self._session, self._fault = session, fault

    def forward(self, tokens: Sequence[int], state: Any) -> Any:
        return self._session.forward(tokens, state)

    def forward_batch(self, tokens: Sequence[Sequence[int]], states: Any) -> tuple[np.ndarray, Any]:
        if self._fault == "leak" and states is not None:
            states = [*states[:-1], states[0]]
        logits, after = self._session.forward_batch(tokens, states)
        if self._fault == "order":
            logits = np.roll(logits, 1, axis=0)
        if self._fault == "nan":
            logits[-1, 5] = np.nan
        if self._fault == "shape":
            logits = logits[:, :-1]
        return logits, after


@pytest.mark.parametrize(
    ("fault", "passes"), [("none", True), ("leak", False), ("order", False), ("nan", False), ("shape", False)]
)
def test_the_gate_of_a_batch_sees_each_row(fault: str, passes: bool) -> None:
    truth = derive(WEIGHTS, "fp32", Arithmetic(), TOKENS)
    with opened("numpy") as one:
        faulty: Any = SimpleNamespace(session=Leaking(one.session, fault))
        checks = batch_checks(faulty, 3, truth)
    assert len(checks) == 6
    assert all(check.passed for check in checks) == passes
    if fault == "nan":
        assert any("NaN" in str(check) and "sequence" in str(check) for check in checks)


def test_one_sequence_is_as_before() -> None:
    truth = derive(WEIGHTS, "fp32", Arithmetic(), TOKENS)
    with opened("numpy") as one:
        assert in_batches(one, 1, VOCAB) is one
        assert batch_checks(one, 1, truth) == []


def test_the_meter_measures_what_was_judged() -> None:
    with opened("torch") as one:
        many = in_batches(one, 3, VOCAB)
        assert isinstance(many.session, BatchSession)
        assert isinstance(many.meter, HereMeter)
        assert many.meter.session is many.session
        np.testing.assert_allclose(
            many.session.forward(TOKENS, None)[0], one.session.forward(TOKENS, None)[0], atol=1e-4
        )


def test_in_a_process_of_its_own_it_is_the_same() -> None:
    truth = derive(WEIGHTS, "fp32", Arithmetic(), TOKENS)
    with opened("numpy") as one, opened("numpy", isolate=True) as there:
        many = in_batches(there, 3, VOCAB)
        assert isinstance(many.session, Batched)
        assert all(check.passed for check in batch_checks(many, 3, truth))
        logits, state = many.session.forward(TOKENS[:5], None)
        alone, past = one.session.forward(TOKENS[:5], None)
        np.testing.assert_array_equal(logits, alone)
        np.testing.assert_array_equal(many.session.forward([7], state)[0], one.session.forward([7], past)[0])


def test_a_backend_without_it_says_so() -> None:
    with pytest.raises(Unsupported, match="x has no forward_batch: batch 1 only"):
        batched("x", SimpleNamespace(forward=None), 2, VOCAB)


@pytest.mark.parametrize("returned", [np.zeros((2, 5), np.float32), [1, 2, 3], np.zeros(3, np.float32)])
def test_what_is_no_batch_of_logits_is_refused(returned: Any) -> None:
    session: Any = SimpleNamespace(forward_batch=lambda tokens, states: (returned, None))
    with pytest.raises(ValueError, match="forward_batch returned"):
        BatchSession(session, 3, 5).forward([1], None)


def test_a_run_in_batches_counts_all_tokens(bench: Callable[..., Done], small: str) -> None:
    done = bench(
        "--model", small, "--backend", "numpy", "--quant", "fp32", "--quick", "--batch", "3", "--format", "json"
    )
    assert done.code == 0, done.err
    rows = {row["metric"]: row for row in json.loads(done.out)["rows"]}
    decode = rows["decode"]
    assert decode["workload"]["batch"] == 3
    assert decode["driver"] == "loop"
    assert "--batch 3" in decode["command"]
    seconds = sorted(decode["samples"])[len(decode["samples"]) // 2] / 1e9
    assert decode["value"] == pytest.approx(3 * decode["workload"]["decode_tokens"] / seconds)
    assert any(check["check"] == "batch" for check in rows["parity"]["checks"])
