"""Checkpoints written and read back: exactly, lazily, and completely or not at all."""

from __future__ import annotations

import json
import os
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config, tensor_shapes
from reference.errors import CheckpointError, ConfigError, NonFiniteWeights
from reference.hf_folder import blinkdl_name, hf_name
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights, bf16_to_f32, f32_to_bf16
from suites.selftest.checkpoint_files import FORMATS, SMALL, arrays, random_bits, random_values, same

CONFIGS = st.builds(
    Config,
    n_layer=st.integers(1, 3),
    n_embd=st.integers(1, 9),
    n_ffn=st.integers(1, 17),
    n_vocab=st.integers(1, 20),
    rescale_every=st.integers(0, 7),
)
STORED = st.lists(st.sampled_from(["f64", "f32", "f16", "bf16"]), min_size=1, max_size=5)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_is_exact(format: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(format)

    @settings(max_examples=25, deadline=None)
    @given(config=CONFIGS, stored=STORED, seed=st.integers(0, 1 << 32))
    def check(config: Config, stored: list[str], seed: int) -> None:
        weights = random_bits(config, stored, seed)
        path = folder / os.urandom(8).hex()
        save_checkpoint(weights, path, format)
        read = load_checkpoint(path, scan=False)
        assert same(weights, read)
        assert read.source == str(path)
        expected = config.rescale_every if format == "hf" else 0
        assert read.config == Config(config.n_layer, config.n_embd, config.n_ffn, config.n_vocab, expected)

    check()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "bf16"])
def test_a_scheme_converts_every_tensor(format: str, scheme: str, tmp_path: Path) -> None:
    weights = random_values(stored="f32")
    save_checkpoint(weights, tmp_path / "out", format, scheme)
    read = load_checkpoint(tmp_path / "out")
    for name, tensor in weights.items():
        x = tensor.array()
        expected = {"fp32": x, "fp16": x.astype(np.float16), "bf16": bf16_to_f32(f32_to_bf16(x))}[scheme]
        assert read[name].stored == {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[scheme]
        np.testing.assert_array_equal(read[name].array(), expected.astype(np.float32))


@pytest.mark.parametrize("stored", ["f16", "bf16"])
def test_half_precision_survives_a_trip_through_fp32(stored: str, tmp_path: Path) -> None:
    weights = random_values(stored="f16")
    if stored == "bf16":
        weights = weights.map(lambda _, tensor: Tensor.of(f32_to_bf16(tensor.array())))
    save_checkpoint(weights, tmp_path / "wide.pth", "pth", "fp32")
    scheme = {"f16": "fp16", "bf16": "bf16"}[stored]
    save_checkpoint(load_checkpoint(tmp_path / "wide.pth"), tmp_path / "back", "safetensors", scheme)
    assert same(weights, load_checkpoint(tmp_path / "back"))


def test_an_overflowing_conversion_warns(tmp_path: Path) -> None:
    values = arrays(random_values())
    values["blocks.1.att.key.weight"][2, 1] = 1e6
    values["head.weight"][0, 0] = np.inf  # not made by the conversion, so not named by it
    with pytest.warns(NonFiniteWeights, match=r"too large for fp16 became Inf in blocks\.1\.att\.key\.weight$"):
        save_checkpoint(Weights.of(SMALL, values), tmp_path / "a.pth", "pth", "fp16")


@pytest.mark.parametrize("format", FORMATS)
def test_the_mark_of_synthetic_weights_and_metadata_stay(format: str, tmp_path: Path) -> None:
    save_checkpoint(synthetic(SMALL), tmp_path / "out", format)
    read = load_checkpoint(tmp_path / "out")
    assert read.synthetic
    assert read.metadata["synthetic"] == "true"
    save_checkpoint(random_values(), tmp_path / "other", format)
    assert not load_checkpoint(tmp_path / "other").synthetic


@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_equal_weights_give_equal_files(format: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(random_values(), tmp_path / name, format)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_can_replace_the_one_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_checkpoint(random_values(), path, "pth")
    weights = load_checkpoint(path)
    save_checkpoint(weights, path, "pth", "fp16")
    assert load_checkpoint(path)["emb.weight"].stored == "f16"
    assert same(weights, random_values())
    assert os.listdir(tmp_path) == ["a.pth"]


def test_tensors_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    save_checkpoint(random_values(), tmp_path / "a.pth", "pth")
    array = load_checkpoint(tmp_path / "a.pth")["emb.weight"].read()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_names_map_both_ways() -> None:
    names = tensor_shapes(SMALL)
    assert [blinkdl_name(hf_name(name)) for name in names] == list(names)
    assert [blinkdl_name(name) for name in names] == list(names)


# --- NaN and Inf


@pytest.mark.parametrize("stored", ["f64", "f32", "f16", "bf16"])
def test_non_finite_weights_load_with_a_warning(stored: str, tmp_path: Path) -> None:
    values = arrays(random_values())
    bad = ["emb.weight", "blocks.0.ln1.bias", "blocks.1.ffn.key.weight", "ln_out.bias", "head.weight"]
    for name, value in zip(bad, [np.nan, np.inf, -np.inf, np.nan, np.inf], strict=True):
        values[name].flat[-1] = value
    weights = Weights.of(SMALL, {n: v.astype({"f64": np.float64}.get(stored, np.float32)) for n, v in values.items()})
    save_checkpoint(weights, tmp_path / "a.pth", "pth", {"f16": "fp16", "bf16": "bf16"}.get(stored))
    with pytest.warns(NonFiniteWeights, match="NaN or Inf in emb.weight, blocks.0.ln1.bias, .* and 2 more"):
        read = load_checkpoint(tmp_path / "a.pth")
    assert sorted(read.non_finite) == sorted(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path / "a.pth", scan=False).non_finite == ()


# --- memory


def test_opening_a_large_file_reads_none_of_it(tmp_path: Path) -> None:
    path = _sparse(tmp_path / "large.safetensors", n_vocab=1 << 20, n_embd=512)  # 4 GiB of holes
    before = _resident()
    weights = load_checkpoint(path, scan=False)
    assert weights.nbytes > 4 << 30
    assert weights["head.weight"].rows([5, 7]).sum() == 0
    assert _resident() - before < 8 << 20


def test_scanning_gives_its_pages_back(tmp_path: Path) -> None:
    path = _sparse(tmp_path / "large.safetensors", n_vocab=1 << 17, n_embd=256)  # 256 MiB of holes
    before = _resident()
    weights = load_checkpoint(path)
    assert _resident() - before < 64 << 20  # the allocator may keep what the scan computed with
    assert weights.non_finite == ()


@pytest.mark.parametrize("format", FORMATS)
def test_writing_holds_one_tensor_at_most(format: str, tmp_path: Path) -> None:
    path = _sparse(tmp_path / "large.safetensors", n_vocab=1 << 17, n_embd=64)  # two matrices of 32 MiB in float32
    weights = load_checkpoint(path, scan=False)
    tracemalloc.start()
    save_checkpoint(weights, tmp_path / "out", format, "bf16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 96 << 20
    assert load_checkpoint(tmp_path / "out", scan=False).nbytes == weights.nbytes // 2


def _sparse(path: Path, n_vocab: int, n_embd: int) -> Path:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensor_shapes(Config(1, n_embd, 4 * n_embd, n_vocab)).items():
        end = at + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    return path


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("resident memory is read from /proc, which this system does not have")


# --- writing that fails


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_write_leaves_nothing(format: str, tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise KeyboardInterrupt

    weights = random_values()
    broken = weights.map(lambda name, tensor: Tensor("f32", tensor.shape, fail) if name == "head.weight" else tensor)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(broken, tmp_path / "out", format)
    assert os.listdir(tmp_path) == []
    (tmp_path / "old.pth").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(broken, tmp_path / "old.pth", "pth")
    assert os.listdir(tmp_path) == ["old.pth"]
    assert (tmp_path / "old.pth").read_text() == "kept"


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_line(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"out.*: cannot be written \(No space left on device\)$"):
        save_checkpoint(random_values(), tmp_path / "out", format)
    assert os.listdir(tmp_path) == []


def test_a_tensor_unlike_its_description_is_not_written(tmp_path: Path) -> None:
    wrong = random_values().map(lambda _, tensor: Tensor("f16", tensor.shape, tensor.read))
    with pytest.raises(CheckpointError, match=r"tensor emb.weight holds float32 \(10, 4\), not f16"):
        save_checkpoint(wrong, tmp_path / "a.pth", "pth")
    assert os.listdir(tmp_path) == []


def test_what_may_not_be_written_over(tmp_path: Path) -> None:
    weights = random_values()
    with pytest.raises(CheckpointError, match=r"its folder does not exist; create .*nowhere first"):
        save_checkpoint(weights, tmp_path / "nowhere" / "a.pth", "pth")
    with pytest.raises(CheckpointError, match="its folder does not exist"):
        save_checkpoint(weights, tmp_path / "nowhere" / "hf", "hf")
    with pytest.raises(CheckpointError, match="exists and is not a regular file"):
        save_checkpoint(weights, tmp_path, "safetensors")
    with pytest.raises(CheckpointError, match="exists and is not a regular file"):
        save_checkpoint(weights, os.devnull, "pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="full: exists already; choose another name or remove it first"):
        save_checkpoint(weights, tmp_path / "full", "hf")
    (tmp_path / "empty").mkdir()
    save_checkpoint(weights, tmp_path / "empty", "hf")
    assert sorted(os.listdir(tmp_path / "empty")) == ["config.json", "model.safetensors"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pth").symlink_to(tmp_path / "real" / "a.pth")
    save_checkpoint(random_values(), tmp_path / "link.pth", "pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert same(random_values(), load_checkpoint(tmp_path / "link.pth"))


def test_unknown_formats_and_schemes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint scheme 'fp15'; did you mean 'fp16'.*fp32, fp16, bf16"):
        save_checkpoint(random_values(), tmp_path / "a", "pth", "fp15")
    with pytest.raises(ConfigError, match="no checkpoint format 'safetensor'; did you mean 'safetensors'"):
        save_checkpoint(random_values(), tmp_path / "a", "safetensor")
    assert os.listdir(tmp_path) == []
