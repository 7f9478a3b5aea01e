"""rwkv.cpp's ``.bin``: written and read back, against its specification and real files' properties."""

from __future__ import annotations

import os
import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.codecs_ggml import Q5_1
from reference.config import Config, is_matrix, tensor_shapes
from reference.errors import CheckpointError, ConfigError, NonFiniteWeights
from reference.ggml_file import SCHEMES, decay_back, decay_to_file
from reference.lost import lost
from reference.packed_tensor import PackedTensor
from reference.schemes import apply
from reference.weights import Tensor, Weights
from suites.selftest.checkpoint_files import arrays, random_bits, random_values, refusal

BLOCKS = Config(n_layer=2, n_embd=32, n_ffn=64, n_vocab=40)
NEW = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def parsed(data: bytes) -> tuple[tuple[int, ...], dict[str, tuple[int, tuple[int, ...], bytes]]]:
    """Header, and name -> type, dimensions and bytes, by the text of rwkv.cpp's docs/FILE_FORMAT.md."""
    header, at, found = struct.unpack_from("<6I", data), 24, {}
    block = {2: 18, 3: 20, 7: 22, 8: 24, 9: 34} if header[1] == 101 else {2: 20, 3: 24, 4: 24, 5: 20, 6: 24}
    while at < len(data):
        n_dims, n_name, kind = struct.unpack_from("<3I", data, at)
        dims = struct.unpack_from(f"<{n_dims}I", data, at + 12)
        at += 12 + 4 * n_dims
        name, n = data[at : at + n_name].decode(), int(np.prod(dims))
        size = {0: 4 * n, 1: 2 * n}.get(kind) or n // 32 * block[kind]
        found[name] = (kind, dims, data[at + n_name : at + n_name + size])
        at += n_name + size
    assert at == len(data)
    return tuple(header), found


def written(weights: Weights, folder: Path, scheme: str | None) -> tuple[Weights, bytes]:
    path = folder / f"{os.urandom(6).hex()}.bin"
    save_checkpoint(weights, path, "ggml", scheme)
    return load_checkpoint(path, scan=False), path.read_bytes()


def stored_bytes(tensor: Tensor) -> bytes:
    return tensor.read().tobytes()


# --- layout


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    weights = random_values(BLOCKS)
    kinds = {"FP32": (100, 0), "FP16": (100, 1), "Q4_0": (101, 2), "Q4_1": (101, 3), "Q5_0": (101, 7), "Q5_1": (101, 8)}
    kinds |= {"Q8_0": (101, 9), "Q4_0_v100": (100, 2), "Q4_1_v100": (100, 3), "Q4_1_O": (100, 4)}
    kinds |= {"Q4_2": (100, 5), "Q4_3": (100, 6)}
    assert set(kinds) == set(SCHEMES)
    for scheme, (version, kind) in kinds.items():
        header, found = parsed(written(weights, tmp_path, scheme)[1])
        assert header == (0x67676D66, version, 40, 32, 2, kind)
        assert list(found) == list(tensor_shapes(BLOCKS))
        for name, (tensor_kind, dims, data) in found.items():
            assert dims == tuple(reversed(weights[name].shape))
            x = weights[name].array()
            if name.endswith("time_decay"):
                assert (tensor_kind, data) == (0, (-np.exp(x.astype(np.float64))).astype(np.float32).tobytes())
            elif not is_matrix(name) or scheme == "FP32" or (kind > 1 and name in ("emb.weight", "head.weight")):
                assert (tensor_kind, data) == (0, x.tobytes())
            elif scheme == "FP16":
                assert (tensor_kind, data) == (1, x.astype(np.float16).tobytes())
            else:
                assert tensor_kind == kind


@pytest.mark.parametrize("scheme", NEW)
def test_quantized_bytes_are_those_of_gguf(scheme: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of ggml's formats; pip install gguf")
    weights = random_values(BLOCKS)
    _, found = parsed(written(weights, tmp_path, scheme)[1])
    kind = gguf.GGMLQuantizationType[scheme]
    read = load_checkpoint(next(tmp_path.glob("*.bin")))
    for name, (_, _, data) in found.items():
        if is_matrix(name) and name not in ("emb.weight", "head.weight"):
            expected = gguf.quants.quantize(weights[name].array(), kind)
            assert data == expected.tobytes()
            assert np.array_equal(read[name].array(), gguf.quants.dequantize(expected, kind))


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
def test_embedding_and_head_stay_in_the_source_type(stored: str, tmp_path: Path) -> None:
    weights = random_bits(BLOCKS, [stored], 1) if stored == "bf16" else random_values(BLOCKS, stored)
    read, _ = written(weights, tmp_path, "Q8_0")
    kept = "f16" if stored == "f16" else "f32"
    assert (read["emb.weight"].stored, read["head.weight"].stored) == (kept, kept)
    assert np.array_equal(read["head.weight"].array(), weights["head.weight"].array(), equal_nan=True)


def test_without_a_scheme_matrices_stay_as_they_are(tmp_path: Path) -> None:
    for stored, scheme in (("f16", "FP16"), ("f32", "FP32"), ("bf16", "FP32"), ("f64", "FP32")):
        weights = random_bits(BLOCKS, [stored], 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWeights)
            assert written(weights, tmp_path, None)[0].metadata == {"ggml_version": "100", "ggml_scheme": scheme}
    quantized, data = written(random_values(BLOCKS), tmp_path, "Q4_1")
    again, same_data = written(quantized, tmp_path, None)
    assert again.metadata == {"ggml_version": "101", "ggml_scheme": "Q4_1"}
    assert same_data == data


# --- round trips


CONFIGS = st.builds(
    Config,
    n_layer=st.integers(1, 3),
    n_embd=st.sampled_from([32, 64]),
    n_ffn=st.sampled_from([32, 96]),
    n_vocab=st.integers(1, 20),
)


@pytest.mark.parametrize("scheme", ["FP32", "FP16"])
def test_floats_come_back_bit_by_bit(scheme: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All but ``time_decay``, NaN payloads included; with the reference's sizes, not multiples of 32."""
    folder = tmp_path_factory.mktemp(scheme)

    @settings(max_examples=25, deadline=None)
    @given(n_layer=st.integers(1, 3), n_embd=st.integers(1, 9), n_ffn=st.integers(1, 17), seed=st.integers(0, 1 << 32))
    def check(n_layer: int, n_embd: int, n_ffn: int, seed: int) -> None:
        weights = random_bits(Config(n_layer, n_embd, n_ffn, 5), ["f32"], seed)
        if scheme == "FP16":
            narrow = random_bits(weights.config, ["f16"], seed)
            weights = weights.map(lambda name, tensor: narrow[name] if is_matrix(name) else tensor)
        read, _ = written(weights, folder, scheme)
        for name, tensor in weights.items():
            assert read[name].shape == tensor.shape
            if not name.endswith("time_decay"):
                assert read[name].stored == tensor.stored
                assert stored_bytes(read[name]) == stored_bytes(tensor)
        assert read.config == weights.config

    check()


@pytest.mark.parametrize("scheme", SCHEMES)
@given(config=CONFIGS, seed=st.integers(0, 1 << 32))
@settings(max_examples=10, deadline=None)
def test_a_file_holds_what_apply_says_and_is_itself_when_written_again(
    scheme: str, config: Config, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("twice")
    weights = random_values(config, seed=seed)
    read, data = written(weights, folder, scheme)
    applied = apply(weights, scheme)
    for name in weights:
        expected = applied[name] if not name.endswith("time_decay") else decay_back(decay_to_file(name, weights[name]))
        assert np.array_equal(read[name].array(), expected.array())
    assert written(read, folder, scheme)[1] == data
    assert apply(read, scheme)["blocks.0.att.key.weight"] is read["blocks.0.att.key.weight"] or scheme == "FP32"


def there_and_back(values: np.ndarray) -> np.ndarray:
    return decay_back(decay_to_file("blocks.0.att.time_decay", Tensor.of(values))).array()


@given(st.lists(st.floats(-87, 88, width=32), min_size=1, max_size=64))
def test_time_decay_comes_back_exactly_beyond_1_and_within_2_to_the_minus_24_else(drawn: list[float]) -> None:
    x = np.array(drawn, dtype=np.float32)
    back = there_and_back(x)
    assert np.array_equal(back[np.abs(x) > 1], x[np.abs(x) > 1])
    assert np.all(np.abs(back.astype(np.float64) - x) <= 2.0**-24)
    stored = decay_to_file("time_decay", Tensor.of(x)).array()
    assert np.array_equal(decay_to_file("time_decay", Tensor.of(back)).array(), stored)


def test_time_decay_at_the_ends_of_float32() -> None:
    x = np.array([-200, -104.5, np.nan, np.inf, -np.inf, 100, -90], dtype=np.float32)
    back = there_and_back(x)
    assert np.array_equal(back[:6], np.array([-np.inf, -np.inf, np.nan, np.inf, -np.inf, np.inf]), equal_nan=True)
    assert -91 < back[6] < -89


@pytest.mark.parametrize("stored", ["f16", "bf16"])
def test_time_decay_of_half_precision_comes_back_as_it_was(stored: str, tmp_path: Path) -> None:
    weights = random_values(BLOCKS, "f16")
    if stored == "bf16":
        weights = apply(weights, "bf16")
    read, _ = written(weights, tmp_path, "FP16")
    for name in weights:
        if name.endswith("time_decay"):
            exact = np.abs(weights[name].array()) > 1
            assert exact.any()
            assert np.array_equal(read[name].array()[exact], weights[name].array()[exact])
    back = apply(read, "fp16" if stored == "f16" else "bf16")
    assert all(np.array_equal(back[name].array(), weights[name].array()) for name in back if "decay" in name)


def test_what_is_lost_is_told() -> None:
    exact = random_values(BLOCKS).map(lambda name, t: Tensor.of(np.full(t.shape, -5, "f")) if "decay" in name else t)
    assert lost(exact, "ggml", "FP32") == []
    some = exact.map(lambda name, t: Tensor.of(np.full(t.shape, 0.3, "f")) if name.endswith("1.att.time_decay") else t)
    (line,) = lost(some, "ggml", "Q4_0")
    assert line.startswith("ggml stores -exp(time_decay) in fp32: 32 of 64 decays come back off by up to ")
    assert 0 < float(line.rsplit(" ", 1)[1]) <= 2.0**-24
    assert lost(some, "pth", "fp16") == []
    synthetic = Weights(BLOCKS, exact.tensors, synthetic=True, metadata={"a": "b", "ggml_version": "100"})
    assert lost(synthetic, "ggml") == [
        "ggml has no place for metadata, nor for the mark that the weights are synthetic"
    ]


# --- quantized tensors are read by the row


def test_rows_of_a_quantized_tensor_are_dequantized_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, _ = written(random_values(BLOCKS), tmp_path, "Q5_1")
    tensor = read["blocks.1.ffn.key.weight"]
    assert isinstance(tensor, PackedTensor)
    assert tensor.stored == "f32"
    whole = tensor.array(np.float64)
    monkeypatch.setattr("reference.packed_tensor._BLOCK_ELEMENTS", 100)
    assert np.array_equal(tensor.read(), whole)
    decoded = 0

    def counting(packed: np.ndarray) -> np.ndarray:
        nonlocal decoded
        decoded += packed.size // Q5_1.block_bytes * 32
        return np.asarray(original(packed))

    original = type(Q5_1).dequantize.__get__(Q5_1)
    monkeypatch.setattr(type(Q5_1), "dequantize", lambda _, packed: counting(packed))
    indices: tuple[Any, ...] = (slice(3, 40), slice(50, 2, -7), slice(0, 0), np.array([5, 0, 5]), 7)
    for index in indices:
        decoded = 0
        assert np.array_equal(tensor.rows(index, np.float64), whole[index])
        assert decoded == whole[index].size


def test_opening_a_quantized_file_reads_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    save_checkpoint(random_values(Config(1, 512, 2048, 64)), path, "ggml", "Q4_0")
    tracemalloc.start()
    weights = load_checkpoint(path, scan=False)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert weights["blocks.0.ffn.key.weight"].rows([7]).shape == (1, 512)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_nan_in_a_quantized_block_is_found(tmp_path: Path) -> None:
    values = arrays(random_values(BLOCKS))
    values["blocks.1.ffn.key.weight"][2, 1] = np.nan
    save_checkpoint(Weights.of(BLOCKS, values), tmp_path / "a.bin", "ggml", "Q4_1")
    with pytest.warns(NonFiniteWeights, match=r"NaN or Inf in blocks\.1\.ffn\.key\.weight$"):
        read = load_checkpoint(tmp_path / "a.bin")
    assert read.non_finite == ("blocks.1.ffn.key.weight",)


def test_an_overflowing_conversion_warns(tmp_path: Path) -> None:
    values = arrays(random_values())
    values["blocks.1.att.key.weight"][2, 1] = 1e6
    values["ln_out.weight"][1] = 1e6  # stays float32
    with pytest.warns(NonFiniteWeights, match=r"too large for FP16 became Inf in blocks\.1\.att\.key\.weight$"):
        save_checkpoint(Weights.of(random_values().config, values), tmp_path / "a.bin", "ggml", "FP16")


# --- refusals


def test_unknown_schemes_and_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint scheme 'fp16'; did you mean 'FP16'\? choose from FP32, FP16"):
        save_checkpoint(random_values(), tmp_path / "a.bin", "ggml", "fp16")
    with pytest.raises(ConfigError, match=r"blocks\.0\.att\.key\.weight has rows of 4 weights, .* groups of 32"):
        save_checkpoint(random_values(), tmp_path / "a.bin", "ggml", "Q4_0")
    assert os.listdir(tmp_path) == []


def _entry(name: str = "emb.weight", kind: int = 0, dims: tuple[int, ...] = (4, 10), data: bytes = bytes(160)) -> bytes:
    return struct.pack(f"<3I{len(dims)}I", len(dims), len(name), kind, *dims) + name.encode() + data


def _file(*entries: bytes, version: int = 101, layers: int = 0, kind: int = 0) -> bytes:
    return struct.pack("<6I", 0x67676D66, version, 10, 4, layers, kind) + b"".join(entries)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_file()[:20], "truncated inside its ggml header"),
        (_file(version=99), "rwkv.cpp file of version 99; 100 and 101 are read"),
        (_file(kind=12), r"stored as Q3_K, which has no codec .* give the FP16 or FP32 file or the \.pth"),
        (_file(kind=13), "stored as Q4_K"),
        (_file(kind=14), "stored as Q5_K"),
        (_file(kind=5), r"stored as Q4_2, .* version 101 \(it has FP32, FP16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0\)"),
        (_file(kind=99), "type 99, which rwkv.cpp does not have; damaged"),
        (_file(version=100, kind=7), r"stored as Q5_0, which has no codec here for version 100 .*Q4_1_O, Q4_2, Q4_3\)"),
        (_file(_entry(kind=13, data=b"")), r"tensor emb\.weight is stored as Q4_K"),
        (_file(_entry(kind=3, data=b"")), r"tensor emb\.weight is Q4_1, but the file is FP32; damaged"),
        (_file(_entry(kind=3, data=b""), kind=3), r"emb\.weight of shape \(10, 4\) does not divide into blocks of 32"),
        (_file(_entry(kind=3, dims=(320,)), kind=3), r"of shape \(320,\) does not divide into blocks"),
        (_file(_entry(), b"\1\0"), "truncated at byte 214, inside a tensor's header"),
        (_file(_entry()[:14]), "truncated at byte 36, inside a tensor's header"),
        (_file(_entry(dims=(1,) * 4)), "no tensor of rwkv.cpp at byte 24; damaged"),
        (_file(_entry(name="")), "no tensor of rwkv.cpp at byte 24; damaged"),
        (_file(_entry(name="x" * 300)), "no tensor of rwkv.cpp at byte 24; damaged"),
        (_file(_entry()[:-1]), r"emb\.weight of shape \(10, 4\) is truncated by 1 bytes"),
        (_file(_entry(dims=(0xFFFFFFFF,) * 3)), r"is truncated by \d{20,} bytes"),
        (_file(_entry(), _entry()), r"tensor emb\.weight appears twice"),
        (_file(_entry(dims=(5, 8))), r"emb\.weight has shape \(8, 5\), but the header says \(10, 4\)"),
        (_file(_entry(), layers=3), "has 0 of 3 layers"),
        (_file(_entry(name="a\nb")), r"tensor 'a\\nb' is not one of RWKV-4"),
        (_file(_entry(), _entry("blocks.0.att.ln_x.weight", dims=(4,), data=bytes(16)), layers=1), "RWKV-5 checkpoint"),
    ],
)
def test_malformed_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.bin")
    refusal(tmp_path / "a.bin")
