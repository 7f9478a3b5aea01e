"""What can be told of a LayerNorm from its results alone, and of a head from a row of logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.localize.narrowed import partly
from harness.localize.normed import broken
from reference.config import Config
from reference.forward import layer_norm
from reference.numerics import Arithmetic, Emulated, Exact
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

CONFIG = Config(n_layer=2, n_embd=64, n_ffn=64, n_vocab=50)
NAME = "blocks.1.ln2"
FP32, FP16 = Arithmetic(), Arithmetic("fp16", residual="fp16")


def weights(seed: int) -> Weights:
    """With vectors of LayerNorms that are neither 1 nor 0."""
    rng = np.random.default_rng(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        if not name.startswith(NAME):
            return tensor
        return Tensor.of((tensor.array() + 0.3 * rng.standard_normal(tensor.shape)).astype(np.float32))

    return synthetic(CONFIG, seed).map(change)


def stream(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).normal(0.2, 1.5, (40, 64))


def normed(x: np.ndarray, seed: int) -> np.ndarray:
    return layer_norm(x, weights(seed), NAME, Exact(np.float64))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["halved", "other", "one token", "shifted", "noisy"]))
def test_what_is_wrong_before_a_norm_does_not_accuse_it(seed: int, fault: str) -> None:
    x = stream(seed)
    wrong = {
        "halved": x / 2,
        "other": stream(seed + 1),
        "one token": np.where(np.arange(40)[:, None] == 7, x[::-1], x),
        "shifted": np.roll(x, 3, axis=1),
        "noisy": x + 0.01 * stream(seed + 2),
    }[fault]
    assert not broken(normed(wrong, seed), normed(x, seed), weights(seed), NAME, FP32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([FP32, FP16, Arithmetic("bf16", residual="bf16")]))
def test_rounding_does_not_accuse_it(seed: int, arithmetic: Arithmetic) -> None:
    x, op = stream(seed).astype(np.float32), Emulated(arithmetic, seed)
    made = op.act(layer_norm(op.residual(x), weights(seed), NAME, op))
    assert not broken(made, normed(x, seed), weights(seed), NAME, arithmetic)


def faulty(x: np.ndarray, seed: int, fault: str) -> np.ndarray:
    """A LayerNorm written here, wrong in one way."""
    weight, bias = (weights(seed)[f"{NAME}.{part}"].array(np.float64) for part in ("weight", "bias"))
    centred = x - x.mean(axis=1, keepdims=True)
    variance = (centred**2).sum(axis=1, keepdims=True) / (x.shape[1] - (fault == "sample variance"))
    if fault == "root mean square":
        centred, variance = x, (x**2).mean(axis=1, keepdims=True)
    y = centred / (np.sqrt(variance) + 0.1 if fault == "eps outside the root" else np.sqrt(variance + 1e-5))
    return np.asarray(y * (1 if fault == "no weight" else weight) + (0 if fault == "no bias" else bias))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fault", ["sample variance", "root mean square", "eps outside the root", "no weight", "no bias"]
)
def test_a_wrong_norm_is_told_by_its_results(fault: str, seed: int) -> None:
    x = stream(seed)
    np.testing.assert_allclose(faulty(x, seed, ""), normed(x, seed), rtol=1e-6)
    assert broken(faulty(x, seed, fault), normed(x, seed), weights(seed), NAME, FP32)


def test_with_many_vanishing_weights_nothing_is_concluded() -> None:
    small = np.where(np.arange(64) % 4 == 0, 1e-6, 1).astype(np.float32)
    found = weights(0).map(lambda name, tensor: Tensor.of(small) if name == f"{NAME}.weight" else tensor)
    x = stream(0)
    assert not broken(faulty(x, 0, "no bias"), normed(x, 0), found, NAME, FP32)


def test_a_head_that_is_wrong_leaves_other_logits_finite() -> None:
    good = np.zeros((3, 5))
    one, all_of_a_row = good.copy(), good.copy()
    one[1, 2], all_of_a_row[1] = np.nan, np.inf
    assert partly(one)
    assert not partly(all_of_a_row)
    assert not partly(good)
    all_of_a_row[2, 0] = np.nan
    assert not partly(all_of_a_row)  # the first row tells
