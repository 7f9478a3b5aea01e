"""NaN and Inf are followed to what overflowed, by how much; naive code written here makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.localize.cause import NON_FINITE, explain
from harness.localize.evidence import Evidence
from reference.config import Config
from reference.forward import forward
from reference.numerics import Arithmetic, Emulated
from reference.operations import run
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

CONFIG = Config(n_layer=3, n_embd=32, n_ffn=96, n_vocab=60)
TOKENS = np.random.default_rng(3).integers(0, 60, 24)
FP16 = Arithmetic("fp16", "fp16", "fp16")
#: Half precision with everything but the results in fp32.
MIXED = Arithmetic("fp16", "fp32", "fp32", "fp32")


def grown(**factors: float) -> Weights:
    """A model with some tensors of layer 1 multiplied; ``__`` for a dot."""
    by = {f"blocks.1.{name.replace('__', '.')}": factor for name, factor in factors.items()}

    def grow(name: str, tensor: Tensor) -> Tensor:
        return Tensor.of((tensor.array() * np.float32(by.get(name, 1))).astype(np.float32))

    return synthetic(CONFIG, 4).map(grow)


def traced(weights: Weights, arithmetic: Arithmetic) -> dict[str, np.ndarray]:
    seen: dict[str, np.ndarray] = {}
    forward(weights, TOKENS, tap=seen.__setitem__, arithmetic=arithmetic)
    return seen


def evidence(
    weights: Weights, point: str, inputs: tuple[str, ...], got: np.ndarray | None, arithmetic: Arithmetic
) -> Evidence:
    seen = traced(weights, arithmetic)
    at = "blocks.1."
    known = {name if "." in name and name.startswith("blocks") else at + name: None for name in inputs}
    shown = {name: seen[name] for name in known}
    result = seen[at + point] if got is None else got
    return Evidence(weights, weights, "fp32", arithmetic, TOKENS, at + point, 1, shown, result)


def text(*arguments: Any) -> str:
    with np.errstate(all="ignore"):
        cause = explain(evidence(*arguments))
    assert cause.kind == NON_FINITE
    return cause.text


def test_a_result_beyond_fp16() -> None:
    found = text(grown(ffn__key__weight=400), "ffn.k2", ("ffn.k",), None, MIXED)
    assert found.startswith("blocks.1.ffn.k2 is Inf at token ")
    assert "overflows: " in found
    assert "times the largest fp16 (65504)" in found
    assert "no others" in found


def test_by_how_much() -> None:
    weights = grown(ffn__key__weight=400)
    largest = float(np.square(np.maximum(traced(weights, MIXED)["blocks.1.ffn.k"].astype(np.float64), 0)).max())
    found = text(weights, "ffn.k2", ("ffn.k",), None, MIXED)
    assert f"{largest:.4g} is {largest / 65504:.2f} times" in found


def test_a_partial_sum_beyond_fp16_where_the_result_is_not() -> None:
    """Two halves that cancel: each of them overflows, their sum does not."""
    weights = grown()
    rng = np.random.default_rng(0)
    value = rng.standard_normal((32, 48)).astype(np.float32)
    pairs = np.concatenate([np.abs(value), -np.abs(value)], axis=1)
    key = np.repeat(weights["blocks.1.ffn.key.weight"].array()[:1], 96, axis=0) * 20
    changed = {"blocks.1.ffn.value.weight": pairs * 200, "blocks.1.ffn.key.weight": key}
    weights = weights.map(lambda name, tensor: Tensor.of(changed[name]) if name in changed else tensor)
    x = traced(weights, Arithmetic())["blocks.1.ffn.k2"]
    with np.errstate(all="ignore"):
        total = np.zeros((24, 32), np.float16)
        for column in range(96):
            total = total + (x[:, column, None] * changed["blocks.1.ffn.value.weight"][:, column]).astype(np.float16)
    assert not np.isfinite(total).all()
    found = text(weights, "ffn.v", ("ffn.k2",), total.astype(np.float32), Arithmetic())
    assert "a partial sum of the product overflows" in found
    assert "fp16, where fp32 is declared" in found


def test_exponentials_without_the_max_trick() -> None:
    weights = grown(att__key__weight=60)
    seen = traced(weights, Arithmetic())
    k, v = seen["blocks.1.att.k"], seen["blocks.1.att.v"]
    w = np.exp(weights["blocks.1.att.time_decay"].array())
    u = weights["blocks.1.att.time_first"].array()
    aa, bb, out = np.zeros(32, np.float32), np.zeros(32, np.float32), np.empty_like(v)
    with np.errstate(all="ignore"):
        for t in range(len(k)):
            bonus = np.exp(u + k[t])
            out[t] = (aa + bonus * v[t]) / (bb + bonus)
            aa, bb = np.exp(-w) * aa + np.exp(k[t]) * v[t], np.exp(-w) * bb + np.exp(k[t])
    assert not np.isfinite(out).all()
    found = text(weights, "att.wkv", ("att.k", "att.v"), out, Arithmetic())
    assert "max trick" in found
    assert "e^k overflows fp32 from k = 88.72 on" in found or "0/0" in found


def test_sums_of_wkv_beyond_fp16_whose_mean_is_not() -> None:
    """Values below the limit that are remembered for ever: one more brings their sum beyond it."""
    slow: dict[str, np.ndarray] = {
        "blocks.1.att.time_decay": np.full(32, -9, np.float32),
        "blocks.1.att.key.weight": np.zeros((32, 32), np.float32),
    }
    weights = grown(att__value__weight=1).map(lambda name, tensor: Tensor.of(slow[name]) if name in slow else tensor)
    largest = np.abs(traced(weights, Arithmetic())["blocks.1.att.v"]).max()
    value = weights["blocks.1.att.value.weight"].array() * np.float32(6e4 / largest)
    weights = weights.map(lambda name, tensor: Tensor.of(value) if name == "blocks.1.att.value.weight" else tensor)
    v = traced(weights, Arithmetic())["blocks.1.att.v"].astype(np.float64)
    bare = np.abs(np.cumsum(v * np.exp(-np.exp(-9.0) * np.arange(24)[::-1, None]), axis=0))
    assert bare.max() > 65504 > np.abs(v).max()
    fp16 = Arithmetic("fp16", "fp16", "fp16", "fp16")
    found = text(weights, "att.wkv", ("att.k", "att.v"), None, fp16)
    assert "WKV's sum aa (of values) overflows" in found
    assert f"times the largest fp16 (65504), first at token {np.argwhere(bare > 65504)[0][0]}" in found
    assert "no others" in found
    assert "pp starts" not in found
    shown = Evidence(weights, weights, "fp32", fp16, TOKENS, None, 1, state=np.full((3, 5, 32), np.nan))
    assert "the sum aa of blocks.1.att.wkv overflows" in explain(shown).text


def test_a_state_that_starts_beyond_fp16() -> None:
    weights = grown()
    found = text(weights, "att.wkv", ("att.k", "att.v"), np.full((24, 32), np.nan, np.float32), MIXED)
    assert "-1e+30, which is -Inf in fp16" in found


def test_a_gate_as_a_quotient_of_exponentials() -> None:
    weights = grown(att__receptance__weight=30)
    x = traced(weights, MIXED)["blocks.1.att.xr"] @ weights["blocks.1.att.receptance.weight"].array().T
    with np.errstate(all="ignore"):
        e = np.exp(x.astype(np.float16))
        got = (e / (1 + e)).astype(np.float32)
    assert np.isnan(got).any()
    assert "e^x / (1 + e^x) is Inf/Inf" in text(weights, "att.r", ("att.xr",), got, MIXED)


def test_the_sum_of_squares_of_a_norm() -> None:
    weights = grown(ffn__value__weight=300)
    x = traced(weights, Arithmetic())["blocks.1.ffn.residual"]
    with np.errstate(all="ignore"):
        half = x.astype(np.float16)
        centred = half - half.mean(axis=1, keepdims=True)
        variance = np.square(centred).sum(axis=1, keepdims=True, dtype=np.float16) / np.float16(32)
        got = (centred / np.sqrt(variance)).astype(np.float32)
        got[~np.isfinite(variance[:, 0])] = np.nan
    assert np.isnan(got).any()
    case = Evidence(
        weights,
        weights,
        "fp32",
        MIXED,
        TOKENS,
        "blocks.2.ln1",
        2,
        {"blocks.1.ffn.residual": x},
        got,
    )
    with np.errstate(all="ignore"):
        assert "of the LayerNorm overflows" in explain(case).text


def test_what_was_given_is_not_blamed_on_the_operation() -> None:
    weights = grown(ffn__key__weight=400)
    found = text(weights, "ffn.v", ("ffn.k2",), None, MIXED)
    assert "it was given Inf: ffn.k2" in found


def test_an_overflow_that_nothing_explains_is_not_explained() -> None:
    """One element of an innocent product."""
    weights = grown()
    got = traced(weights, Arithmetic())["blocks.1.att.k"].copy()
    got[3, 5] = np.nan
    found = text(weights, "att.k", ("att.xk",), got, Arithmetic())
    assert "att.k is NaN at token 3, channel 5 (1 of 768 elements)" in found
    assert "out of bounds" in found


def test_weights_are_blamed_first() -> None:
    weights = grown()
    array = weights["blocks.1.att.key.weight"].array().copy()
    array[2, 3] = np.nan
    broken = weights.map(lambda name, tensor: Tensor.of(array) if name == "blocks.1.att.key.weight" else tensor)
    found = text(broken, "att.k", ("att.xk",), None, Arithmetic())
    assert found.startswith("the checkpoint holds NaN in blocks.1.att.key.weight at [2, 3]")


def test_weights_that_overflow_as_they_are_stored() -> None:
    weights = grown(att__key__weight=1e6)
    stored = apply(weights, "fp16").in_memory()
    case = Evidence(weights, stored, "fp16", FP16, TOKENS, layer=1, logits=np.full((24, 60), np.nan))
    with np.errstate(all="ignore"):
        found = explain(case).text
    assert "stored by fp16 the weights have Inf in blocks.1.att.key.weight" in found
    assert "its largest weight is " in found


@pytest.mark.parametrize("layer", [None, 1])
def test_logits_alone(layer: int | None) -> None:
    """What truth's magnitudes say overflows first."""
    weights = grown(ffn__key__weight=400)
    logits, _ = run(weights, TOKENS, None, Emulated(MIXED))
    assert not np.isfinite(logits).all()
    found = explain(Evidence(weights, weights, "fp32", MIXED, TOKENS, layer=layer, logits=logits)).text
    assert found.startswith("blocks.1.ffn.k2 overflows: truth has ")
    assert "times the largest fp16 (65504), first at token " in found


def test_logits_alone_and_nothing_large() -> None:
    weights = grown()
    case = Evidence(weights, weights, "fp32", Arithmetic(), TOKENS, logits=np.full((24, 60), np.nan))
    assert "nothing comes near the limits of the declared fp32" in explain(case).text
