"""Roofline fractions: what they are of, when there is none, and the probe that they are held against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.hardware import KNOWN, Hardware
from harness.machine import probe
from harness.machine import work as machine_work
from harness.machine.known import profiles
from harness.machine.probe import ProbeFailed, kept, known_rates
from harness.machine.work import best_rate, fastest, measure_cpu
from harness.roofline import FITS, Rates, decode_fraction, prefill_flops, prefill_fraction, weight_bytes
from harness.roofline_rows import Roofline
from harness.rows import Row
from harness.samples import Workload
from reference.config import preset
from reference.forward import forward
from reference.numerics import Arithmetic, Exact
from reference.schemes import SCHEMES, stored_bytes
from reference.synthetic import synthetic

TAKEN = {"read_bytes_per_s": 4e10, "flops": {"fp32": 1e11, "bf16": 4e11}, "last_level_bytes": 32 << 20}


def test_the_a800_figure_is_about_half_of_that_cards_bandwidth() -> None:
    """72.4 tok/s in q0f16 of the 7B World model: 7.39e9 weights of 2 bytes, less the embedding of 65,536 x 4,096."""
    step = weight_bytes(preset("7b-world"), "q0f16")
    assert step is not None
    assert step == pytest.approx(2 * (7.518e9 - 65536 * 4096), rel=0.01)
    bandwidth = profiles()["a800"].read_bytes_per_s
    assert bandwidth is not None
    fraction = decode_fraction(72.4, step, Rates(bandwidth.value))
    assert fraction == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.codec is not None][::3])
def test_a_step_reads_all_but_the_embedding(scheme: str) -> None:
    config = preset("169m")
    step, whole = weight_bytes(config, scheme), stored_bytes(config, scheme)
    assert step is not None
    assert 0 < step < whole
    assert whole - step < 4.1 * config.n_vocab * config.n_embd


def test_bytes_of_a_scheme_that_nobody_here_knows() -> None:
    assert weight_bytes(preset("169m"), "Q4_K") is None
    assert weight_bytes(preset("169m"), "nonsense") is None


def test_operations_of_a_prompt_are_those_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = synthetic("169m", 0)
    small = synthetic(type(weights.config)(2, 64, 256, 100), 0)
    done = 0
    plain = Exact.linear

    def counted(self: Exact, x: np.ndarray, weight: Any) -> np.ndarray:
        nonlocal done
        done += 2 * len(x) * math.prod(weight.shape)
        return plain(self, x, weight)

    monkeypatch.setattr(Exact, "linear", counted)
    forward(small, [1, 2, 3, 4, 5])
    assert prefill_flops(small.config, 5) == done


@given(st.floats(1, 1e5), st.integers(1, 1 << 40), st.floats(1e9, 1e13), st.integers(1, 64))
def test_decode_is_the_share_of_bandwidth_that_its_steps_need(speed: float, step: int, rate: float, batch: int) -> None:
    fraction = decode_fraction(speed, step, Rates(rate), batch)
    assert fraction == pytest.approx(speed / batch * step / rate)
    assert decode_fraction(speed, step, Rates(rate, last_level_bytes=FITS * step)) is None
    assert decode_fraction(speed, step, Rates(rate, last_level_bytes=FITS * step - 1)) is not None


def test_unknown_parts_give_no_fraction() -> None:
    config = preset("169m")
    assert decode_fraction(10, None, Rates(1e10)) is None
    assert decode_fraction(10, 1 << 30, Rates()) is None
    assert prefill_fraction(10, config, 8, "int8", Rates(1e10, {"fp32": 1e11})) is None


def test_half_floats_have_at_least_the_rate_of_float32() -> None:
    config, slow = preset("169m"), Rates(1e10, {"fp32": 1e11, "bf16": 1e9})
    assert prefill_fraction(10, config, 8, "bf16", slow) == prefill_fraction(10, config, 8, "fp32", slow)


def row(metric: str, value: float | None, step: int | None = 1 << 30) -> Row:
    return Row(
        kind="measured",
        run="r",
        time="t",
        hardware="cpu",
        backend="x",
        model="169m",
        scheme="fp32",
        metric=metric,
        value=value,
        weight_bytes=step,
        workload=Workload(8, 4),
        verdict="PASS" if value else "FAIL",
        reason=None if value else "wrong",
    )


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> tuple[Roofline, list[int]]:
    asked: list[int] = []

    def rates(threads: int, cpus: str | None, higher: bool) -> dict[str, Any]:
        asked.append(threads)
        return TAKEN | ({"read_bytes_per_s": 9e10} if higher else {})

    monkeypatch.setattr("harness.roofline_rows.cpu_rates", rates)
    cpu = SimpleNamespace(cpu=SimpleNamespace(last_level_bytes=32 << 20))
    monkeypatch.setattr("harness.roofline_rows.facts", lambda: cpu)
    opened: Any = SimpleNamespace(session=object(), cpus=None, arithmetic=Arithmetic(activations="bf16"))
    place = Hardware("cpu", "cpu", "Some CPU")
    return Roofline(place, 2, preset("169m"), opened, lambda text: None), asked


def test_rows_say_what_they_are_a_fraction_of(roofline: tuple[Roofline, list[int]]) -> None:
    line, asked = roofline
    decode = line.of(row("decode", 20.0))
    assert decode.roofline_fraction == pytest.approx(20 * (1 << 30) / 4e10)
    assert decode.extra["roofline"] == {"of": "read bandwidth", "rate": 4e10, "unit": "byte/s"}
    prefill = line.of(row("prefill", 100.0))
    assert prefill.roofline_fraction == pytest.approx(100 / 8 * prefill_flops(preset("169m"), 8) / 4e11)
    assert prefill.extra["roofline"]["of"] == "bf16 matrix rate"
    assert asked == [2]


def test_the_rate_is_the_one_that_the_fraction_is_of(
    roofline: tuple[Roofline, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half floats without a fast product of their own are multiplied as float32, and the row says so."""
    slow = TAKEN | {"flops": {"fp32": 6e10, "bf16": 2e9}}
    monkeypatch.setattr("harness.roofline_rows.cpu_rates", lambda threads, cpus, higher: slow)
    told = roofline[0].of(row("prefill", 50.0))
    of = told.extra["roofline"]
    assert of == {"of": "fp32 matrix rate", "rate": 6e10, "unit": "FLOP/s"}
    assert told.roofline_fraction == pytest.approx(50 / 8 * prefill_flops(preset("169m"), 8) / of["rate"])


def test_a_rate_below_what_was_reached_is_taken_again_once(roofline: tuple[Roofline, list[int]]) -> None:
    line, asked = roofline
    faster = line.of(row("decode", 60.0))
    assert faster.roofline_fraction == pytest.approx(60 * (1 << 30) / 9e10)
    assert line.of(row("decode", 120.0)).roofline_fraction > 1  # type: ignore[operator]  # and says so
    assert asked == [2, 2]


def test_rows_without_a_fraction_say_why_and_cost_no_probe(roofline: tuple[Roofline, list[int]]) -> None:
    line, asked = roofline
    cached = line.of(row("decode", 20.0, 8 << 20))
    assert cached.roofline_fraction is None
    assert "last-level cache" in cached.extra["roofline"]["reason"]
    assert "not known" in line.of(row("decode", 20.0, None)).extra["roofline"]["reason"]
    failed = row("decode", None)
    assert line.of(failed) is failed
    load = row("load", 1.0)
    assert line.of(load) is load
    assert asked == []


def test_a_probe_that_fails_costs_the_fraction_only(
    roofline: tuple[Roofline, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(threads: int, cpus: str | None, higher: bool) -> dict[str, Any]:
        raise ProbeFailed("the probe ended with -9: ")

    monkeypatch.setattr("harness.roofline_rows.cpu_rates", fail)
    found = roofline[0].of(row("decode", 20.0))
    assert (found.value, found.roofline_fraction) == (20.0, None)
    assert "ended with -9" in found.extra["roofline"]["reason"]


def test_a_measurement_is_kept_until_it_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    taken = []

    def measure() -> dict[str, Any]:
        taken.append(1)
        return {**TAKEN, "read_bytes_per_s": 1e10 * len(taken)}

    key = {"machine": "x", "threads": 1}
    assert known_rates(key) is None
    assert kept(key, measure)["read_bytes_per_s"] == 1e10
    assert kept(key, measure)["read_bytes_per_s"] == 1e10
    assert kept({**key, "threads": 2}, measure)["read_bytes_per_s"] == 2e10
    assert kept(key, measure, again=True)["read_bytes_per_s"] == 3e10
    (file,) = [f for f in (tmp_path / "probe").iterdir() if json.loads(f.read_text())["key"] == key]
    file.write_text("{")
    assert kept(key, measure)["read_bytes_per_s"] == 4e10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_rate_that_is_none_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    with pytest.raises(ProbeFailed):
        kept({"a": 1}, lambda: {**TAKEN, "flops": {"fp32": bad}})
    assert known_rates({"a": 1}) is None


def test_what_was_taken_under_load_is_taken_again_in_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    load, rates = [64.0], iter([1e9, 9e9, 5e9, 2e9, 4e9, 7e9])
    monkeypatch.setattr("harness.machine.probe.os.getloadavg", lambda: (load[0], 0, 0))
    monkeypatch.setattr(probe, "allowed_cpus", lambda: 2)
    monkeypatch.setattr(probe, "_in_a_child", lambda *a: {**TAKEN, "read_bytes_per_s": next(rates)})
    assert probe.cpu_rates(1)["read_bytes_per_s"] == 1e9
    assert probe.cpu_rates(1)["read_bytes_per_s"] == 1e9
    load[0] = 0.1
    assert probe.cpu_rates(1)["read_bytes_per_s"] == 9e9
    assert probe.cpu_rates(1)["read_bytes_per_s"] == 9e9
    assert probe.cpu_rates(1, again=True)["read_bytes_per_s"] == 5e9
    for best in (5e9, 5e9, 7e9):  # of 2, 4 and 7
        assert probe.cpu_rates(1, higher=True)["read_bytes_per_s"] == best
        assert probe.cpu_rates(1)["read_bytes_per_s"] == best


def test_the_higher_of_two_rates_stays_the_one_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    load, rates = [64.0], iter([(3e10, 1e11), (2e10, 2e11)])
    monkeypatch.setattr("harness.machine.probe.os.getloadavg", lambda: (load[0], 0, 0))
    monkeypatch.setattr(probe, "allowed_cpus", lambda: 2)

    def measured(*_: Any) -> dict[str, Any]:
        read, flops = next(rates)
        return {**TAKEN, "read_bytes_per_s": read, "flops": {"fp32": flops}}

    monkeypatch.setattr(probe, "_in_a_child", measured)
    assert probe.cpu_rates(1)["read_bytes_per_s"] == 3e10
    load[0] = 0.1
    for _ in range(2):
        found = probe.cpu_rates(1)
        assert (found["read_bytes_per_s"], found["flops"]["fp32"]) == (3e10, 2e11)


def test_the_fastest_run_counts_and_a_slow_product_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr("harness.machine.work.time.perf_counter_ns", lambda: clock[0])
    times = iter([9, 5, 2, 7, *[8] * 100])

    def work() -> None:
        clock[0] += next(times) * 1_000_000

    assert fastest(work, 0) == pytest.approx(0.002)
    sizes = []

    def product(n: int) -> Any:
        sizes.append(n)

        def multiply() -> None:
            clock[0] += n * 1_000_000

        return multiply

    assert best_rate(product, (16, 64, 128, 256)) == pytest.approx(2 * 128**3 / 0.128)
    assert sizes == [16, 64, 128]  # 128 takes longer than LONG_SECONDS


def test_the_processor_is_measured_and_numpy_alone_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.machine.work.find_spec", lambda name: None)
    monkeypatch.setattr("harness.machine.work.SECONDS", 0.01)
    monkeypatch.setattr("harness.machine.work.READ_BYTES", 1 << 22)
    monkeypatch.setattr("harness.machine.work.SIZES", (64, 128))
    found = measure_cpu(1)
    assert found["read_bytes_per_s"] > 1e6
    assert set(found["flops"]) == {"fp32"}
    assert found["versions"] == {"numpy": np.__version__}


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8"])
def test_rates_of_products_are_those_of_random_values(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values take less power, and a card that its power limits would show a rate that no model reaches."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")
    seen: list[Any] = []
    monkeypatch.setattr(torch, "_int_mm" if kind == "int8" else "mm", lambda a, b: seen.append(a))
    machine_work._torch_product("cpu", getattr(torch, kind))(64)()
    assert str(seen[0].dtype) == f"torch.{kind}"
    assert len(seen[0].unique()) > 100


def test_every_known_hardware_has_a_profile_whose_figures_have_a_source() -> None:
    found = profiles()
    assert set(found) == {*KNOWN, "cpu"}
    for short, profile in found.items():
        figures = [profile.read_bytes_per_s, profile.memory_bytes, *profile.flops.values()]
        assert set(profile.flops) == {"fp32", "fp16", "bf16", "int8"}
        for figure in figures:
            assert figure is None or (figure.value > 1e9 and figure.source.url.startswith("https://"))
        if short != "cpu":
            assert profile.read_bytes_per_s is not None
