"""Every backend × scheme × device against the reference: logits and state, however the prompt is run."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.api import StateAccess
from conftest import Reopen
from harness.checks import Check, call, logits_check
from harness.compare import logits_error, state_error
from harness.models import Model, gate_tokens
from harness.parity import Gate, gate
from harness.plan import Cell
from harness.session import Opened
from harness.timed_check import timed_length
from harness.tolerance import K, Truth
from harness.trace_point import first_bad_point
from harness.without_codec import has_codec, quality, truth_for
from reference.config import Config
from reference.errors import ConfigError
from reference.forward import forward
from reference.schemes import apply, stored_bytes
from reference.synthetic import synthetic
from reference.weights import Weights

#: The fixtures hold a loaded session, which is meant to serve every example. Fewer of them where each starts
#: a process: RWKV_BENCH_EXAMPLES=3.
RELAXED = settings(
    max_examples=int(os.environ.get("RWKV_BENCH_EXAMPLES", "8")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def smallest_width(scheme: str) -> int:
    """The narrowest model that a scheme can store; of one without a codec, wide enough for any known one."""
    fits = [w for w in (32, 64, 128) if has_codec(scheme) and _stores(Config(1, w, 4 * w, 32), scheme)]
    return fits[0] if fits else 256


def _stores(config: Config, scheme: str) -> bool:
    try:
        stored_bytes(config, scheme)
    except ConfigError:
        return False
    return True


def judge(cell: Cell, *checks: Check) -> None:
    """Fail with backend, scheme, place, error and bound."""
    bad = [str(check) for check in checks if not check.passed]
    if not checks or bad:
        pytest.fail(f"{cell}: " + ("; ".join(bad) or "nothing was compared"), pytrace=False)


def judge_gate(cell: Cell, found: Gate, opened: Opened, weights: Weights, truth: Truth) -> None:
    """Fail with every failing check, and the first bad trace point where the backend shows any."""
    bad = [str(check) for check in (*found.logits, *found.state) if not check.passed]
    if found.passed:
        return
    stored = apply(weights, cell.scheme) if has_codec(cell.scheme) else None
    point = stored and first_bad_point(opened.session, stored, opened.arithmetic, truth.tokens)
    pytest.fail(f"{cell}: " + "; ".join([*([str(point)] if point else []), *bad]), pytrace=False)


def test_gate(cell: Cell, opened: Opened, truth: Truth, model: Model) -> None:
    """Decode, prefill, chunks, replay, scoring, greedy, state and handover on the model's own prompt."""
    judge_gate(cell, gate(opened.session, truth), opened, model.weights, truth)


def test_long_prompt(cell: Cell, opened: Opened, truth: Truth, model: Model) -> None:
    """A prompt of the timed length in one call, and the steps after it, against truth."""
    prompt = gate_tokens(model, cell.workload.prompt_tokens)
    weights, key = model.weights, model.sha256
    judge(cell, timed_length(opened.session, weights, cell.scheme, opened.arithmetic, prompt, truth, key))


def test_quality_where_nothing_else_can_be_judged(cell: Cell, opened: Opened, model: Model) -> None:
    """A scheme without a codec is about as far from the fp32 weights as another of its class."""
    if has_codec(cell.scheme):
        pytest.skip(f"{cell.scheme} has a codec, so its kernel is judged")
    found = quality(opened.session, model.weights, cell.scheme, gate_tokens(model, 64))
    assert found.kl_divergence <= found.limit


@RELAXED
@given(data=st.data())
def test_any_chunking(cell: Cell, opened: Opened, truth: Truth, data: st.DataObject) -> None:
    """However the prompt is cut, the last logits and the state are those of truth."""
    n = len(truth.tokens)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=5), "cuts")})
    state, logits = None, np.empty(0)
    for a, b in pairwise(cuts):
        logits, state = opened.session.forward(truth.tokens[a:b], state)
    error = logits_error(logits[None], truth.logits[-1:], truth.unit)
    judge(cell, Check("chunking", "worst position", error.worst, K * truth.e_worst, f"cuts {cuts}"))
    if isinstance(opened.session, StateAccess):
        state_off = state_error(opened.session.export_state(state), truth.state)
        judge(cell, Check("chunking", "worst state row", state_off.worst, K * truth.e_state_worst, f"cuts {cuts}"))


@RELAXED
@given(data=st.data())
def test_no_state_is_mutated(cell: Cell, opened: Opened, truth: Truth, data: st.DataObject) -> None:
    """Old states, used in any order and any number of times, give what they gave first."""
    states, state = [], None
    for token in truth.tokens[:8]:
        _, state = opened.session.forward([token], state)
        states.append(state)
    for position in data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=6), "positions"):
        logits, _ = opened.session.forward(truth.tokens[position : position + 1], states[position - 1])
        error = logits_error(logits[None], truth.logits[position : position + 1], truth.unit)
        judge(cell, Check("replay", "worst position", error.worst, K * truth.e_worst, f"position {position}"))


@RELAXED
@given(half=st.integers(1, 47))
def test_the_reference_continues_its_state(cell: Cell, opened: Opened, truth: Truth, model: Model, half: int) -> None:
    """A state exported anywhere is continued by another implementation on the same weights."""
    if not isinstance(opened.session, StateAccess):
        pytest.skip(f"{cell.backend} does not show its state")
    if not has_codec(cell.scheme):
        pytest.skip(f"the weights that {cell.scheme} stores are not known here")
    _, state = opened.session.forward(truth.tokens[:half], None)
    exported = opened.session.export_state(state)
    logits, _ = forward(apply(model.weights, cell.scheme), truth.tokens[half:], exported)
    error = logits_error(logits[None], truth.logits[-1:], truth.unit)
    judge(cell, Check("handover", "worst position", error.worst, K * truth.e_worst, f"after token {half}"))


def test_two_sessions_do_not_share_anything(
    cell: Cell, opened: Opened, truth: Truth, model: Model, reopen: Reopen
) -> None:
    """Two models live at once, their calls in turn, and each gives what truth says of it."""
    other_weights = synthetic(model.config, 9)
    with reopen(other_weights) as other:
        other_truth = truth_for(other.session, other_weights, cell.scheme, other.arithmetic, truth.tokens, None)
        ours, theirs = None, None
        for token in truth.tokens:
            logits, ours = call(opened.session, [token], ours)
            foreign, theirs = call(other.session, [token], theirs)
    judge(
        cell,
        logits_check("beside another session", logits, truth, slice(-1, None)),
        logits_check("the other session", foreign, other_truth, slice(-1, None)),
    )


def test_threads_do_not_matter(cell: Cell, opened: Opened, truth: Truth, model: Model, reopen: Reopen) -> None:
    """One thread and two give the same within the bound of either."""
    if not opened.info.thread_control or cell.hardware.device != "cpu":
        pytest.skip(f"{cell.backend} on {cell.hardware.device} has no CPU threads to set")
    for threads in (1, 2):
        with reopen(model, threads) as other:
            logits, _ = other.session.forward(truth.tokens, None)
        error = logits_error(logits[None], truth.logits[-1:], truth.unit)
        judge(cell, Check(f"{threads} threads", "worst position", error.worst, K * truth.e_worst, "prefill"))


@RELAXED
@given(
    n_layer=st.integers(1, 3),
    units=st.integers(1, 3),
    n_vocab=st.integers(2, 300),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.25, 1.0, 2.0]),
    length=st.integers(33, 60),
)
def test_shapes_and_scales(
    cell: Cell,
    opened: Opened,
    reopen: Reopen,
    n_layer: int,
    units: int,
    n_vocab: int,
    seed: int,
    scale: float,
    length: int,
) -> None:
    """Other shapes, other sizes of weights, other prompts than the embedded model's."""
    width = units * smallest_width(cell.scheme)
    config = Config(n_layer=n_layer, n_embd=width, n_ffn=4 * width, n_vocab=n_vocab)
    weights = synthetic(config, seed, scale)
    tokens = [int(token) for token in np.random.default_rng(seed).integers(0, n_vocab, length)]
    with reopen(weights) as other:
        truth = truth_for(other.session, weights, cell.scheme, other.arithmetic, tokens, None)
        judge_gate(cell, gate(other.session, truth), other, weights, truth)
