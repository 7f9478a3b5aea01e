"""The rwkv.cpp backend over both its libraries: gates, files that the library quantized, hazards kept away.

The library of April 2023 runs where ``rwkv-bench setup rwkv.cpp`` was; a newer one where RWKV_CPP_LIBRARY names it.
"""

from __future__ import annotations

import _ctypes
import os
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends import rwkv_cpp as backend
from backends.api import Unavailable, Unsupported
from backends.rwkv_cpp import files, library
from backends.rwkv_cpp.library import APRIL, VARIABLE, Library, open_library
from backends.rwkv_cpp.session import chunk_length
from harness import open_session
from harness.isolation import start
from harness.models import gate_tokens, open_model
from harness.parity import gate
from harness.session import Opened
from harness.tolerance import derive
from reference.config import Config, is_matrix
from reference.schemes import SCHEMES, Packed, apply
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

NEWER = os.environ.get(VARIABLE)
NEWER_SCHEMES = ("FP32", "FP16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
CASES = [*(("april", scheme) for scheme in APRIL.schemes), *(("newer", scheme) for scheme in NEWER_SCHEMES)]
SHAPES = {
    "narrow": Config(n_layer=1, n_embd=32, n_ffn=128, n_vocab=54),
    "three blocks": Config(n_layer=3, n_embd=96, n_ffn=384, n_vocab=101),
}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 54, 40)]


def stored_as(scheme: str, config: Config = SHAPES["three blocks"]) -> Weights:
    """Synthetic weights, every tensor of one stored type."""
    return apply(synthetic(config, 1, 1.5), scheme)


@pytest.fixture
def use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose a library, or skip: ``april``, the environment's; ``newer``, the user's."""
    return choose(request.param, monkeypatch)


def choose(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name == "newer" and not NEWER:
        pytest.skip(f"{VARIABLE} names no newer librwkv")
    if name == "april":
        monkeypatch.delenv(VARIABLE, raising=False)
        try:
            start.environment("rwkv.cpp", backend)
        except Unavailable as missing:
            pytest.skip(str(missing))
    return name


def opened(name: str, model: Any, scheme: str, threads: int = 1) -> AbstractContextManager[Opened]:
    """A newer library needs no environment, so it runs here."""
    return open_session("rwkv.cpp", model, scheme, threads=threads, isolate=False if name == "newer" else None)


@pytest.fixture(params=["april", "newer"])
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Either library in this process."""
    if choose(request.param, monkeypatch) == "april":
        found = start.environment("rwkv.cpp", backend)
        assert found is not None
        (path,) = Path(found.python).parent.parent.glob("lib/python*/site-packages/rwkv_cpp/librwkv.so")
        monkeypatch.setenv(VARIABLE, str(path))
    bound = open_library()
    assert (bound.api is APRIL) == (request.param == "april")
    return bound


# --- parity


@pytest.mark.parametrize(("use", "scheme"), CASES, indirect=["use"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(use: str, scheme: str, shape: str) -> None:
    weights = stored_as("fp16", SHAPES[shape])
    with opened(use, weights, scheme) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, TOKENS))
        assert checked.state
        assert checked.passed, str(checked.first_bad)
        assert not checked.loose
        assert found.version == (library.PACKAGE if use == "april" else backend.version())


@pytest.mark.parametrize(("use", "scheme"), CASES, indirect=["use"])
def test_gate_of_the_embedded_model(use: str, scheme: str) -> None:
    model = open_model("tiny")
    with opened(use, model, scheme) as found:
        truth = derive(model.weights, scheme, found.arithmetic, gate_tokens(model, 48), model.sha256)
        checked = gate(found.session, truth)
        assert checked.passed, str(checked.first_bad)


@pytest.mark.parametrize("use", ["april", "newer"], indirect=True)
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_gate_of_the_first_packed_scheme_from_other_types(use: str, stored: str) -> None:
    scheme = "Q4_0_v100" if use == "april" else "Q4_0"
    weights = stored_as(stored)
    with opened(use, weights, scheme) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, TOKENS))
        assert checked.passed, str(checked.first_bad)


@pytest.mark.parametrize("use", ["april", "newer"], indirect=True)
def test_threads_change_nothing(use: str) -> None:
    """Each row is summed by one thread. Few tokens, since the threads of April 2023 spin where cores are busy."""
    logits = []
    for threads in (1, 2):
        with opened(use, stored_as("fp16", SHAPES["narrow"]), "FP32", threads) as found:
            logits.append(found.session.forward(TOKENS[:4], None)[0])
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("use", ["newer"], indirect=True)
@pytest.mark.parametrize("scheme", ["Q4_K", "Q5_K"])
def test_a_scheme_without_codec_runs(use: str, scheme: str) -> None:
    config = Config(n_layer=1, n_embd=256, n_ffn=512, n_vocab=54)
    weights = synthetic(config, 2)
    with opened(use, weights, scheme) as found, opened(use, weights, "FP32") as exact:
        logits, truth = found.session.forward(TOKENS, None)[0], exact.session.forward(TOKENS, None)[0]
    assert np.isfinite(logits).all()
    assert 0 < np.abs(logits - truth).max() < 0.5 * np.abs(truth).max()


# --- what the library's own quantized file holds

_KINDS = {0: "<f4", 1: "<f2"}


def packing_of(scheme: str) -> Any:
    """The codec of a scheme's packed matrices."""
    codec = SCHEMES[scheme].codec
    assert codec is not None
    assert isinstance(codec.matrices, Packed)
    return codec.matrices.packing


def file_tensors(path: Path, packing: Any) -> dict[str, tuple[int, np.ndarray]]:
    """Name -> type and content of every tensor of a rwkv.cpp file: floats, or bytes of what ``packing`` packs."""
    data, at, found = path.read_bytes(), 24, {}
    while at < len(data):
        n_dims, size, kind = struct.unpack_from("<3I", data, at)
        shape = struct.unpack_from(f"<{n_dims}I", data, at + 12)
        name = data[at + 12 + 4 * n_dims :][:size].decode()
        at += 12 + 4 * n_dims + size
        dtype = np.dtype(_KINDS.get(kind, np.uint8))
        n_bytes = dtype.itemsize * int(np.prod(shape)) if kind in _KINDS else packing.packed_bytes(shape)
        found[name] = kind, np.frombuffer(data, dtype, n_bytes // dtype.itemsize, at)
        at += n_bytes
    return found


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("stored", ["fp16", "fp32", "bf16"])
def test_the_library_s_file_is_our_codec_s_byte_by_byte(loaded: Library, own_cache: Path, stored: str) -> None:
    weights = stored_as(stored)
    packed = [scheme for scheme in loaded.schemes if SCHEMES[scheme].codec and scheme not in ("FP32", "FP16")]
    assert packed
    for scheme in packed:
        packing, truth = packing_of(scheme), apply(weights, scheme)
        held = file_tensors(files.model_file(loaded, weights, scheme), packing)
        for name in filter(is_matrix, weights):
            kind, values = held[name]
            if name in ("emb.weight", "head.weight"):
                assert kind == (1 if stored == "fp16" else 0)
                assert np.array_equal(values.astype(np.float32), truth[name].array().reshape(-1))
                assert truth[name].stored == ("f16" if stored == "fp16" else "f32")
            else:
                assert kind == packing.file_type
                assert np.array_equal(values, packing.quantize(weights[name].array()).reshape(-1)), (scheme, name)


# --- hazards


def zero_block(weights: Weights) -> Weights:
    def change(name: str, tensor: Tensor) -> Tensor:
        if name != "blocks.0.att.key.weight":
            return tensor
        w = np.array(tensor.array())
        w[3, 32:64] = 0
        return Tensor.of(w)

    return weights.map(change)


def test_a_block_of_zeros_is_kept_from_q4_1_o(own_cache: Path) -> None:
    """The library's product writes beyond its stack for it, and dies."""

    def quantize(source: Path, target: Path, scheme: str) -> None:
        target.touch()

    found = SimpleNamespace(digest=lambda: "0")
    stub: Any = SimpleNamespace(api=APRIL, found=found, quantize=quantize)
    weights = stored_as("fp32")
    assert files.model_file(stub, weights, "Q4_1_O").exists()
    with pytest.raises(Unsupported, match=r"crashes on Q4_1_O where 32 weights .* in blocks.0.att.key.weight"):
        files.model_file(stub, zero_block(weights), "Q4_1_O")
    assert files.model_file(stub, zero_block(weights), "Q4_0_v100").exists()


def test_chunks_stay_within_the_pool_at_any_depth() -> None:
    """A chunk's graph takes some 61 + 31 a token of the pool's 80,000 tensors per layer; one token takes a step."""
    for n_layer in range(1, 2000):
        chunk = chunk_length(n_layer)
        assert 1 <= chunk <= 64
        assert chunk == 1 or n_layer * (61 + 31 * chunk) <= 60_000
    assert [chunk_length(n) for n in (12, 24, 32, 40)] == [64, 64, 58, 46]


@pytest.mark.parametrize("use", ["newer"], indirect=True)
@pytest.mark.parametrize("n_layer", [12, 40, 100])
def test_a_long_prompt_is_its_tokens_one_by_one(use: str, n_layer: int) -> None:
    weights = synthetic(Config(n_layer=n_layer, n_embd=32, n_ffn=32, n_vocab=54), 3)
    prompt = (TOKENS * 7)[:250]
    with opened(use, weights, "FP32") as found:
        whole, end = found.session.forward(prompt, None)
        logits, state = found.session.forward(prompt[:1], None)
        for token in prompt[1:]:
            logits, state = found.session.forward([token], state)
    assert np.array_equal(whole, logits)
    assert np.array_equal(end, state)


def test_a_model_too_deep_for_april_is_refused(loaded: Library) -> None:
    weights = synthetic(Config(n_layer=60, n_embd=32, n_ffn=32, n_vocab=54), 3)
    if loaded.api is APRIL:
        with pytest.raises(Unsupported, match=r"graph of 60 layers is too large for this rwkv.cpp, which takes 59"):
            backend.load(weights, "FP32", "cpu", 1)
    else:
        assert np.isfinite(backend.load(weights, "FP32", "cpu", 1).forward(TOKENS, None)[0]).all()


def test_fresh_starts_take_no_memory(loaded: Library) -> None:
    """April's library runs out of its pool after some 100,000 NULL states; here it never sees one."""
    weights = synthetic(Config(n_layer=59, n_embd=32, n_ffn=32, n_vocab=54), 3)
    session: Any = backend.load(weights, "FP32", "cpu", 1)
    seen: list[Any] = []
    step = loaded.step

    def watched(context: int, token: int, past: np.ndarray, new: np.ndarray, logits: np.ndarray) -> None:
        seen.append(past)
        step(context, token, past, new, logits)

    session._library.step = watched
    session.forward([1], None)
    session.forward([1], None)
    assert len(seen) == 2
    assert all(isinstance(past, np.ndarray) for past in seen)


# --- what cannot be had


@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_the_other_library_s_scheme_is_refused_by_name(loaded: Library, scheme: str) -> None:
    weights = synthetic(Config(n_layer=1, n_embd=256, n_ffn=256, n_vocab=54), 2)
    if scheme in loaded.schemes:
        assert np.isfinite(backend.load(weights, scheme, "cpu", 1).forward([1], None)[0]).all()
        return
    where = "is newer than rwkv-cpp-python 0.0.1; name" if loaded.api is APRIL else "rwkv-cpp-python 0.0.1 has it"
    with pytest.raises(Unsupported, match=f"^{scheme} .*{where}"):
        backend.load(weights, scheme, "cpu", 1)


def test_what_it_does_not_do_is_refused(loaded: Library, tmp_path: Path) -> None:
    narrow = synthetic(Config(n_layer=1, n_embd=24, n_ffn=96, n_vocab=54), 2)
    scheme = loaded.schemes[2]
    with pytest.raises(Unsupported, match=f"^{scheme} packs blocks of 32 weights, which do not divide rows of 24"):
        backend.load(narrow, scheme, "cpu", 1)
    with pytest.raises(Unsupported, match="at least one thread; 0 were asked for"):
        backend.load(narrow, "FP32", "cpu", 0)
    with pytest.raises(Unsupported, match="runs on cpu here, not on 'cuda'"):
        backend.load(narrow, "FP32", "cuda", 1)
    with pytest.raises(Unsupported, match="no scheme 'Q8_1'"):
        backend.load(narrow, "Q8_1", "cpu", 1)
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"fmgg" + struct.pack("<5I", 7, 1, 1, 1, 0))
    with pytest.raises(Unsupported, match=r"does not load .*bad\.bin: Unsupported file version 7$"):
        loaded.open(bad, 1)
    with pytest.raises(Unsupported, match=r"does not quantize .*: Unsupported file version 7$"):
        loaded.quantize(bad, tmp_path / "out.bin", scheme)


def test_quantizing_leaves_stdout_alone(loaded: Library, own_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files.model_file(loaded, stored_as("fp16"), loaded.schemes[2])
    assert capfd.readouterr() == ("", "")


def test_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path, reason in (
        ("librwkv.so", "is not an absolute path"),
        (str(tmp_path / "librwkv.so"), "is no such file"),
        (__file__, "cannot be loaded"),
        (_ctypes.__file__, "is not rwkv.cpp: it lacks rwkv_init_from_file"),
    ):
        monkeypatch.setenv(VARIABLE, path)
        with pytest.raises(Unavailable, match=reason):
            open_library()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=f"rwkv-bench setup rwkv.cpp, or set {VARIABLE}"):
        backend.check()


def test_the_api_is_told_by_its_symbols() -> None:
    path, names = Path("librwkv.so"), ["rwkv_init_from_file"]

    def api(*more: str) -> Any:
        handle: Any = SimpleNamespace(**dict.fromkeys([*names, *more]))
        return library._api(handle, path)

    assert api("ggml_quantize_q4_1_o") is APRIL
    with pytest.raises(Unavailable, match="before 24 May 2023"):
        api()
    june = api("rwkv_get_last_error", "rwkv_gpu_offload_layers", "rwkv_eval_sequence")
    assert (june.chunks, june.offload_argument, "Q4_K" in june.schemes) == (False, False, False)
    autumn = api("rwkv_get_last_error", "rwkv_gpu_offload_layers", "rwkv_get_n_embed", "rwkv_eval_sequence_in_chunks")
    assert (autumn.chunks, autumn.offload_argument) == (True, False)
    today = api("rwkv_get_last_error", "rwkv_get_n_embed", "rwkv_eval_sequence_in_chunks")
    assert (today.chunks, today.offload_argument, "Q4_K" in today.schemes) == (True, True, True)
