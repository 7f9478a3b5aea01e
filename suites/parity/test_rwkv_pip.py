"""The rwkv backend in this process: its gate, its int8 codec bit by bit, and what it must leave alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import rwkv_pip as backend
from backends.api import Session, Unavailable, Unsupported
from harness import open_session
from harness.parity import gate
from harness.tolerance import derive
from reference.checkpoint import save_checkpoint
from reference.codecs_rwkv_int8 import RwkvInt8, RwkvPacked
from reference.config import Config, is_matrix
from reference.numerics import Arithmetic
from reference.schemes import SCHEMES, apply
from reference.synthetic import synthetic
from reference.weights import Weights

torch = pytest.importorskip("torch", reason="not installed: pip install torch")
pytest.importorskip("rwkv", reason="not installed: pip install --no-deps rwkv==0.8.32")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # how ``rwkv`` is written

SHAPES = {
    "one layer": Config(n_layer=1, n_embd=32, n_ffn=128, n_vocab=54),
    "odd": Config(n_layer=2, n_embd=50, n_ffn=111, n_vocab=37),  # a head of fewer outputs than inputs
    "rescaled": Config(n_layer=7, n_embd=32, n_ffn=128, n_vocab=101),  # x is halved once in fp16
}
DEEP = Config(n_layer=13, n_embd=32, n_ffn=64, n_vocab=40)  # twice
INT8 = {"fp32i8": np.float32, "fp16i8": np.float16}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 37, 40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def package(session: Session) -> Any:
    """The package's own model inside a session."""
    assert isinstance(session, backend.RwkvSession)
    return session._model


@pytest.mark.parametrize("scheme", backend.INFO.schemes)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: str, scheme: str) -> None:
    weights = synthetic(SHAPES[shape], 1, 1.5)
    with open_session("rwkv", weights, scheme, threads=1, isolate=False) as opened:
        found = gate(opened.session, derive(weights, scheme, opened.arithmetic, TOKENS))
        assert found.state
        assert found.passed, str(found.first_bad)
        assert not found.loose


@pytest.mark.parametrize("scheme", INT8)
@pytest.mark.parametrize("config", [SHAPES["one layer"], SHAPES["odd"], DEEP], ids=["one layer", "odd", "deep"])
def test_the_int8_codec_is_the_package_s_bit_by_bit(config: Config, scheme: str) -> None:
    """Codes, scales and offsets of every matrix, and the weights that its products multiply with."""
    weights, codec = synthetic(config, 2, 1.5), RwkvInt8(INT8[scheme])
    stored = apply(weights, scheme)
    theirs = package(backend.load(weights, scheme, "cpu", 1)).w
    matrices = [name for name in weights if is_matrix(name) and name != "emb.weight"]
    assert len(matrices) == 7 * weights.config.n_layer + 1
    for name in matrices:
        packed = codec.quantize(weights[name].array(), codec.halvings(name))
        parts = [theirs[name], *(theirs[f"{name}_{part}"] for part in RwkvPacked._fields[1:])]
        for ours, part in zip(packed, parts, strict=True):
            assert np.array_equal(ours, part.numpy())
        codes, mx, rx, my, ry = parts
        multiplied = ((codes.to(mx.dtype) + 0.5) * ry * rx + my + mx).float().numpy().T * 2 ** codec.halvings(name)
        assert np.array_equal(stored[name].array(), multiplied)
        assert codec.nbytes(name, weights[name].shape, "f32") == sum(part.nbytes for part in packed)


@pytest.mark.parametrize("scheme", INT8)
def test_int8_of_a_dead_output_is_nan_in_both(scheme: str) -> None:
    """An output whose weights are all the same divides by zero in the package, which poisons the whole matrix."""
    config = SHAPES["one layer"]
    name = "blocks.0.att.key.weight"
    arrays = {n: np.array(t.array()) for n, t in synthetic(config, 3).items()}
    arrays[name][5] = 0.25
    weights = Weights.of(config, arrays)
    assert np.isnan(apply(weights, scheme)[name].array()).all()
    logits, _ = backend.load(weights, scheme, "cpu", 1).forward(TOKENS, None)
    assert np.isnan(logits).all()


def test_int8_weights_are_within_a_code_of_what_they_were() -> None:
    weights = synthetic(DEEP, 4)
    name = "blocks.12.ffn.value.weight"
    w, kept = weights[name].array(), apply(weights, "fp32i8")[name].array()
    packed = RwkvInt8(np.float32).quantize(w)
    # Half a code of 256, scales being kept over 16; and a rounding of the sums.
    assert np.all(np.abs(kept - w) <= (packed.ry * packed.rx).T * 0.5 * (1 + 1e-4) + 1e-6)


@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_only_fp16_is_rescaled_and_files_are_of_the_activations_type(scheme: str) -> None:
    model = package(backend.load(synthetic(SHAPES["odd"], 5), scheme, "cpu", 1))
    assert (model.RESCALE_LAYER, "fp16" in scheme) in ((6, True), (0, False))
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[scheme[:4]]
    assert model.w["emb.weight"].dtype == model.w["blocks.0.ln1.weight"].dtype == kind
    assert model.w["head.weight"].dtype == (torch.uint8 if scheme in INT8 else kind)


def test_an_fp16_file_is_not_fp32() -> None:
    """Why the file has the type of the activations: the package applies ln0 in the file's type.

    When this fails, the package upcasts first, and one file can serve every scheme.
    """
    weights = apply(synthetic(SHAPES["odd"], 6), "fp16")
    truth = derive(weights, "fp32", Arithmetic(), TOKENS)
    assert gate(backend.load(weights, "fp32", "cpu", 1), truth).passed
    path = Path(os.environ["RWKV_BENCH_CACHE"]) / "half.pth"
    save_checkpoint(weights, path, "pth", "fp16")
    model = backend._model_class()(model=str(path), strategy="cpu fp32", verbose=False)
    assert not gate(backend.RwkvSession(model, weights.config, 1), truth).passed


def test_the_process_and_the_environment_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = synthetic(SHAPES["rescaled"], 7)
    plain, _ = backend.load(weights, "fp16", "cpu", 1).forward(TOKENS, None)
    monkeypatch.setenv("RWKV_RESCALE_LAYER", "1")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    session = backend.load(weights, "fp16", "cpu", 1)
    assert package(session).RESCALE_LAYER == 6
    assert np.array_equal(session.forward(TOKENS, None)[0], plain)
    assert os.environ["RWKV_RESCALE_LAYER"] == os.environ["RWKV_V7_ON"] == "1"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.benchmark
    assert capsys.readouterr().out == ""


def test_a_process_that_imported_it_for_rwkv_7_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import rwkv.model

    monkeypatch.setattr(rwkv.model, "RWKV", type("RWKV_x070", (), {}))
    with pytest.raises(Unsupported, match="RWKV_V7_ON=1 in this process"):
        backend.load(synthetic(SHAPES["odd"], 8), "fp32", "cpu", 1)


def test_what_it_does_not_do_is_refused() -> None:
    weights = synthetic(SHAPES["odd"], 8)
    with pytest.raises(Unsupported, match="no scheme 'fp16i4'; it has fp32, bf16, fp16, fp32i8, fp16i8"):
        backend.load(weights, "fp16i4", "cpu", 1)
    with pytest.raises(Unsupported, match="at least one CPU thread; 0 were asked for"):
        backend.load(weights, "fp32", "cpu", 0)
    assert set(backend.INFO.schemes) <= set(SCHEMES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_cuda_that_is_not_there_is_unavailable(scheme: str) -> None:
    with pytest.raises(Unavailable, match="CUDA"):
        backend.load(synthetic(SHAPES["odd"], 8), scheme, "cuda", 1)
