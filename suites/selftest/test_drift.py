"""An error that stays is told from one that grows with position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from backends import faulty
from backends.api import Session
from harness.localize.drift import BOUNDED, BROKEN, CALL, GROWS, OFF, Curve, Drift, drift, fitted, looked_at
from reference.config import Config
from reference.numerics import Arithmetic
from reference.operations import Here
from reference.synthetic import synthetic
from reference.weights import Tensor
from suites.selftest.planted.backend import LOGITS, TRACE, PlantedBackend
from suites.selftest.planted.fault import Call, Patch, Ran, rounded
from suites.selftest.planted.wrong_wkv import keep, looped

CONFIG = Config(2, 32, 64, 60)


def _long(name: str, tensor: Tensor) -> Tensor:
    """A quarter of the channels remember for thousands of tokens."""
    array = tensor.array().copy()
    if name.endswith("time_decay"):
        array[:8] = -9
    return Tensor.of(array)


WEIGHTS = synthetic(CONFIG, 4).map(_long)
FP32, FP16 = Arithmetic(), Arithmetic("fp16", residual="fp16")
TOKENS = 3000


def run(patch: Patch, arithmetic: Arithmetic = FP32, shows: str = TRACE, tokens: int = TOKENS) -> Drift:
    session = PlantedBackend(arithmetic, patch, shows, seed=7).open(WEIGHTS.in_memory())
    return drift(session, WEIGHTS, "fp32", arithmetic, tokens)


def _factor(call: Call) -> Ran:
    """As the backend ``faulty`` does: 1e-5 of the logits a token."""
    ran = call.usual()
    return ran._replace(logits=ran.logits * np.float32(1 + 1e-5 * ran.after.position))


def _off(call: Call) -> Ran:
    ran = call.usual()
    return ran._replace(logits=ran.logits * np.float32(1.001))


def _no_decay(decay: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros_like(decay), u


def _in_half(past: Any, now: Any) -> Any:
    aa, bb, pp = keep(past, now)
    return type(past)(rounded(aa, np.float16), rounded(bb, np.float16), pp)


def _wkv(wrong: Callable[[Here], Any]) -> Patch:
    return Patch(replaced={"blocks.1.att.wkv": wrong})


@pytest.mark.parametrize("arithmetic", [FP32, FP16], ids=str)
def test_a_correct_backend_is_bounded(arithmetic: Arithmetic) -> None:
    found = run(Patch(), arithmetic)
    assert found.verdict == BOUNDED, found.text()
    assert [curve.name for curve in found.curves] == ["logits", "state", "worst state row"]
    assert found.passed
    assert "inside its bound" in " ".join(found.text().split())


def test_an_error_that_adds_up_grows_without_limit() -> None:
    found = run(Patch(around=_factor))
    assert found.verdict == GROWS, found.text()
    logits = found.curves[0]
    assert logits.exponent[0] == pytest.approx(1, abs=0.1)
    assert logits.beyond is not None
    assert found.curves[1].verdict == BOUNDED


def test_a_backend_that_loses_decay_grows_without_limit() -> None:
    """What should be forgotten adds up, so its state is ever farther off."""
    found = run(_wkv(looped(vectors=_no_decay)))
    assert found.verdict == GROWS, found.text()
    assert found.curves[1].verdict == GROWS


def test_sums_in_half_precision_grow_as_far_as_the_model_remembers() -> None:
    """Small terms are lost against large sums, the more the larger they are."""
    found = run(_wkv(looped(keep=_in_half)))
    assert found.verdict == GROWS, found.text()


def test_an_error_that_stays_is_not_said_to_grow() -> None:
    found = run(Patch(around=_off))
    assert found.verdict == OFF, found.text()
    assert found.curves[0].beyond == CALL


def test_logits_alone_will_do() -> None:
    found = run(Patch(around=_factor), shows=LOGITS, tokens=1000)
    assert [curve.name for curve in found.curves] == ["logits"]
    assert found.verdict == GROWS


@pytest.mark.parametrize("fault", ["nan", "dtype", "shape"])
def test_what_cannot_be_compared_is_never_bounded(fault: str) -> None:
    session: Session = faulty.load(WEIGHTS, "fp32", fault, None)
    found = drift(session, WEIGHTS, "fp32", FP32, 200)
    assert not found.passed
    assert found.verdict == BROKEN
    assert "position" in found.text()


def test_it_tells_how_far_it_is() -> None:
    told: list[str] = []
    session = PlantedBackend(FP32, Patch()).open(WEIGHTS.in_memory())
    drift(session, WEIGHTS, "fp32", FP32, 100, told.append)
    assert told[-1] == "100 of 100 tokens"


def test_a_text_is_run_over_and_over() -> None:
    seen: list[int] = []

    def listening(call: Call) -> Ran:
        seen.extend(call.tokens)
        return call.usual()

    session = PlantedBackend(FP32, Patch(around=listening)).open(WEIGHTS.in_memory())
    drift(session, WEIGHTS, "fp32", FP32, 100, tokens=[5, 6, 7])
    assert seen == [5, 6, 7] * 33 + [5]


def test_the_seed_draws_the_text() -> None:
    seen: list[list[int]] = []

    def listening(call: Call) -> Ran:
        seen[-1].extend(call.tokens)
        return call.usual()

    for seed in (1, 1, 2):
        seen.append([])
        session = PlantedBackend(FP32, Patch(around=listening)).open(WEIGHTS.in_memory())
        drift(session, WEIGHTS, "fp32", FP32, 40, seed=seed)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("positions", [1, 15, 16, 17, 100, 10_000])
def test_positions_that_are_looked_at(positions: int) -> None:
    found = looked_at(positions)
    assert found == sorted(set(found))
    assert found[-1] == positions
    assert all(end % CALL == 0 for end in found[:-1])
    assert len(found) <= 80


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_exponent_is_that_of_the_error(exponent: float) -> None:
    """It lies in its interval, whatever the noise."""
    rng = np.random.default_rng(0)
    positions = np.array(looked_at(10_000))
    inside = 0
    for _ in range(200):
        _, low, high = fitted(positions, 1e-6 * positions**exponent * np.exp(0.3 * rng.standard_normal(len(positions))))
        inside += low <= exponent <= high
    assert inside >= 195


def curve(error: Sequence[float], exponent: tuple[float, float, float]) -> Curve:
    positions = np.array([100, 1000])
    return Curve("logits", positions, np.array(error), np.array([1.0, 1.0]), exponent, (0.0, -0.1, 0.1))


def test_it_foresees_where_a_growing_error_leaves_its_bound() -> None:
    growing = curve([0.01, 0.1], (1.0, 0.9, 1.1))
    assert growing.verdict == BOUNDED
    assert growing.leaves() == pytest.approx(10_000)
    assert curve([0.1, 0.1], (0.0, -0.1, 0.1)).leaves() is None
    assert curve([0.1, float("nan")], (0.0, -0.1, 0.1)).beyond == 1000
    assert "near position 10000" in " ".join(Drift(1000, (growing,)).text().split())
    assert not Drift(0, ()).passed


def test_too_few_positions_have_no_slope_and_lines_fit_a_terminal() -> None:
    nan = (float("nan"),) * 3
    short = Curve("worst state row", np.array([2]), np.array([1e-7]), np.array([1e-4]), nan, nan)
    told = Drift(2, (short,)).text()
    assert "too few positions for a slope" in " ".join(told.split())
    assert "nan" not in told
    whole = Drift(1000, (curve([0.01, 0.1], (1.0, 0.9, 1.1)), short)).text()
    assert max(map(len, whole.splitlines())) <= 80
    assert max(map(len, Drift(9, (), "logits are NaN " * 9).text().splitlines())) <= 80
