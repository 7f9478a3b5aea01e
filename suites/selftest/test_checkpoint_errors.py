"""Files and folders that are no RWKV-4 checkpoint: one line each, with what to do."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.checkpoint import load_checkpoint
from reference.config import Config
from reference.errors import CheckpointError
from reference.hf_folder import hf_name
from suites.selftest.checkpoint_files import (
    arrays,
    hf_folder,
    random_values,
    refusal,
    safetensors_bytes,
)

# --- files that are something else


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK", "only 2 bytes"),
        (b"hello, this is a text file\n", "not a checkpoint, but text"),
        (b"\x00\x01\x02\x03" * 9, r"it starts with 0001020300010203"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG image"),
        (b"\n<!DOCTYPE html><html><body>Sign in", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer, .* run git lfs pull"),
        (struct.pack("<6I", 0x67676D66, 101, 50277, 768, 12, 0), "has 0 of 12 layers; truncated or damaged"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (pickle.dumps({"emb.weight": [1.0]}), "a bare pickle"),
        (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
        (b"\x1f\x8b" + bytes(40), "gzip-compressed"),
    ],
)
def test_a_file_that_is_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pth")
    refusal(tmp_path / "model.pth")


def test_the_description_of_a_folder_is_not_the_folder(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", '{"model_type": "rwkv"}')
    assert "give the folder it lies in" in refusal(tmp_path / "hf" / "config.json")


def test_paths_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "RWKV-4-169m.pth").write_text("x")
    assert f"did you mean {tmp_path / 'RWKV-4-169m.pth'}?" in refusal(tmp_path / "RWKV-4-169M.pth")
    assert refusal(tmp_path / "zzz.pth").endswith(f"does not exist in {tmp_path}")
    assert f"nor does its folder {tmp_path / 'no'}" in refusal(tmp_path / "no" / "a.pth")
    assert "cannot be read (Not a directory)" in refusal(tmp_path / "RWKV-4-169m.pth" / "a.pth")
    assert "cannot be read (File name too long)" in refusal(tmp_path / ("x" * 5000))
    with pytest.raises(CheckpointError, match="not a usable path"):
        load_checkpoint("a\0b.pth")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # the tests may run as root, who may read anything
    assert "permission denied" in refusal(tmp_path / "RWKV-4-169m.pth")


# --- tensors that are not RWKV-4's


def _with(change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, np.ndarray]:
    values = arrays(random_values())
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ffn.key.weight"), r"tensor blocks\.1\.ffn\.key\.weight is missing"),
        (lambda t: t.pop("emb.weight"), r"tensor emb\.weight is missing"),
        (lambda t: t.pop("head.weight"), r"tensor head\.weight is missing"),
        (lambda t: t.update({"lora.a": np.zeros(3, "f")}), r"1 tensor\(s\) RWKV-4 does not have, first lora\.a"),
        (
            lambda t: t.update({"ln_out.bias": np.zeros(3, "f")}),
            r"tensor ln_out\.bias has shape \(3,\); .* needs \(4,\)",
        ),
        (lambda t: t.update({"emb.weight": np.zeros(3, "f")}), r"tensor emb\.weight has shape \(3,\); a matrix"),
        (lambda t: t.update({"emb.weight": np.zeros((10, 0), "f")}), r"n_embd is 0"),
        (lambda t: t.update({"blocks.0.att.ln_x.weight": np.zeros(4, "f")}), r"an RWKV-5 checkpoint"),
        (lambda t: t.update({"blocks.0.att.time_maa_x": np.zeros(4, "f")}), r"an RWKV-6 checkpoint"),
        (lambda t: t.update({"blocks.0.att.x_r": np.zeros(4, "f")}), r"an RWKV-7 checkpoint"),
        (lambda t: t.update({"blocks.4000000000.ln1.bias": np.zeros(4, "f")}), r"whose predecessors are missing"),
        (lambda t: t.update({f"blocks.{'9' * 90}.ln1.bias": np.zeros(4, "f")}), r"whose predecessors are missing"),
        (lambda t: t.update({"rwkv.embeddings.weight": np.zeros((10, 4), "f")}), r"two tensors are both emb\.weight"),
        (lambda t: t.update({"a\nb": np.zeros(4, "f")}), r"tensor 'a\\nb' is not one of RWKV-4"),
        (lambda t: t.update({"x" * 500: np.zeros(4, "f")}), r"tensor x{117}\.\.\. is not one of RWKV-4"),
        (lambda t: t.update({"ln_out.bias": np.zeros(4, np.int8)}), r"tensor ln_out\.bias is stored as int8"),
        (lambda t: t.update({"ln_out.bias": np.zeros(4, np.bool_)}), r"tensor ln_out\.bias is stored as bool"),
        (lambda t: t.clear(), r"tensor emb\.weight is missing"),
    ],
)
@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_tensors_that_are_not_rwkv4(format: str, change: Any, message: str, tmp_path: Path) -> None:
    values = _with(change)
    path = tmp_path / f"a.{format}"
    if format == "pth":
        torch = pytest.importorskip("torch", reason="writes the .pth with torch.save")
        torch.save({name: torch.from_numpy(value) for name, value in values.items()}, path)
    else:
        from safetensors.numpy import save_file

        save_file(values, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    refusal(path)


# --- .safetensors


def _one(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> bytes:
    return json.dumps({"emb.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}).encode()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{]", b"", "header is not valid JSON"),
        (b"{" + b"\xff" * 9, b"", "header is not valid JSON"),
        (b'{"a":' * 100_000, b"", "header is not valid JSON"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", b"", "malformed|not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "key a appears twice"),
        (b'{"__metadata__": {"a": 1}}', b"", "__metadata__ is not a map of strings"),
        (b'{"emb.weight": 3}', b"", "tensor emb.weight has a malformed safetensors entry"),
        (_one(shape=(-1,)), bytes(4), "malformed safetensors entry"),
        (_one(shape=(1.0,)), bytes(4), "malformed safetensors entry"),
        (_one(shape=(True,)), bytes(4), "malformed safetensors entry"),
        (_one(offsets=(0, 4, 8)), bytes(4), "malformed safetensors entry"),
        (_one(dtype=["F32"]), bytes(4), "malformed safetensors entry"),
        (_one(offsets=(4, 0)), bytes(4), "has -4 bytes, which is not F32 of shape"),
        (_one(shape=(2,)), bytes(4), r"has 4 bytes, which is not F32 of shape \(2,\)"),
        (_one(shape=(1 << 40, 1 << 40), offsets=(0, 1 << 82)), bytes(4), "truncated: its tensors need"),
        (_one(), bytes(3), "truncated: its tensors need 4 bytes and 3 are there"),
        (_one(), bytes(5), "1 bytes follow the last tensor"),
        (_one(offsets=(4, 8)), bytes(8), "leave a gap or overlap at byte 0"),
        (_one(dtype="I8", offsets=(0, 1)), bytes(1), "tensor emb.weight is stored as int8"),
        (_one(dtype="F8_E4M3", offsets=(0, 1)), bytes(1), "tensor emb.weight is stored as float8_e4m3"),
        (_one(dtype="\n"), bytes(4), r"is stored as '\\n'"),
    ],
)
def test_malformed_safetensors(header: bytes, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, data))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.safetensors")
    refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [3, 1 << 20, 99_999_999, 1 << 40, (1 << 64) - 1])
def test_an_announced_length_is_not_believed(length: int, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(_one(), bytes(4), length))
    tracemalloc.start()
    message = refusal(tmp_path / "a.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert "header" in message


# --- Hugging Face folders


def _settings(**changes: Any) -> str:
    known = {"hidden_size": 4, "num_hidden_layers": 2, "vocab_size": 10, "intermediate_size": 8, "rescale_every": 6}
    return json.dumps({"model_type": "rwkv", "layer_norm_epsilon": 1e-5, **known, **changes})


def _hf_bytes(change: Callable[[dict[str, np.ndarray]], Any] = lambda _: None) -> bytes:
    from safetensors.numpy import save

    values = _with(change)
    return save({hf_name(name): value for name, value in values.items()})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "config.json: the file is empty"),
        ("{", "config.json: the file is not valid JSON"),
        ("[]", "config.json: the file is not a JSON object"),
        (_settings(model_type="llama"), "config.json: model_type is llama; only RWKV-4"),
        (_settings(model_type="rwkv5"), "config.json: this is an RWKV-5 model"),
        (_settings(model_type="rwkv7"), "config.json: this is an RWKV-7 model"),
        (_settings(attention_hidden_size=8), "attention_hidden_size 8 is not hidden_size 4"),
        (_settings(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (_settings(rescale_every="six"), "rescale_every is six"),
        (_settings(hidden_size=5), "hidden_size is 5, but the tensors have 4"),
        (_settings(num_hidden_layers=3), "num_hidden_layers is 3, but the tensors have 2"),
        (_settings(vocab_size=11), "vocab_size is 11, but the tensors have 10"),
        (_settings(intermediate_size=9), "intermediate_size is 9, but the tensors have 8"),
        (_settings(tie_word_embeddings=True), "tie_word_embeddings is true, but head.weight is not the embedding"),
    ],
)
def test_a_config_that_is_not_rwkv4_or_disagrees(config: str, message: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", config, {"model.safetensors": _hf_bytes()})
    assert message in refusal(folder)


def test_what_a_config_may_leave_out(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", '{"model_type": "rwkv"}', {"model.safetensors": _hf_bytes()})
    assert load_checkpoint(folder).config == Config(2, 4, 8, 10, rescale_every=6)  # transformers' default
    folder = hf_folder(tmp_path / "never", _settings(rescale_every=-1), {"model.safetensors": _hf_bytes()})
    assert load_checkpoint(folder).config.rescale_every == 0
    without_head = _hf_bytes(lambda tensors: tensors.pop("head.weight"))
    folder = hf_folder(tmp_path / "untied", _settings(), {"model.safetensors": without_head})
    assert "tensor head.weight is missing" in refusal(folder)
    folder = hf_folder(tmp_path / "tied", _settings(tie_word_embeddings=True), {"model.safetensors": without_head})
    assert load_checkpoint(folder)["head.weight"].shape == (10, 4)


def test_folders_that_are_not_hugging_faces(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("a folder without config.json, so not a Hugging Face model")
    (tmp_path / "model.pth").write_text("")
    assert refusal(tmp_path).endswith(f"; did you mean {tmp_path / 'model.pth'}?")
    (tmp_path / "ndarray-cache.json").write_text("{}")
    assert "looks like an MLC params folder, which is not read yet" in refusal(tmp_path)
    assert "has config.json but no weights" in refusal(hf_folder(tmp_path / "hf", _settings()))


def _sharded(path: Path, weight_map: Any, **shards: bytes) -> Path:
    index = json.dumps({"weight_map": weight_map}).encode()
    return hf_folder(path, _settings(), {"model.safetensors.index.json": index, **shards})


def test_damaged_shards(tmp_path: Path) -> None:
    from safetensors.numpy import save

    values = {hf_name(name): value for name, value in arrays(random_values()).items()}
    names = list(values)
    first, second = names[:20], names[20:]
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = {one: save({n: values[n] for n in first}), two: save({n: values[n] for n in second})}
    weight_map = {**dict.fromkeys(first, one), **dict.fromkeys(second, two)}

    whole = _sharded(tmp_path / "whole", weight_map, **shards)
    assert len(load_checkpoint(whole)) == len(names)
    assert "this is one shard of several: give the folder" in refusal(whole / one)

    assert f"1 of 2 shards are missing, first {two}" in refusal(
        _sharded(tmp_path / "a", weight_map, **{one: shards[one]})
    )
    half = _sharded(tmp_path / "b", weight_map, **{**shards, two: shards[two][:-8]})
    assert f"{half / two}: truncated" in refusal(half)
    empty = _sharded(tmp_path / "c", weight_map, **{**shards, two: b""})
    assert f"{empty / two}: the file is empty" in refusal(empty)
    twice = _sharded(tmp_path / "d", weight_map, **{one: shards[one], two: shards[one]})
    assert "is in an earlier shard as well" in refusal(twice)
    other = save({n: values[n] for n in second[1:]})
    absent = _sharded(tmp_path / "e", weight_map, **{one: shards[one], two: other})
    assert f"tensor {second[0]} is missing from {two}" in refusal(absent)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a\\b", "C:x", "", 7, "a\n"])
def test_an_index_cannot_point_outside_its_folder(shard: Any, tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "hf", {"rwkv.embeddings.weight": shard})
    assert "is not the name of a file in this folder" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(weight_map: Any, tmp_path: Path) -> None:
    assert "has no weight_map" in refusal(_sharded(tmp_path / "hf", weight_map))
