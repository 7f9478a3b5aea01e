"""Which measured rates a row is held against: the type of its factors, the card, the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.index import BUILT_IN, load_backend
from harness import roofline_rows
from harness.hardware import Hardware
from harness.machine import probe
from harness.machine.probe import Measured, ProbeFailed, of_this_run
from harness.machine.work import TYPES
from harness.roofline_rows import Roofline, _factors
from harness.rows import Row
from harness.samples import Workload
from reference.config import preset
from reference.numerics import INPUTS, ROUND, Arithmetic


@pytest.mark.parametrize("activations", [*ROUND, *INPUTS])
def test_every_type_of_factors_has_a_rate_that_is_probed(activations: str) -> None:
    assert _factors(activations) in TYPES


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_scheme_of_every_backend_has_one(name: str) -> None:
    schemes = load_backend(name).INFO.schemes
    assert {_factors(arithmetic.activations) for arithmetic in schemes.values()} <= set(TYPES)


def test_half_floats_are_held_against_half_floats_wherever_they_are_rounded() -> None:
    assert {_factors(kind) for kind in ("fp16", "fp16in", "fp16rows")} == {"fp16"}
    assert {_factors(kind) for kind in ("int8x32", "int8x128", "int4x32", "uint4x32")} == {"int8"}


def of_the_card(monkeypatch: pytest.MonkeyPatch, detail: dict[str, Any]) -> Roofline:
    """A Triton cell on a card whose driver tells ``detail``."""
    monkeypatch.setattr(roofline_rows, "describe", lambda place: detail)
    opened: Any = SimpleNamespace(
        session=object(), cpus=None, arithmetic=Arithmetic("fp16rows"), info=SimpleNamespace(name="triton"), version="3"
    )
    return Roofline(Hardware("h200", "cuda:0", "NVIDIA H200"), 1, preset("169m"), opened, lambda text: None)


ROW = Row(
    kind="measured",
    run="r",
    time="t",
    hardware="h200",
    backend="triton",
    model="169m",
    scheme="q4f16_1",
    metric="prefill",
    value=1e5,
    weight_bytes=1 << 30,
    workload=Workload(512, 4),
    verdict="PASS",
)


def test_a_card_is_measured_in_every_run_and_again_under_another_driver_or_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_OF_THIS_RUN", {})
    taken: list[str] = []

    def measure(device: str) -> Measured:
        taken.append(device)
        return {"read_bytes_per_s": 4e12, "flops": {"fp16": 1e14 * len(taken)}, "last_level_bytes": None}

    monkeypatch.setattr(roofline_rows, "measure_device", measure)
    usual = {"driver": "570.124.06", "power_limit_w": 700.0, "max_mhz": 1980}

    def rate(**changed: Any) -> Any:
        return of_the_card(monkeypatch, {**usual, **changed}).of(ROW).extra["roofline"]["rate"]

    assert [rate(), rate()] == [1e14, 1e14]
    assert rate(driver="580.1") == 2e14
    assert rate(power_limit_w=350.0) == 3e14
    probe._OF_THIS_RUN.clear()  # as another process begins
    assert rate() == 4e14
    assert not (tmp_path / "probe").exists()


def test_rates_of_this_run_are_rates_and_the_higher_ones_of_two_measurements() -> None:
    key = {"device": "cuda:7"}
    with pytest.raises(ProbeFailed):
        of_this_run(key, lambda: {"read_bytes_per_s": float("nan"), "flops": {}, "last_level_bytes": None})
    first = {"read_bytes_per_s": 4.0, "flops": {"fp16": 1.0}, "last_level_bytes": None}
    assert of_this_run(key, lambda: first) == first
    again = of_this_run(key, lambda: {**first, "read_bytes_per_s": 3.0, "flops": {"fp16": 2.0}}, higher=True)
    assert (again["read_bytes_per_s"], again["flops"]) == (4.0, {"fp16": 2.0})
