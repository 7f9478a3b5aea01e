"""A backend's ``adjust``: torch with some results in fp32 or a halved stream is what Mixed emulates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from backends import torch_eager
from backends.api import Unsupported
from harness.compare import nrms
from harness.parity import gate
from harness.session import open_session
from harness.tolerance import K, derive
from reference.config import Config
from reference.forward import forward
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.synthetic import synthetic

pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")

CONFIG = Config(n_layer=4, n_embd=48, n_ffn=192, n_vocab=160)
WEIGHTS = synthetic(CONFIG, 3)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 160, 40)]
FP16 = torch_eager.INFO.schemes["fp16"]

CHANGES: list[Mapping[str, Any]] = [
    {"fp32": ["blocks.2.ffn.k2"]},
    {"fp32": ["emb", "blocks.0.ln0", "blocks.*.residual"]},
    {"fp32": ["blocks.[12].*"]},
    {"fp32": ["blocks.1.ln1", "blocks.3.att.wkv", "ln_out"]},
    {"fp32": ["logits"], "rescale_every": 2},
    {"rescale_every": 1},
    {"fp32": ["*"]},
]


def mixed(change: Mapping[str, Any]) -> Mixed:
    exceptions = tuple((pattern, Arithmetic()) for pattern in change.get("fp32", ()))
    return Mixed(FP16, exceptions, change.get("rescale_every", 0))


def load(change: Mapping[str, Any]) -> Any:
    return torch_eager.adjust(WEIGHTS, "fp16", "cpu", 1, change)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_passes_the_gate_of_the_mixed_arithmetic(change: Mapping[str, Any]) -> None:
    truth = derive(WEIGHTS, "fp16", mixed(change), TOKENS)
    found = gate(load(change), truth)
    assert found.passed, str(found.first_bad)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_point_is_as_exact_as_emulated(change: Mapping[str, Any]) -> None:
    """At each trace point the error is that of the emulation, neither more nor, where all is fp32, of another kind."""
    stored = apply(WEIGHTS, "fp16")
    truth: dict[str, np.ndarray] = {}
    forward(stored, TOKENS, dtype=np.float64, tap=truth.__setitem__)
    e: dict[str, float] = {}
    forward(stored, TOKENS, tap=lambda n, x: e.__setitem__(n, nrms(x, truth[n])), arithmetic=mixed(change))
    got: dict[str, float] = {}
    load(change).trace(TOKENS, None, lambda n, x: got.__setitem__(n, nrms(x, truth[n])))
    assert list(got) == list(truth)
    floor = 2.0**-11 if "*" not in change.get("fp32", ()) else 2.0**-23
    for point, error in got.items():
        assert error <= K * max(e[point], floor), point


def test_what_is_kept_in_fp32_is_not_rounded() -> None:
    seen: dict[str, np.ndarray] = {}
    load({"fp32": ["blocks.1.ffn.k*"]}).trace(TOKENS, None, seen.__setitem__)
    inexact = [name for name, x in seen.items() if not np.array_equal(x, x.astype(np.float16).astype(np.float32))]
    assert inexact == ["blocks.1.ffn.k", "blocks.1.ffn.k2"]


def test_it_holds_what_fp16_does_not() -> None:
    """A product of 1e5 is kept where it is asked for, and nowhere else."""
    from suites.nan.planted import plant

    planted, point = plant(WEIGHTS, TOKENS, "ffn.k2", 2)
    plain, _ = torch_eager.load(planted, "fp16", "cpu", 1).forward(TOKENS, None)
    kept, _ = torch_eager.adjust(planted, "fp16", "cpu", 1, {"fp32": [point]}).forward(TOKENS, None)
    assert not np.isfinite(plain).any()
    assert np.isfinite(kept).all()


@pytest.mark.parametrize(
    ("change", "told"), [({"accumulation": "fp32"}, "accumulation"), ({"fp32": ["blocks.9.ffn.k"]}, "blocks.9")]
)
def test_what_it_cannot_do_it_refuses(change: Mapping[str, Any], told: str) -> None:
    with pytest.raises(Unsupported, match=told):
        load(change)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_session_is_opened_with_it(isolate: bool) -> None:
    change = {"fp32": ["blocks.1.*"], "rescale_every": 2}
    with open_session("torch", WEIGHTS, "fp16", threads=1, isolate=isolate, change=change) as opened:
        logits, _ = opened.session.forward(TOKENS, None)
    np.testing.assert_array_equal(logits, load(change).forward(TOKENS, None)[0])


@pytest.mark.parametrize("isolate", [False, True])
def test_a_backend_without_it_says_so(isolate: bool) -> None:
    with (
        pytest.raises(Unsupported, match="numpy has no adjust"),
        open_session("numpy", WEIGHTS, "fp32", threads=1, isolate=isolate, change={"rescale_every": 2}),
    ):
        pass
