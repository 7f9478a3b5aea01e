"""The onnx backend in its own environment: gates, what its graph stores, what is exported, its int8 activations."""

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import onnx_cpu as backend
from backends.api import Generating, Scoring, StateAccess, Unavailable, Unsupported
from harness import open_session
from harness.isolation import start
from harness.models import gate_tokens, open_model
from harness.parity import gate
from harness.session import Opened
from harness.tolerance import derive
from reference.codecs_ggml import Q4_0
from reference.codecs_onnx import (
    INT4_G32,
    INT4_G32_ASYM,
    INT4_G128,
    INT4_G128_ASYM,
    INT8_G32,
    ONNX_SCHEMES,
    OnnxBlocks,
)
from reference.config import Config
from reference.errors import ConfigError
from reference.forward import forward
from reference.schemes import apply, stored_bytes
from reference.synthetic import synthetic

SHAPES = {
    "one layer": Config(n_layer=1, n_embd=128, n_ffn=512, n_vocab=2),
    "odd vocabulary": Config(n_layer=3, n_embd=256, n_ffn=1024, n_vocab=299),
}
BLOCKS = (INT4_G32, INT4_G32_ASYM, INT8_G32, OnnxBlocks(8, 32, asymmetric=True))


@pytest.fixture(scope="module")
def _environment() -> None:
    try:
        start.environment("onnx", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))


def opened(model: Any, scheme: str, threads: int = 1) -> AbstractContextManager[Opened]:
    return open_session("onnx", model, scheme, threads=threads)


# --- in its environment


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: str, scheme: str) -> None:
    weights = synthetic(SHAPES[shape], 4, 2.0 if shape == "one layer" else 1.0)
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, weights.config.n_vocab, 40)]
    with opened(weights, scheme) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, tokens))
    assert checked.passed, str(checked.first_bad)
    assert checked.state
    assert not checked.loose


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", [name for name in backend.INFO.schemes if "g128" not in name])
def test_gate_of_the_narrowest(scheme: str) -> None:
    weights = synthetic(Config(n_layer=2, n_embd=32, n_ffn=128, n_vocab=33), 1)
    tokens = [int(i) for i in np.random.default_rng(2).integers(0, 33, 40)]
    with opened(weights, scheme) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, tokens))
    assert checked.passed, str(checked.first_bad)


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_gate_of_the_embedded_model(scheme: str, threads: int) -> None:
    model = open_model("tiny")
    truth = derive(model.weights, scheme, backend.INFO.arithmetic(scheme, "cpu"), gate_tokens(model, 48), model.sha256)
    with opened(model, scheme, threads) as found:
        checked = gate(found.session, truth)
        assert isinstance(found.session, Scoring)
        assert isinstance(found.session, StateAccess)
        assert isinstance(found.session, Generating)
    assert checked.passed, str(checked.first_bad)


@pytest.mark.usefixtures("_environment")
def test_a_prompt_of_several_runs_of_the_graph() -> None:
    """Longer than session.CHUNK, and not a multiple of it."""
    weights = synthetic(SHAPES["odd vocabulary"], 2)
    tokens = [int(i) for i in np.random.default_rng(3).integers(0, 299, 600)]
    expected, state = forward(weights, tokens, all_logits=True)
    with opened(weights, "fp32") as found:
        session = found.session
        assert isinstance(session, Scoring)
        assert isinstance(session, StateAccess)
        rows = session.logits(tokens, None)
        logits, after = session.forward(tokens, None)
        canonical = session.export_state(after)
    assert rows.shape == expected.shape
    np.testing.assert_allclose(rows, expected, atol=1e-3 * expected.std())
    np.testing.assert_allclose(logits, expected[-1], atol=1e-3 * expected.std())
    np.testing.assert_allclose(canonical[:, 0], state[:, 0], atol=1e-3)


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_greedy_is_the_loop_over_forward(steps: int) -> None:
    """With two states read and written in turn: the one passed in and those given before stay as they were."""
    weights = synthetic(SHAPES["odd vocabulary"], 3)
    with opened(weights, "ort_int4_g32") as found:
        session = found.session
        assert isinstance(session, Generating)
        assert isinstance(session, StateAccess)
        _, start_state = session.forward([1, 2, 3], None)
        before = session.export_state(start_state)
        ids, after = session.greedy(7, start_state, steps)
        kept = session.export_state(after)
        session.greedy(8, start_state, 4)
        token, state, looped = 7, start_state, []
        for _ in range(steps):
            logits, state = session.forward([token], state)
            token = int(logits.argmax())
            looped.append(token)
        np.testing.assert_array_equal(ids, looped)
        np.testing.assert_array_equal(session.export_state(after), kept)
        np.testing.assert_array_equal(session.export_state(state), kept)
        np.testing.assert_array_equal(session.export_state(start_state), before)


@pytest.mark.usefixtures("_environment")
def test_int8_activations_are_in_force() -> None:
    """The same weights; the exact mode is near the reference on them, the other as far as int8 rounding is."""
    weights, tokens = synthetic(SHAPES["odd vocabulary"], 5), list(range(40))
    expected, _ = forward(apply(weights, "ort_int4_g32"), tokens)
    off = {}
    for scheme in ("ort_int4_g32", "ort_int4_g32_int8act"):
        with opened(weights, scheme) as found:
            logits, _ = found.session.forward(tokens, None)
        off[scheme] = float(np.abs(logits - expected).max() / expected.std())
    assert off["ort_int4_g32"] < 1e-4
    assert 1e-3 < off["ort_int4_g32_int8act"] < 0.5


#: Runs in the backend's environment: the exported graph by ONNX Runtime alone, two tokens at once, then one.
_ALONE = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
state = np.zeros([d for d in session.get_inputs()[1].shape], np.float32)
state[:, 4::5] = -1e30
for tokens in ([[3, 5]], [[7]]):
    feeds = {"tokens": np.array(tokens), "state": state, "first": np.array([-1])}
    logits, state = session.run(None, feeds)
np.save(sys.argv[2], logits[0, 0])
"""

_EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from backends import onnx_cpu
from reference import load_checkpoint
print(onnx_cpu.export(load_checkpoint(sys.argv[2], scan=False), sys.argv[3], Path(sys.argv[4])))
"""


@pytest.mark.usefixtures("_environment")
def test_the_exported_graph_runs_by_itself(tmp_path: Path) -> None:
    environment = start.environment("onnx", backend)
    assert environment is not None
    root, scheme = Path(backend.__file__).parents[2], "ort_int4_g32"
    model = open_model("tiny")

    def run(code: str, *arguments: str) -> str:
        command = [str(environment.python), "-I", "-c", code, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    graph = run(_EXPORT, str(root), model.weights.source, scheme, str(tmp_path / "out"))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx", "weights.bin"}
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    run(_ALONE, str(moved / Path(graph).name), str(tmp_path / "logits.npy"))
    expected, _ = forward(apply(model.weights, scheme), [3, 5, 7])
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-3 * expected.std())


# --- what it does not offer


@pytest.mark.parametrize(
    ("scheme", "device", "threads", "said"),
    [
        ("Q4_0", "cpu", 1, "no scheme 'Q4_0'; it has fp32, ort_int4_g32, "),
        ("fp32", "cuda", 1, "runs on cpu here, not on 'cuda'"),
        ("fp32", "cpu", 0, "at least one CPU thread; 0 were"),
    ],
)
def test_what_it_does_not_offer(scheme: str, device: str, threads: int, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        backend.load(synthetic(SHAPES["one layer"], 0), scheme, device, threads)


def test_int8_activations_are_another_arithmetic_off_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    for scheme, instead in (("ort_int4_g128_int8act", "ort_int4_g128"), ("ort_int8_g128_int8act", "fp32")):
        with pytest.raises(Unsupported, match=f"another arithmetic on arm64 .*; use {instead}$"):
            backend.prepare(synthetic(SHAPES["one layer"], 0), scheme, "cpu")


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    weights = synthetic(Config(n_layer=1, n_embd=96, n_ffn=384, n_vocab=9), 0)
    with pytest.raises(ConfigError, match="rows of 96 weights, which do not divide into groups of 128"):
        backend.prepare(weights, "ort_int4_g128", "cpu")


# --- its codec


@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_is_kept_is_kept_when_kept_again(blocks: OnnxBlocks) -> None:
    w = np.random.default_rng(0).standard_normal((5, 4 * blocks.group)).astype(np.float32)
    once = blocks.dequantize(blocks.quantize(w))
    np.testing.assert_allclose(blocks.dequantize(blocks.quantize(once)), once, rtol=1e-6)


@pytest.mark.parametrize("blocks", [INT8_G32, OnnxBlocks(8, 32, asymmetric=True)])
def test_8_bits_keep_the_range(blocks: OnnxBlocks) -> None:
    w = np.random.default_rng(0).standard_normal((5, 4 * blocks.group)).astype(np.float32)
    packed = blocks.quantize(w)
    step = np.abs(np.repeat(packed.scales, blocks.group, axis=-1))
    # The symmetric codes reach -128 but only 127, the zero point is rounded: up to a step at the end of the range.
    assert np.all(np.abs(blocks.dequantize(packed) - w) <= 1.001 * step)
    assert np.mean(np.abs(blocks.dequantize(packed) - w) <= 0.501 * step) > 0.9


@given(seed=st.integers(0, 2**32 - 1), tail=st.floats(1, 20), size=st.sampled_from([1e-9, 1.0, 1e9]))
@pytest.mark.parametrize("blocks", [blocks for blocks in BLOCKS if blocks.bits == 4])
def test_the_search_never_adds_to_the_squared_error(blocks: OnnxBlocks, seed: int, tail: float, size: float) -> None:
    rng = np.random.default_rng(seed)
    w = (size * rng.standard_t(tail, (3, 2 * blocks.group))).astype(np.float32)
    plain = w.reshape(3, 2, blocks.group)
    low, high = plain.min(-1, keepdims=True), plain.max(-1, keepdims=True)
    if blocks.asymmetric:
        scale = (np.maximum(high, 0) - np.minimum(low, 0)) / 15
        zero = np.rint(-np.minimum(low, 0) / scale)
    else:
        scale, zero = np.where(high > -low, high, low) / -8, np.float32(8)
    plain = (np.clip(np.rint(plain / scale + zero), 0, 15) - zero) * scale - plain
    found = (blocks.dequantize(blocks.quantize(w)) - w).reshape(plain.shape)
    errors = [(off.astype(np.float64) ** 2).sum(-1) for off in (found, plain)]
    assert np.all(errors[0] <= 1.0001 * errors[1])


def test_the_search_is_worth_its_name() -> None:
    """On normal weights, by the squared error: below ggml's Q4_0 at group 32, and below the range alone at 128."""
    w = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    error = {
        blocks: float(np.mean((blocks.dequantize(blocks.quantize(w)) - w) ** 2))
        for blocks in (INT4_G32, INT4_G32_ASYM, INT4_G128, INT4_G128_ASYM)
    }
    ggml = float(np.mean((Q4_0.dequantize(Q4_0.quantize(w)) - w) ** 2))
    assert error[INT4_G32_ASYM] < error[INT4_G32] < 0.94 * ggml
    assert error[INT4_G128_ASYM] < error[INT4_G128] < 0.0098  # 0.0106 by the range alone


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_fault_stays_visible_and_small_blocks_are_zeros(blocks: OnnxBlocks) -> None:
    w = np.ones((4, 3 * blocks.group), dtype=np.float32)
    w[0, 1], w[1, 1], w[2, : blocks.group], w[3, : blocks.group] = np.nan, -np.inf, 0, 1e-40
    kept = blocks.dequantize(blocks.quantize(w))
    assert np.isnan(kept[:2, : blocks.group]).all()
    assert not kept[2:, : blocks.group].any()
    np.testing.assert_allclose(kept[:, blocks.group :], 1, rtol=1e-6)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-35])
def test_squares_out_of_range_leave_finite_codes(blocks: OnnxBlocks, size: float) -> None:
    w = (size * np.linspace(-1, 1, 2 * blocks.group, dtype=np.float32)).reshape(2, -1)
    np.testing.assert_allclose(blocks.dequantize(blocks.quantize(w)), w, atol=size / 7)


def test_the_matrices_of_time_mixing_in_blocks_of_their_own() -> None:
    weights = synthetic(SHAPES["one layer"], 0)
    kept = apply(weights, "ort_int4_g32_asym_att8_int8act")
    for name, blocks in (("att.key", INT8_G32), ("ffn.key", INT4_G32_ASYM), ("att.output", INT8_G32)):
        w = weights[f"blocks.0.{name}.weight"].rows(slice(None), np.float32)
        np.testing.assert_array_equal(
            kept[f"blocks.0.{name}.weight"].rows(slice(None), np.float32), blocks.dequantize(blocks.quantize(w))
        )
    plain, mixed = (stored_bytes(weights.config, f"ort_int4_g32_asym{att}_int8act") for att in ("", "_att8"))
    assert mixed - plain == 4 * 128 * (128 + 4 * 4 - (64 + 4 * 4 + 2))


def test_bytes_are_those_of_the_operator_s_documentation() -> None:
    w = np.zeros((1, 64), dtype=np.float32)
    w[0, :4] = -8, 7, 1, -1
    w[0, 32:34] = 0, 30
    packed = INT4_G32.quantize(w)
    assert packed.scales.tolist() == [[1.0, -3.75]]
    assert packed.codes[0, 0, :2].tolist() == [0xF0, 0x79]
    assert packed.codes[0, 1, 0] == 0x08  # 30 is code 0 of a negative scale, 0 is code 8
    packed = INT4_G32_ASYM.quantize(w)
    assert packed.scales.tolist() == [[1.0, 2.0]]
    assert packed.zeros is not None
    assert packed.zeros.tolist() == [[0x08]]
    assert packed.codes[0, 1, 0] == 0xF0


@pytest.mark.parametrize("name", ONNX_SCHEMES)
def test_activations_are_declared_as_the_name_says(name: str) -> None:
    assert (backend.INFO.schemes[name].activations == "fp32") == (not name.endswith("_int8act"))
