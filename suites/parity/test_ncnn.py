"""The ncnn backend in its own environment: gates, trace points, what a scheme keeps, and the edits of its files."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import ncnn_rwkv as backend
from backends.api import StateAccess, Traceable, Unavailable, Unsupported
from backends.ncnn_rwkv.bin_file import halve
from backends.ncnn_rwkv.names import output_names, trace_points, wkv_parts
from backends.ncnn_rwkv.param_file import Layer, kept_float32, parse, renamed, render
from harness import open_session
from harness.isolation import start
from harness.models import gate_tokens, open_model
from harness.parity import gate
from harness.session import Opened
from harness.tolerance import derive
from reference.config import Config
from reference.forward import forward
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights, f32_to_bf16

SHAPES = {
    "two tokens": Config(n_layer=1, n_embd=32, n_ffn=128, n_vocab=2),
    "odd vocabulary": Config(n_layer=2, n_embd=64, n_ffn=256, n_vocab=299),
    "three blocks": Config(n_layer=3, n_embd=96, n_ffn=384, n_vocab=300),
}


@pytest.fixture(scope="module")
def _environment() -> None:
    try:
        start.environment("ncnn", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))


def opened(model: Any, scheme: str, threads: int = 1) -> AbstractContextManager[Opened]:
    return open_session("ncnn", model, scheme, threads=threads)


def unrounded(config: Config, scale: float = 1.0) -> Weights:
    """Synthetic weights that no scheme but fp32 keeps, some of them below the normal range of fp16."""
    random = np.random.default_rng(7)

    def moved(name: str, tensor: Tensor) -> Tensor:
        array = tensor.array() * random.uniform(0.9, 1.1, tensor.shape).astype(np.float32)
        small = random.random(tensor.shape) < 0.05
        return Tensor.of(np.where(small, array * np.float32(2.0**-12), array))

    return synthetic(config, 4, scale).map(moved)


# --- in its environment


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: str, scheme: str) -> None:
    weights = unrounded(SHAPES[shape], 2.0 if shape == "odd vocabulary" else 1.0)
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, weights.config.n_vocab, 40)]
    with opened(weights, scheme) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, tokens))
    assert checked.passed, str(checked.first_bad)
    assert checked.state
    assert not checked.loose


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_gate_of_the_embedded_model(scheme: str) -> None:
    model, tokens = open_model("tiny"), gate_tokens(open_model("tiny"), 48)
    truth = derive(model.weights, scheme, backend.INFO.arithmetic(scheme, "cpu"), tokens, model.sha256)
    with opened(model, scheme) as found:
        checked = gate(found.session, truth)
        one, _ = found.session.forward(tokens[:6], None)
    assert checked.passed, str(checked.first_bad)
    with opened(model, scheme, threads=2) as found:
        two, _ = found.session.forward(tokens[:6], None)
    np.testing.assert_array_equal(one, two)  # every output is summed by one thread


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_trace(scheme: str) -> None:
    """Every trace point of the reference, near its value; looking changes nothing."""
    weights = unrounded(SHAPES["three blocks"])
    tokens = [5, 0, 299, 17, 5]
    expected: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    forward(apply(weights, scheme), tokens, tap=expected.__setitem__)
    with opened(weights, scheme) as found:
        session = found.session
        assert isinstance(session, Traceable)
        assert isinstance(session, StateAccess)
        traced, after = session.trace(tokens, None, seen.__setitem__)
        logits, state = session.forward(tokens, None)
        np.testing.assert_array_equal(traced, logits)
        np.testing.assert_array_equal(session.export_state(after), session.export_state(state))
    assert list(seen) == list(expected)
    near = 0.1 if scheme == "bf16" else 1e-4
    for name, value in expected.items():
        assert seen[name].shape == value.shape, name
        assert np.abs(seen[name] - value).max() <= near * np.abs(value).max(), name


@pytest.mark.usefixtures("_environment")
def test_fp16_and_bf16_are_in_force() -> None:
    """Weights are rounded in both; in bf16 activations too, but neither the sums nor the exponent of WKV."""
    weights, tokens = unrounded(SHAPES["odd vocabulary"]), list(range(9))
    logits: dict[str, np.ndarray] = {}
    points: dict[str, dict[str, np.ndarray]] = {}
    states: dict[str, np.ndarray] = {}
    for scheme in backend.INFO.schemes:
        points[scheme] = {}
        with opened(weights, scheme) as found:
            session = found.session
            assert isinstance(session, Traceable)
            assert isinstance(session, StateAccess)
            logits[scheme], state = session.trace(tokens, None, points[scheme].__setitem__)
            states[scheme] = session.export_state(state)
    assert not np.array_equal(logits["fp32"], logits["fp16"])
    assert not np.array_equal(logits["fp16"], logits["bf16"])
    for name in ("blocks.0.ln1", "blocks.1.att.k", "blocks.1.ffn.residual", "logits"):
        assert _is_bf16(points["bf16"][name]), name
        assert not _is_bf16(points["fp16"][name]), name
    assert not _is_bf16(states["bf16"][:, 2]), "aa"
    assert not _is_bf16(states["bf16"][:, 4]), "pp"
    assert _is_bf16(states["bf16"][:, :2]), "ffn_x and att_x are activations"


def _is_bf16(array: np.ndarray) -> bool:
    return bool(np.array_equal(f32_to_bf16(array).astype(np.uint32) << 16, np.ascontiguousarray(array).view(np.uint32)))


# --- what it does not offer


@pytest.mark.parametrize(
    ("scheme", "device", "threads", "said"),
    [
        ("int8", "cpu", 1, "no scheme 'int8' here; it has fp32, fp16, bf16"),
        ("fp32", "cuda", 1, "runs on cpu here, not on 'cuda'"),
        ("fp32", "cpu", 0, "at least one CPU thread; 0 were"),
    ],
)
def test_what_it_does_not_offer(scheme: str, device: str, threads: int, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        backend.load(synthetic(SHAPES["two tokens"], 0), scheme, device, threads)


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_half_precision_on_arm_is_another_arithmetic(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(Unsupported, match=f"another arithmetic on {machine}"):
        backend.prepare(synthetic(SHAPES["two tokens"], 0), "fp16", "cpu")


# --- its files

PARAM = """7767517
13 17
Input in0 0 1 in0
Input in1 0 1 in1
Split splitncnn_0 1 2 in1 2 3
MemoryData u 0 1 4 0=8
Split splitncnn_1 1 2 4 5 6
LayerNorm ln 1 1 in0 7 0=8 1=1.000000e-5 2=1
BinaryOp mix 2 1 7 6 8 0=2
InnerProduct k 1 1 8 9 0=8 1=0 2=64
Split splitncnn_2 1 3 9 10 11 out0
BinaryOp uk 2 1 10 5 12 0=0
BinaryOp top 2 1 2 12 13 0=4
BinaryOp out1 2 1 13 11 out1 0=1
BinaryOp rest 2 1 out1 3 out2 0=2
"""


def test_param_text_survives_parsing() -> None:
    assert render(parse(PARAM)) == PARAM
    assert "Input in0 0 1 emb\n" in render(renamed(parse(PARAM), {"in0": "emb"}))
    with pytest.raises(ValueError, match="not a \\.param file"):
        parse("<html>")


def test_a_part_is_kept_in_float32() -> None:
    """The layers between, the copies of its inputs and constants, and one conversion of the product's result."""
    kept = kept_float32(parse(PARAM), [(["out0", "in1"], ["out1"])])
    masked = [layer.name for layer in kept if "31=4" in layer.parameters]
    assert masked == ["splitncnn_0", "splitncnn_1", "splitncnn_2", "uk", "top", "out1"]
    (cast,) = [i for i, layer in enumerate(kept) if layer.kind == "Cast"]
    assert kept[cast] == Layer("Cast", "float32_9", ("9",), ("9.float32",), ("0=1", "1=1"))
    assert kept[cast + 1].name == "splitncnn_2"
    assert kept[cast + 1].bottoms == ("9.float32",)
    assert len(kept) == len(parse(PARAM)) + 1


def test_matrices_are_halved_to_nearest_and_vectors_kept(tmp_path: Path) -> None:
    layers = [
        Layer("MemoryData", "u", (), ("1",), ("0=3",)),
        Layer("InnerProduct", "k", ("0",), ("2",), ("0=1", "1=0", "2=5")),
        Layer("LayerNorm", "ln", ("2",), ("3",), ("0=2",)),
    ]
    vector = np.array([0.1, -3, np.inf], np.float32).tobytes()
    matrix = np.array([0.1, 2.0**-20, -70000, 1 + 2.0**-11 + 2.0**-20, np.nan], np.float32)
    norm = np.array([1, 2, 3, 0.3], np.float32).tobytes()
    source, target = tmp_path / "a.bin", tmp_path / "b.bin"
    source.write_bytes(vector + bytes(4) + matrix.tobytes() + norm)
    halve(layers, source, target)
    with np.errstate(over="ignore"):
        half = matrix.astype(np.float16)
    assert target.read_bytes() == vector + struct.pack("<I", 0x01306B47) + half.tobytes() + bytes(2) + norm
    assert half[1] != 0
    for damaged in (
        source.read_bytes()[:-1],
        source.read_bytes() + b"x",
        vector + b"\1\0\0\0" + matrix.tobytes() + norm,
    ):
        source.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ends before|is longer|not in float32"):
            halve(layers, source, target)


def test_names_are_the_reference_s() -> None:
    config = SHAPES["three blocks"]
    expected: list[str] = []
    forward(synthetic(config, 0), [1], tap=lambda name, _: expected.append(name))
    assert ["emb", *trace_points(config)] == expected
    outputs = output_names(config)
    assert len(set(outputs)) == len(outputs)
    assert all(set(results) <= set(outputs) for _, results in wkv_parts(config))
