"""faster-rwkv's ``.fr``: its bytes, what comes back of it, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config, is_matrix
from reference.errors import CheckpointError, ConfigError, NonFiniteWeights
from reference.forward import LN_EPS, forward
from reference.fr_embedding import EMB, LN0_BIAS, LN0_WEIGHT
from reference.ggml_file import decay_back, decay_to_file
from reference.lost import lost
from reference.msgpack_spans import MsgpackError, Span, pack, parse
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.checkpoint_files import SMALL, arrays, random_values, refusal

WIDE = Config(n_layer=8, n_embd=32, n_ffn=64, n_vocab=100)
FOLDED = (EMB, LN0_WEIGHT, LN0_BIAS)


# --- an independent writer of what faster-rwkv's converter writes, by the specification of msgpack


def packed(value: Any) -> bytes:
    """Msgpack in the shortest form, as the msgpack package writes it."""
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xd9" + bytes([len(data)])) + data
    if isinstance(value, bytes):
        heads = (
            b"\xc4" + struct.pack(">B", len(value)) if len(value) < 256 else b"\xc5" + struct.pack(">H", len(value)),
        )
        return (heads[0] if len(value) < 65536 else b"\xc6" + struct.pack(">I", len(value))) + value
    if isinstance(value, int):
        return (
            bytes([value])
            if value < 128
            else (b"\xcc%c" % value if value < 256 else b"\xcd" + struct.pack(">H", value))
        )
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
        return head + b"".join(packed(key) + packed(item) for key, item in value.items())
    head = bytes([0x90 | len(value)]) if len(value) < 16 else b"\xdc" + struct.pack(">H", len(value))
    return head + b"".join(packed(item) for item in value)


def tensor(array: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    return {"dtype": dtype or f"torch.{array.dtype}", "data": array.tobytes(), "shape": list(array.shape)}


def content(weights: Weights, kind: Any = np.float32) -> dict[str, Any]:
    """The map of a file, made by hand: matrices transposed, ln0 applied, output and ffn.value rescaled in fp16."""
    w = {name: t.array(np.float64) for name, t in weights.items()}
    x = w[EMB] - w[EMB].mean(axis=1, keepdims=True)
    normal = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + LN_EPS) * w[LN0_WEIGHT] + w[LN0_BIAS]
    kept: dict[str, Any] = {}
    for name, value in w.items():
        if name in FOLDED:
            continue
        if name.endswith("time_decay"):
            kept[name] = tensor((-np.exp(value)).astype(np.float32))
        elif name.endswith("time_first"):
            kept[name] = tensor(value.astype(np.float32))
        elif value.ndim == 2:
            rescaled = kind is np.float16 and name.endswith(("att.output.weight", "ffn.value.weight"))
            kept[name] = tensor((value / (2 ** (int(name.split(".")[1]) // 6) if rescaled else 1)).astype(kind).T)
        else:
            kept[name] = tensor(value.astype(kind))
    c = weights.config
    sizes = {"n_layer": c.n_layer, "n_embd": c.n_embd, "n_att": c.n_embd, "n_ffn": c.n_ffn}
    return {"embd_weights": [tensor(row) for row in normal.astype(kind)], "weights": kept, "version": "4", **sizes}


def read_back(weights: Weights, folder: Path, scheme: str | None) -> Weights:
    save_checkpoint(weights, folder / "a.fr", "fr", scheme)
    return load_checkpoint(folder / "a.fr")


# --- layout and round trips


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_the_bytes_are_those_of_faster_rwkvs_converter(scheme: str, tmp_path: Path) -> None:
    weights = random_values(WIDE)
    save_checkpoint(weights, tmp_path / "a.fr", "fr", scheme)
    expected = packed(content(weights, {"fp32": np.float32, "fp16": np.float16}[scheme]))
    assert (tmp_path / "a.fr").read_bytes() == expected


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_all_but_the_folded_tensors_come_back(scheme: str, tmp_path: Path) -> None:
    weights = random_values(WIDE, "f16")
    read = read_back(weights, tmp_path, scheme)
    assert read.config == WIDE
    assert read.metadata == {"fr_dtype": {"fp32": "torch.float32", "fp16": "torch.float16"}[scheme]}
    for name in weights:
        expected = weights[name]
        if name.endswith("time_decay"):
            expected = decay_back(decay_to_file(name, expected))
        if name not in FOLDED:
            assert np.array_equal(read[name].array(), expected.array()), name  # normal fp16 weights halve exactly


def test_rescaled_weights_lose_what_becomes_subnormal_and_no_more(tmp_path: Path) -> None:
    values = arrays(random_values(WIDE))
    values["blocks.7.att.output.weight"][0, :3] = [2.0**-14, 3 * 2.0**-24, 1.0]
    read = read_back(Weights.of(WIDE, values), tmp_path, "fp16")
    assert read["blocks.7.att.output.weight"].rows(0)[:3].tolist() == [2.0**-14, 4 * 2.0**-24, 1.0]
    told = lost(random_values(WIDE), "fr", "fp16")
    assert any("become subnormal, low bits are lost" in line for line in told)
    assert not any("subnormal" in line for line in lost(random_values(WIDE), "fr", "fp32"))


def normalised(weights: Weights) -> np.ndarray:
    x = weights[EMB].array(np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + LN_EPS)
    return np.asarray(x * weights[LN0_WEIGHT].array(np.float64) + weights[LN0_BIAS].array(np.float64))


@settings(max_examples=30, deadline=None)
@given(
    n_vocab=st.integers(1, 90),
    n_embd=st.integers(3, 40),
    seed=st.integers(0, 1 << 32),
    scheme=st.sampled_from(["fp32", "fp16"]),
    size=st.sampled_from([1e-4, 0.1, 1.0, 30.0]),
)
def test_the_embedding_found_gives_what_the_file_holds(
    n_vocab: int, n_embd: int, seed: int, scheme: str, size: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where there are fewer tokens than channels, and where eps of 1e-5 outweighs the embedding."""
    weights = synthetic(Config(1, n_embd, 4, n_vocab), seed)
    weights = weights.map(lambda name, t: Tensor.of((t.array() * size).astype("f")) if name == EMB else t)
    read = read_back(weights, tmp_path_factory.mktemp("fold"), scheme)
    expected = normalised(weights)
    off = np.abs(normalised(read) - expected)
    assert np.all(off <= {"fp32": 1e-5, "fp16": 2.5e-3}[scheme] * np.abs(expected).max())
    some = [n_vocab - 1, 0]
    assert np.array_equal(read[EMB].rows(some), read[EMB].array()[some])


def test_logits_of_what_is_read_are_those_of_what_was_written(tmp_path: Path) -> None:
    weights = synthetic(WIDE, 3)
    tokens = list(range(20))
    truth, state = forward(weights, tokens, dtype=np.float64)
    for scheme, bound in (("fp32", 1e-6), ("fp16", 2e-3)):
        read = read_back(weights, tmp_path, scheme)
        logits, other = forward(read, tokens, dtype=np.float64)
        assert np.linalg.norm(logits - truth) <= bound * np.linalg.norm(truth)
        assert np.allclose(other[:, :4], state[:, :4], rtol=bound * 20, atol=bound * 5)


def test_a_channel_that_ln0_holds_constant(tmp_path: Path) -> None:
    values = arrays(synthetic(WIDE).in_memory())
    values[LN0_WEIGHT][[3, 9]] = 0
    weights = Weights.of(WIDE, values)
    read = read_back(weights, tmp_path, "fp32")
    assert (read[LN0_WEIGHT].array() == 0).nonzero()[0].tolist() == [3, 9]
    assert np.abs(normalised(read) - normalised(weights)).max() < 1e-5


def test_without_a_scheme_the_type_of_the_matrices_decides(tmp_path: Path) -> None:
    for stored, dtype in (("f16", "torch.float16"), ("f32", "torch.float32"), ("f64", "torch.float32")):
        assert read_back(random_values(SMALL, stored), tmp_path, None).metadata["fr_dtype"] == dtype
    with pytest.raises(ConfigError, match=r"no checkpoint scheme .bf16.; .*choose from fp32, fp16"):
        save_checkpoint(random_values(), tmp_path / "b.fr", "fr", "bf16")


def test_nan_in_the_embedding_stays_with_its_token(tmp_path: Path) -> None:
    values = arrays(synthetic(WIDE).in_memory())
    values[EMB][5, 1] = np.nan
    with pytest.warns(NonFiniteWeights, match=r"NaN or Inf in emb\.weight$"):
        read = read_back(Weights.of(WIDE, values), tmp_path, "fp32")
    bad = np.isnan(read[EMB].array()).any(axis=1)
    assert bad.nonzero()[0].tolist() == [5]


# --- refusals


def changed(**changes: Any) -> dict[str, Any]:
    return {**content(random_values()), **changes}


def with_weight(name: str, value: Any) -> dict[str, Any]:
    found = content(random_values())
    return {**found, "weights": {**found["weights"], name: value}}


ROW = tensor(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (changed(version="5.1"), "of RWKV version 5.1; only RWKV-4"),
        (changed(weights=[]), "has no map called weights"),
        (changed(n_layer=3), "n_layer is 3, but the tensors have 2"),
        (changed(n_embd=5), "n_embd is 5, but the tensors have 4"),
        (changed(n_ffn=9), "n_ffn is 9, but the tensors have 8"),
        (changed(embd_weights=[]), "has no list called embd_weights"),
        (changed(embd_weights=[ROW, tensor(np.zeros(5, np.float32))]), "embd_weights are not all alike"),
        (changed(embd_weights=[ROW, tensor(np.zeros(4, np.float16))]), "embd_weights are not all alike"),
        (changed(embd_weights=[ROW, {"x": 1, **ROW}, ROW]), "embd_weights are not all alike"),
        (changed(embd_weights=[tensor(np.zeros((2, 2), np.float32))]), "hold shape .2, 2.; one row per token"),
        (changed(embd_weights=[7]), r"tensor embd_weights\[0\] is malformed"),
        (with_weight("head.weight", {"dtype": "torch.float32"}), r"tensor head\.weight is malformed"),
        (with_weight("head.weight", {**ROW, "shape": "4"}), r"tensor head\.weight is malformed"),
        (with_weight("head.weight", {**ROW, "shape": [5]}), r"head\.weight has 16 bytes, which is not torch\.float32"),
        (with_weight("head.weight", {**ROW, "dtype": "torch.int8"}), r"head\.weight is stored as torch\.int8"),
        (with_weight("head.weight", ROW), r"tensor head\.weight has shape \(4,\)"),
        (with_weight("emb.weight", ROW), r"tensor emb\.weight lies beside the normalised embedding"),
        (with_weight("blocks.0.att.key.weight_rx", ROW), "1 tensor.s. RWKV-4 does not have"),
    ],
)
def test_malformed_files(found: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.fr").write_bytes(packed(found))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.fr")
    refusal(tmp_path / "a.fr")


def test_an_embedding_that_no_layer_norm_gives_is_refused(tmp_path: Path) -> None:
    found = content(random_values(WIDE))
    rows = np.random.default_rng(0).standard_normal((100, 32)).astype(np.float32)
    (tmp_path / "a.fr").write_bytes(packed({**found, "embd_weights": [tensor(row) for row in rows]}))
    assert "its embedding is not the output of a LayerNorm" in refusal(tmp_path / "a.fr")


def test_bytes_after_the_map_are_damage(tmp_path: Path) -> None:
    (tmp_path / "a.fr").write_bytes(packed(content(random_values())) + b"\0")
    assert "1 bytes follow its msgpack map" in refusal(tmp_path / "a.fr")


# --- msgpack


@given(
    st.recursive(st.integers(0, 2**32 - 1) | st.text(max_size=300), lambda x: st.lists(x, max_size=20), max_leaves=30)
)
def test_msgpack_of_ours_reads_as_it_was(value: Any) -> None:
    data = pack(value)
    assert parse(data, 0, len(data)) == (value, len(data))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\xc0", None),
        (b"\xc3", True),
        (b"\xff", -1),
        (b"\xd1\xff\x00", -256),
        (b"\xcb\x3f\xf8" + bytes(6), 1.5),
        (b"\xc4\x02ab", Span(2, 2)),
        (b"\xdf\0\0\0\1\xd9\1a\xdc\0\1\5", {"a": [5]}),
    ],
)
def test_msgpack_forms_that_others_write(data: bytes, value: Any) -> None:
    assert parse(data, 0, len(data)) == (value, len(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\xc1", "byte 0xc1 at 0 begins nothing"),
        (b"\xc7\1\1\1", "byte 0xc7 at 0"),
        (b"\xc6\xff\xff\xff\xff", "ends inside a binary of 4294967295 bytes"),
        (b"\xdd\xff\xff\xff\xff", "ends inside 4294967295 elements"),
        (b"\xa5abc", "ends at byte 4"),
        (b"\x82\xa1a\1\xa1a\2", "key at byte 4 is no string or appears twice"),
        (b"\x81\1\1", "key at byte 1 is no string"),
        (b"\x91" * 50 + b"\0", "nested too deeply"),
    ],
)
def test_msgpack_that_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(MsgpackError, match=message):
        parse(data, 0, len(data))


def test_matrices_are_transposed_views(tmp_path: Path) -> None:
    read = read_back(random_values(), tmp_path, "fp32")
    for name in read:
        if is_matrix(name) and name != EMB:
            assert not read[name].read().flags.owndata
            assert np.array_equal(read[name].rows([1, 0]), random_values()[name].rows([1, 0]))
