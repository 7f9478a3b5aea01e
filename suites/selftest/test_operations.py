"""The forward pass taken apart is the forward pass; arithmetics that differ between operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference.config import Config
from reference.forward import forward
from reference.mixed import Mixed, emulated
from reference.numerics import Arithmetic, Exact
from reference.operations import compute, run, steps
from reference.synthetic import synthetic
from reference.weights import Tensor

CONFIG = Config(n_layer=3, n_embd=32, n_ffn=96, n_vocab=50)
WEIGHTS = synthetic(CONFIG, 1)
TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 50, 9)]
FP16 = Arithmetic("fp16", "fp16", "fp16")


def traced(**options: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    seen: dict[str, np.ndarray] = {}
    logits, state = forward(WEIGHTS, TOKENS, tap=seen.__setitem__, all_logits=True, **options)
    return seen, logits, state


@pytest.mark.parametrize(
    "arithmetic", [None, FP16, Arithmetic("int8x32"), Mixed(FP16, (("blocks.1.*", Arithmetic()),), 2)]
)
def test_taken_apart_it_is_the_same(arithmetic: Arithmetic | Mixed | None) -> None:
    """In the same order, to the last bit, from a state too."""
    _, middle = forward(WEIGHTS, [3, 4])
    for state in (None, middle):
        seen, logits, after = traced(arithmetic=arithmetic, state=state)
        again: dict[str, np.ndarray] = {}
        op = emulated(arithmetic) if arithmetic else Exact()
        got, got_after = run(WEIGHTS, TOKENS, state, op, again.__setitem__)
        assert list(again) == list(seen) == [step.point for step in steps(CONFIG)]
        for point, values in seen.items():
            np.testing.assert_array_equal(again[point], values, err_msg=point)
        np.testing.assert_array_equal(got, logits)
        np.testing.assert_array_equal(got_after, after)


def test_each_operation_follows_from_its_inputs() -> None:
    seen, _, _ = traced(dtype=np.float64)
    _, state = forward(WEIGHTS, TOKENS, dtype=np.float64)
    past = np.zeros_like(state)
    past[:, 4] = -1e30
    for step in steps(CONFIG):
        got = compute(
            step,
            {name: seen[name] for name in step.inputs}.__getitem__,
            WEIGHTS,
            np.array(TOKENS),
            past,
            Exact(np.float64),
        )
        np.testing.assert_array_equal(got, seen[step.point], err_msg=step.point)


def test_a_replaced_operation_is_what_differs() -> None:
    point = "blocks.1.ffn.k2"
    right: dict[str, np.ndarray] = {}
    wrong: dict[str, np.ndarray] = {}
    run(WEIGHTS, TOKENS, None, Exact(), right.__setitem__)
    run(WEIGHTS, TOKENS, None, Exact(), wrong.__setitem__, {point: lambda h: np.square(h.read("ffn.k"))})
    first = next(name for name in right if not np.array_equal(right[name], wrong[name]))
    assert first == point


def test_no_exceptions_are_no_difference() -> None:
    plain, mixed = traced(arithmetic=FP16), traced(arithmetic=Mixed(FP16))
    np.testing.assert_array_equal(plain[1], mixed[1])


def test_an_exception_is_in_its_own_arithmetic() -> None:
    """Only what matches: results that are no halves, and all others are."""
    seen, _, _ = traced(arithmetic=Mixed(FP16, (("blocks.1.ffn.k*", Arithmetic()),)))
    inexact = [name for name, x in seen.items() if not np.array_equal(x, x.astype(np.float16).astype(np.float32))]
    assert inexact == ["blocks.1.ffn.k", "blocks.1.ffn.k2"]


def test_rescaling_prevents_overflow_where_the_stream_grows() -> None:
    """The stream passes 65504 in the last of three layers, and is kept divided by four there."""
    grown = WEIGHTS.map(
        lambda name, tensor: Tensor.of(tensor.array() * np.float32(3e6 if name == "blocks.2.ffn.value.weight" else 1))
    )
    largest: dict[str, float] = {}
    forward(grown, TOKENS, tap=lambda name, x: largest.__setitem__(name, float(np.abs(x).max())))
    stream = largest["blocks.2.ffn.residual"]
    grown = grown.map(
        lambda name, tensor: Tensor.of(
            tensor.array() * np.float32(1e5 / stream if name == "blocks.2.ffn.value.weight" else 1)
        )
    )
    plain, _ = forward(grown, TOKENS, arithmetic=FP16)
    rescaled, _ = forward(grown, TOKENS, arithmetic=Mixed(FP16, rescale_every=1))
    truth, _ = forward(grown, TOKENS, dtype=np.float64)
    assert not np.isfinite(plain).all()
    assert np.abs(rescaled - truth).max() < 0.05 * truth.std()
