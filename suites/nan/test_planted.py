"""A checkpoint that overflows fp16 at one operation: it is named exactly, and what is proposed restores parity."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from backends.api import Traceable
from harness.localize import localize
from harness.localize.bench import Bench
from harness.localize.finding import NON_FINITE, TRACE
from harness.models import gate_tokens, open_model
from reference.config import Config
from reference.mixed import emulated as emulate
from reference.numerics import Exact
from reference.operations import run
from reference.synthetic import synthetic
from reference.weights import Weights
from suites.nan import emulated
from suites.nan.instrument import counts
from suites.nan.planted import ENDS, IN_BLOCK, LEVERS, STREAM, SUMS, plant

EMULATED = str(Path(emulated.__file__))

#: Backend -> scheme. In both every operation is a trace point of its own.
UNFUSED = {"torch": "fp16", EMULATED: "fp16"}

#: A small model of the real kind, in which everything is planted; some of it in the embedded model too.
CONFIG = Config(n_layer=4, n_embd=64, n_ffn=256, n_vocab=256)
LAYERS = (0, 2, 3)

#: Operation and layer: each operation in turn, in another layer each.
PLANTED: list[tuple[str, int | None]] = [
    *((name, LAYERS[i % 3]) for i, name in enumerate([*LEVERS, "att.residual", SUMS])),
    ("ffn.residual", 2),
]
PLANTED += [(name, None) for name in ENDS]

#: Of those, what runs without ``--slow``: one of each kind of fix.
QUICK = ("ffn.k2", "att.residual", "logits")

each_plant = pytest.mark.parametrize(("name", "layer"), PLANTED, ids=[f"{name}-{layer}" for name, layer in PLANTED])
most_plants_slowly = pytest.mark.parametrize(
    ("name", "layer"),
    [
        pytest.param(name, layer, id=f"{name}-{layer}", marks=() if name in QUICK else pytest.mark.slow)
        for name, layer in PLANTED
    ],
)
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param("torch", id="torch"), pytest.param(EMULATED, id="emulated", marks=pytest.mark.slow)]
)


@cache
def model(name: str) -> tuple[Weights, list[int]]:
    """Weights and a prompt."""
    if name == "small":
        return synthetic(CONFIG, 5), [int(i) for i in np.random.default_rng(1).integers(0, CONFIG.n_vocab, 48)]
    tiny = open_model(name)
    return tiny.weights, gate_tokens(tiny, 48)


@cache
def planted(name: str, layer: int | None, within: str = "small") -> tuple[Weights, str]:
    return plant(*model(within), name, layer)


def applies(backend: str, name: str) -> None:
    if name == SUMS and backend == "torch":
        pytest.skip("torch keeps WKV's sums in float32 in every scheme, where they do not overflow")


def test_every_operation_that_can_overflow_first_is_planted() -> None:
    """The rest are bounded by what they read: gates by 1, means by v, products with a gate by the other factor."""
    assert {name for name, _ in PLANTED} == {*IN_BLOCK, *ENDS} == {*LEVERS, *STREAM, SUMS, *ENDS}


@each_plant
def test_only_the_narrow_arithmetic_fails(name: str, layer: int | None) -> None:
    """In float32 the planted model is finite; in fp16 the planted operation is the first that is not."""
    weights, point = planted(name, layer)
    bad: list[str] = []
    run(weights, model("small")[1], None, emulate(emulated.INFO.schemes["fp16"]), lambda n, x: _note(bad, n, x))
    assert bad[0] == point
    fine: list[str] = []
    run(weights, model("small")[1], None, Exact(), lambda n, x: _note(fine, n, x))
    assert not fine


def _note(found: list[str], name: str, x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        found.append(name)


@each_backend
@most_plants_slowly
def test_localization_names_it_and_the_fix_restores_parity(backend: str, name: str, layer: int | None) -> None:
    applies(backend, name)
    judge(backend, UNFUSED[backend], "small", name, layer)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("ffn.k2", 0), ("att.residual", 4), ("logits", None)])
def test_in_the_embedded_model(name: str, layer: int | None) -> None:
    judge("torch", "fp16", "tiny", name, layer)


def judge(backend: str, scheme: str, within: str, name: str, layer: int | None) -> None:
    weights, point = planted(name, layer, within)
    tokens = model(within)[1]
    bench = Bench(backend, scheme, threads=1, isolate=False)
    found = localize(bench, weights, scheme, bench.schemes[scheme], tokens)
    assert (found.verdict, found.method, found.point, found.layer) == (NON_FINITE, TRACE, point, layer), found.cause
    assert found.watched == "same"
    assert "overflow" in found.cause, found.cause
    assert name != SUMS or "WKV's sum aa (of values) overflows" in found.cause, found.cause
    assert found.fix is not None
    assert found.fix.verified, found.fix
    with bench(weights) as session:
        assert isinstance(session, Traceable)
        assert counts(session, tokens)[0].point == point
