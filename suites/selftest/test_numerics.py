"""Emulated formats against independent ones, and the emulated forward pass against its purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from harness.compare import logits_error
from reference.codecs_ggml_v100 import Q4_0_V100, Q4_1_V100
from reference.config import Config
from reference.forward import forward
from reference.numerics import (
    INPUTS,
    INT8_BLOCKS,
    ROUND,
    UNIT_ROUNDOFF,
    Arithmetic,
    Emulated,
    Exact,
    int8_per_block,
    one_by_one,
)
from reference.synthetic import synthetic
from reference.weights import Tensor, bf16_to_f32, f32_to_bf16

FLOATS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32))


@settings(deadline=None)
@given(FLOATS)
def test_bf16_is_torchs(x: np.ndarray) -> None:
    torch = pytest.importorskip("torch", reason="torch is the independent bfloat16")
    want = torch.from_numpy(x.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(x)), want)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(["fp16", "bf16"]),
)
def test_rounding_is_idempotent_and_within_the_unit_roundoff(x: np.ndarray, kind: str) -> None:
    once = ROUND[kind](x)
    np.testing.assert_array_equal(ROUND[kind](once), once)
    smallest_normal = {"fp16": 2.0**-14, "bf16": 2.0**-126}[kind]
    normal = np.abs(x) >= smallest_normal
    assert (np.abs(once - x)[normal] <= UNIT_ROUNDOFF[kind] * np.abs(x)[normal]).all()


def test_fp16_overflow_is_infinite() -> None:
    with np.errstate(over="ignore"):
        assert ROUND["fp16"](np.array([65519.0, 65520.0, -7e4], np.float32)).tolist() == [65504.0, np.inf, -np.inf]


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32, (3, 96), elements=st.floats(2.0**-10, 100, width=32) | st.floats(-100, -(2.0**-10), width=32)
    )
)
def test_int8_blocks_are_ggmls(x: np.ndarray) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is the independent Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    want = gguf.dequantize(gguf.quantize(x, kind), kind)
    got = int8_per_block(x)
    step = np.repeat(np.abs(x.reshape(3, 3, 32)).max(-1), 32).reshape(x.shape) / 127
    # Ties are rounded to even here and away from zero there: at most one step, and only at a tie.
    off = got != want
    assert (np.abs(got - want) <= step * 1.001).all()
    assert off.mean() <= 0.5 or not np.any(np.abs((x / np.maximum(step, 1e-30)) % 1 - 0.5)[off] > 1e-3)


def test_a_ragged_last_block_has_its_own_scale() -> None:
    x = np.concatenate([np.full(32, 1000.0), np.full(3, 0.001)]).astype(np.float32)[None]
    np.testing.assert_allclose(int8_per_block(x), x, rtol=1e-3)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32)))
def test_int4_blocks_are_the_weights_formats_of_april_2023(x: np.ndarray) -> None:
    """But for ties, to even here as the library's AVX2 does with inputs, away from zero in its files."""
    x = np.where(np.abs(x) < 1e-3, 0, x).astype(np.float32)
    blocks = x.reshape(3, 2, 32)
    for kind, codec, step in (
        ("int4x32", Q4_0_V100, np.abs(blocks).max(-1) / 7),
        ("uint4x32", Q4_1_V100, (blocks.max(-1) - blocks.min(-1)) / 15),
    ):
        got, want = INPUTS[kind](x), codec.dequantize(codec.quantize(x))
        steps = np.repeat(step, 32, axis=1).reshape(x.shape)
        tie = np.abs(np.abs(got - x) - steps / 2) <= 1e-3 * steps
        assert np.all(np.abs(got - want)[~tie] <= 1e-5 * np.abs(x).max())
        assert np.all(np.abs(got - x) <= 0.501 * steps + 1e-5 * np.abs(x).max())


@pytest.mark.parametrize(("kind", "block"), [("int8x32f", 32), ("int8x64", 64), ("int8x128", 128), ("int8x256", 256)])
def test_int8_blocks_have_one_scale_each_in_float32(kind: str, block: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    step = np.repeat(np.abs(x.reshape(2, -1, block)).max(-1), block, axis=1).reshape(x.shape) / 127
    codes = INPUTS[kind](x) / step
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert np.all(np.abs(INPUTS[kind](x) - x) <= 0.5001 * step)


def test_fp16_inputs_round_inputs_only_and_draws_differ() -> None:
    """1 + 2^-12 is no fp16 number, 2049 is none either."""
    w = Tensor.of(np.array([[1.0, 2048.0]], np.float32))
    exact = Emulated(Arithmetic("fp16in"))
    assert exact.linear(np.array([[1 + 2.0**-12, 1.0]], np.float32), w) == 2049
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    w = Tensor.of(np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32))
    draws = [Emulated(Arithmetic("fp16in"), seed).linear(x, w) for seed in range(3)]
    errors = [np.abs(draw - x @ w.array().T).max() for draw in draws]
    assert all(1e-4 < error < 64 * 2.0**-11 * 4 for error in errors)
    assert np.abs(draws[1] - draws[2]).max() > 1e-4


def test_fp16_rows_keep_what_fp16_inputs_lose() -> None:
    """A row within range is rounded as by fp16in; one beyond it relative to its largest value; none overflows."""
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    x[1] *= np.float32(2.0**20) / np.abs(x[1]).max()
    x[2] *= np.float32(3e38) / np.abs(x[2]).max()
    rounded = INPUTS["fp16rows"](x)
    np.testing.assert_array_equal(rounded[:1], INPUTS["fp16in"](x[:1]))
    np.testing.assert_array_equal(rounded[1], INPUTS["fp16in"](x[1:2] / 2.0**5)[0] * np.float32(2.0**5))
    with np.errstate(over="ignore"):
        assert not np.isfinite(INPUTS["fp16in"](x)[1:]).all(axis=-1).any()
    for seed in range(4):
        weight = np.eye(64, dtype=np.float32)
        result = Emulated(Arithmetic("fp16rows"), seed).linear(x[:2], Tensor.of(weight))
        assert np.all(np.abs(result - x[:2]) <= 1.001 * UNIT_ROUNDOFF["fp16rows"] * np.abs(x[:2]) + 2.0**-19)
        assert (np.abs(result - rounded[:2]).max() > 0) == (seed > 0)
    x[0, 0], x[1, 0] = np.nan, np.inf
    with np.errstate(over="ignore"):
        assert not np.isfinite(INPUTS["fp16rows"](x)[:2, 0]).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 70), st.sampled_from(["fp32", "fp16", "bf16", "int8x32"]))
def test_linear_is_a_matrix_product(seed: int, k: int, activations: str) -> None:
    """Within the forward error bound gamma_n of a sum of n products (Higham, 2002, section 3.1)."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((4, k)).astype(np.float32), rng.standard_normal((6, k)).astype(np.float32)
    got = Emulated(Arithmetic(activations), seed).linear(ROUND.get(activations, ROUND["fp32"])(x), Tensor.of(w))
    size = np.abs(x).astype(np.float64) @ np.abs(w).T
    exact = x.astype(np.float64) @ w.T
    gamma = k * 2.0**-24 * 1.1 + {"fp32": 0.0}.get(activations, 4 * UNIT_ROUNDOFF[activations])
    if activations == "int8x32":
        largest = np.abs(x).max(axis=1, keepdims=True) / 127 * np.abs(w).sum(axis=1)
        assert (np.abs(got - exact) <= largest + gamma * size).all()
    else:
        assert (np.abs(got - exact) <= gamma * size).all()


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 9), st.integers(1, 400))
def test_products_are_added_one_by_one_in_the_given_order(seed: int, k: int, t: int, n: int) -> None:
    """After 2^25 every 1 is lost, before it none is: any blocks, pairs or lanes of a sum would keep some."""
    order = np.random.default_rng(seed).permutation(k)
    x, w = np.ones((t, k), np.float32), np.ones((n, k), np.float32)
    x[:, order[k // 2]] = 2.0**25
    got = one_by_one(x, w, order)
    assert got.shape == (t, n)
    np.testing.assert_array_equal(got, np.float32(2**25 + k // 2))


@pytest.mark.parametrize("kind", sorted(INT8_BLOCKS))
def test_draws_of_int8_err_independently_and_equally(kind: str) -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((64, 512)).astype(np.float32), rng.standard_normal((32, 512)).astype(np.float32)
    truth = Exact(np.float64).linear(x, Tensor.of(weight))
    errors = [Emulated(Arithmetic(kind), seed).linear(x, Tensor.of(weight)) - truth for seed in range(5)]
    sizes = [float(np.sqrt(np.mean(error**2))) for error in errors]
    assert max(sizes) < 1.15 * min(sizes)
    for i, error in enumerate(errors[1:], 1):
        assert abs(np.corrcoef(error.ravel(), errors[i - 1].ravel())[0, 1]) < 0.5


def test_wider_arithmetic_is_closer() -> None:
    weights = synthetic(Config(3, 64, 256, 97), 3).in_memory()
    tokens = np.random.default_rng(3).integers(0, 97, 40)
    truth, _ = forward(weights, tokens, all_logits=True, dtype=np.float64)
    kinds = [
        Arithmetic(),
        Arithmetic("fp16"),
        Arithmetic("fp16", "fp32", "fp16"),
        Arithmetic("fp16", "fp16", "fp16", "fp16"),
        Arithmetic("bf16", "fp32", "bf16"),
    ]
    errors = [
        logits_error(forward(weights, tokens, all_logits=True, arithmetic=a, seed=1)[0], truth).rms for a in kinds
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6 < errors[1] < 1e-2


def test_seeds_draw_different_summation_orders() -> None:
    weights = synthetic(Config(2, 64, 256, 97), 3).in_memory()
    draws = [forward(weights, [1, 2, 3], arithmetic=Arithmetic(), seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_a_large_matrix_is_upcast_in_parts() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((70_000, 512)).astype(np.float16)  # 36 M elements: two blocks
    x = rng.standard_normal((2, 512)).astype(np.float32)
    np.testing.assert_allclose(Exact().linear(x, Tensor.of(w)), x @ w.astype(np.float32).T, rtol=1e-4, atol=1e-4)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ValueError, match="activations is 'fp8'; known: fp32"):
        Arithmetic("fp8")
    with pytest.raises(ValueError, match="wkv is 'int8x32'"):
        Arithmetic(wkv="int8x32")


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8x32"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_watching_changes_no_bit(kind: str, all_logits: bool) -> None:
    weights, tokens = synthetic(Config(2, 32, 64, 50), 1), [3, 1, 4, 1, 5]
    for seed in (0, 1):
        how: dict[str, Any] = {"arithmetic": Arithmetic(kind), "seed": seed, "all_logits": all_logits}
        plain, state = forward(weights, tokens, **how)
        watched, after = forward(weights, tokens, tap=lambda point, x: None, **how)
        np.testing.assert_array_equal(watched, plain)
        np.testing.assert_array_equal(after, state)
