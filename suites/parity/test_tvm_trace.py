"""Traces of the libraries that we compile: every trace point, by entries that run the kernels of ``forward``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import tvm_mlc as backend
from backends.api import Unavailable
from backends.tvm_mlc.points import trace_points, unit
from harness import open_session
from harness.isolation import start
from harness.trace_point import first_bad_point
from reference.config import Config
from reference.forward import forward
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Tensor
from suites.parity.test_tvm import compile_to
from suites.parity.tvm_traces import shown_as_the_reference

MODEL = Config(n_layer=3, n_embd=64, n_ffn=256, n_vocab=299)


@pytest.fixture(scope="module")
def _environment() -> None:
    try:
        start.environment("tvm", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))


def prompt(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, MODEL.n_vocab, count)]


def test_points_are_the_reference_s() -> None:
    names: list[str] = []
    forward(synthetic(MODEL, 0), [1, 2], tap=lambda name, _: names.append(name))
    assert trace_points(MODEL.n_layer) == names


def test_units() -> None:
    """Halved after every second layer: what the last layer writes is in quarters, what it leaves in eighths."""
    assert unit("blocks.5.att.out", 2) == 4
    assert unit("blocks.5.ffn.residual", 2) == 8
    assert unit("blocks.4.ffn.residual", 2) == 4
    assert unit("blocks.5.att.rwkv", 2) == unit("ln_out", 2) == unit("blocks.5.ffn.residual", 0) == 1


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", ["q0f32", "q0f16", "q3f16_0", "q4f16_0", "q4f16_1", "q4f32_1", "q8f16_1"])
def test_every_point(scheme: str) -> None:
    weights = synthetic(MODEL, 4)
    with open_session("tvm", weights, scheme, threads=1) as found:
        names = shown_as_the_reference(found.session, apply(weights, scheme), found.arithmetic, prompt(9))
    assert names == trace_points(MODEL.n_layer)


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_0"])
def test_in_units_of_the_model(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with ``rescale_every`` shows the model's own residual stream."""
    compile_to(tmp_path / "out", "--quant", scheme, "--rescale-every", "1", "--seed", "3")
    monkeypatch.setenv(backend.VARIABLE, str(tmp_path / "out"))
    from harness.models import open_model

    weights = open_model("tiny").weights
    with open_session("tvm", weights, scheme, threads=1) as found:
        arithmetic = found.arithmetic
        names = shown_as_the_reference(found.session, apply(weights, scheme), arithmetic, [5, 6, 7, 8, 9, 10])
    assert names == trace_points(weights.config.n_layer)


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize(
    "name", ["blocks.1.att.key", "blocks.1.ffn.key", "blocks.2.ffn.value", "blocks.0.att.receptance"]
)
def test_a_fault_is_found_where_it_is(name: str) -> None:
    weights = synthetic(MODEL, 4)
    wrong = np.array(weights[f"{name}.weight"].array())
    wrong[3] *= 1.02
    other = weights.map(lambda n, tensor: Tensor.of(wrong) if n == f"{name}.weight" else tensor)
    with open_session("tvm", weights, "q0f32", threads=1) as found:
        assert first_bad_point(found.session, weights, found.arithmetic, prompt(12)) is None
        bad = first_bad_point(found.session, other, found.arithmetic, prompt(12))
    assert bad is not None
    point = {"key": "k", "value": "v", "receptance": "r"}[name.rsplit(".", 1)[1]]
    assert bad.name == f"{name.rsplit('.', 1)[0]}.{point}"
