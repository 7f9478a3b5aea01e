"""LoRA merged into a checkpoint: what merging by hand gives, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config, is_matrix
from reference.errors import CheckpointError, ConfigError, NonFiniteWeights
from reference.lora import merge_counts, merge_lora
from reference.pth_file import write
from reference.schemes import apply
from reference.tensor_stream import Encoder
from reference.weights import Tensor, Weights
from suites.selftest.checkpoint_files import random_values

CONFIG = Config(n_layer=2, n_embd=32, n_ffn=64, n_vocab=40)
KEY, VALUE = "blocks.0.att.key", "blocks.1.ffn.value"


def lora_file(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A ``.pth`` of these tensors, as RWKV-LM-LoRA saves them."""
    with path.open("wb") as file:
        write(file, {name: Tensor.of(value) for name, value in tensors.items()}, {}, Encoder())
    return path


def pair(name: str, r: int, shape: tuple[int, int], seed: int = 0, suffix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((r, shape[1])).astype(np.float32)
    b = rng.standard_normal((shape[0], r)).astype(np.float32)
    return {f"{name}.lora_A{suffix}": a, f"{name}.lora_B{suffix}": b}


#: A pair that fits.
ONE = pair(KEY, 4, (32, 32))


@given(
    r=st.integers(1, 40),
    alpha=st.floats(-64, 64),
    stored=st.sampled_from(["f64", "f32", "f16"]),
    suffix=st.sampled_from(["", ".weight"]),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=40, deadline=None)
def test_merged_is_w_plus_b_a_alpha_over_r_rounded_once(
    r: int, alpha: float, stored: str, suffix: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = random_values(CONFIG, stored, seed)
    tensors = pair(KEY, r, (32, 32), seed, suffix) | pair(VALUE, r, (32, 64), seed + 1, suffix)
    merged = merge_lora(weights, lora_file(tmp_path_factory.mktemp("lora") / "a.pth", tensors), alpha)
    for name, tensor in weights.items():
        if name not in (f"{KEY}.weight", f"{VALUE}.weight"):
            assert merged[name] is tensor
            continue
        stem = name.removesuffix(".weight")
        a, b = (tensors[f"{stem}.lora_{letter}{suffix}"].astype(np.float64) for letter in "AB")
        by_hand = tensor.array(np.float64) + alpha / r * (b @ a)
        assert merged[name].stored == stored
        unit = {"f64": 2.0**-52, "f32": 2.0**-24, "f16": 2.0**-11}[stored]
        error = np.abs(merged[name].array(np.float64) - by_hand)
        assert np.all(error <= unit * np.abs(by_hand) * (1 + 1e-6) + 2.0**-25 * (stored == "f16") + 1e-12)
    assert merge_counts(merged) == (2, 0)
    assert (merged.metadata["lora"], merged.metadata["lora_alpha"], merged.key) == ("a.pth", str(alpha), "")


def test_tensors_that_the_file_replaces(tmp_path: Path) -> None:
    weights = random_values(CONFIG, "f16")
    rng = np.random.default_rng(1)
    new = {
        "blocks.0.ln1.weight": rng.standard_normal(32).astype(np.float32),
        "blocks.1.att.time_mix_k": rng.standard_normal((1, 1, 32)).astype(np.float32),
        "blocks.1.att.time_decay": rng.standard_normal(32).astype(np.float32),
        f"{KEY}.weight": rng.standard_normal((32, 32)).astype(np.float32),
    }
    merged = merge_lora(weights, lora_file(tmp_path / "a.pth", new | pair(KEY, 4, (32, 32))), 8)
    assert merge_counts(merged) == (1, 4)
    for name in list(new)[:3]:
        assert merged[name].stored == "f16"
        assert np.array_equal(merged[name].read(), new[name].reshape(32).astype(np.float16))
    a, b = pair(KEY, 4, (32, 32)).values()
    by_hand = new[f"{KEY}.weight"].astype(np.float16).astype(np.float64) + 2.0 * (b.astype(np.float64) @ a)
    assert np.allclose(merged[f"{KEY}.weight"].array(np.float64), by_hand, rtol=2.0**-11, atol=2.0**-25)


def test_rows_are_merged_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = apply(random_values(CONFIG), "bf16")
    merged = merge_lora(weights, lora_file(tmp_path / "a.pth", pair(VALUE, 4, (32, 64))), 32)
    tensor = merged[f"{VALUE}.weight"]
    whole = tensor.array()
    monkeypatch.setattr("reference.lora._BLOCK_ELEMENTS", 300)
    indices: tuple[Any, ...] = (slice(None), slice(3, 20), slice(30, 2, -7), slice(0, 0), np.array([5, 0, 5]), 7)
    for index in indices:
        assert np.allclose(tensor.rows(index), whole[index], rtol=2.0**-8)
    assert tensor.read().dtype == np.uint16


@pytest.mark.parametrize("format", ["pth", "ggml", "fr"])
def test_a_merged_model_is_written_like_any_other(format: str, tmp_path: Path) -> None:
    merged = merge_lora(random_values(CONFIG), lora_file(tmp_path / "a.pth", pair(KEY, 4, (32, 32))), 32)
    save_checkpoint(merged, tmp_path / "out", format)
    read = load_checkpoint(tmp_path / "out")
    assert all(np.array_equal(read[n].array(), merged[n].array()) for n in merged if is_matrix(n) and n != "emb.weight")


def test_no_alpha_changes_nothing(tmp_path: Path) -> None:
    weights = random_values(CONFIG)
    merged = merge_lora(weights, lora_file(tmp_path / "a.pth", pair(KEY, 4, (32, 32))), 0)
    assert np.array_equal(merged[f"{KEY}.weight"].array(), weights[f"{KEY}.weight"].array())


def test_a_sum_that_leaves_the_stored_type_warns(tmp_path: Path) -> None:
    weights = random_values(CONFIG, "f16")
    tensors = {name: value * 1000 for name, value in pair(KEY, 4, (32, 32)).items()}
    merged = merge_lora(weights, lora_file(tmp_path / "a.pth", tensors), 32)
    with pytest.warns(NonFiniteWeights, match=r"merged blocks\.0\.att\.key\.weight is too large for f16: Inf"):
        assert np.isinf(merged[f"{KEY}.weight"].array()).any()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"holds no pair NAME\.lora_A and NAME\.lora_B, so it is no LoRA file"),
        ({"head.weight": np.ones((40, 32)), "ln_out.bias": np.ones(32)}, "holds no pair"),
        ({f"{KEY}.lora_A": np.ones((4, 32))}, r"key\.lora_A is there, but blocks\.0\.att\.key\.lora_B is not"),
        ({f"{KEY}.lora_B": np.ones((32, 4))}, r"key\.lora_B is there, but blocks\.0\.att\.key\.lora_A is not"),
        (pair(KEY, 4, (32, 16)), r"lora_B \(32, 4\) times .*lora_A \(4, 16\) is not .*weight \(32, 32\)"),
        (pair(KEY, 4, (16, 32)), r"lora_B \(16, 4\) times"),
        (
            {f"{KEY}.lora_A": np.ones((4, 32)), f"{KEY}.lora_B": np.ones((32, 5))},
            r"lora_B \(32, 5\) times .*lora_A \(4, 32\)",
        ),
        ({f"{KEY}.lora_A": np.ones((0, 32)), f"{KEY}.lora_B": np.ones((32, 0))}, r"lora_B \(32, 0\)"),
        (pair("ln_out", 1, (32, 1)), r"is not ln_out\.weight \(32,\)"),
        (pair("blocks.7.att.key", 4, (32, 32)), r"blocks\.7\.att\.key\.lora_A .and 1 more. has no place in memory"),
        (
            ONE | {"head.weight": np.ones((40, 31))},
            r"head\.weight has shape \(40, 31\), but the checkpoint's has \(40, 32\)",
        ),
        (ONE | {f"{KEY}.weight": np.ones((16, 64))}, r"key\.weight has shape \(16, 64\)"),
        (ONE | {"ln_out.bias": np.ones(31)}, r"ln_out\.bias has shape \(31,\)"),
        (ONE | {"a\nb": np.ones(3)}, r"tensor 'a\\nb' has no place"),
    ],
)
def test_what_does_not_fit(tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.pth", tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_lora(random_values(CONFIG), path, 32)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_ordinary_checkpoint_is_no_lora(tmp_path: Path) -> None:
    save_checkpoint(random_values(CONFIG, seed=1), tmp_path / "other.pth", "pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: holds no pair"):
        merge_lora(random_values(CONFIG), tmp_path / "other.pth", 32)


def test_alpha_must_be_a_number_and_weights_not_quantized(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.pth", pair(KEY, 4, (32, 32)))
    with pytest.raises(ConfigError, match="lora_alpha is nan; a finite number is expected"):
        merge_lora(random_values(CONFIG), path, float("nan"))
    save_checkpoint(random_values(CONFIG), tmp_path / "a.bin", "ggml", "Q4_0")
    quantized = load_checkpoint(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"key\.weight is quantized; merge into the FP16 or FP32 checkpoint"):
        merge_lora(quantized, path, 32)
    with pytest.raises(CheckpointError, match="does not exist"):
        merge_lora(quantized, tmp_path / "none.pth", 32)


def test_merging_reads_nothing_until_it_is_read(tmp_path: Path) -> None:
    def refuse() -> np.ndarray:
        raise AssertionError("read too early")

    weights = random_values(CONFIG)
    unread = Weights(CONFIG, {name: Tensor("f32", tensor.shape, refuse) for name, tensor in weights.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_lora(unread, lora_file(tmp_path / "a.pth", pair(KEY, 4, (32, 32))), 32)
    with pytest.raises(AssertionError, match="read too early"):
        merged[f"{KEY}.weight"].array()
