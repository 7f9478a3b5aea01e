"""Energy counters on fake files, drivers and texts; a machine that counts nothing has no figure."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.energy_rows import EnergyTally
from harness.hardware import Hardware
from harness.machine.energy import Counter, counter, from_power, nvml, parse_powermetrics, rapl
from harness.rows import Row
from harness.samples import Workload

CPU = Hardware("cpu", "cpu", "x")
POWER = """\
*** Sampled system activity ***
CPU Power: 1250 mW
GPU Power: 750.5 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): 2001 mW
"""


class Powercap:
    """A folder like ``/sys/class/powercap``: a package, its cores and its memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram")):
            (folder / name).mkdir(parents=True)
            (folder / name / "name").write_text(label + "\n")
            (folder / name / "max_energy_range_uj").write_text("262143328850\n")
            self.set(name, 1_000_000)

    def set(self, name: str, microjoules: int) -> None:
        (self.folder / name / "energy_uj").write_text(f"{microjoules}\n")


def counted(found: Counter | None) -> float:
    assert found is not None
    joules = found.joules()
    assert joules is not None
    return joules


def test_packages_and_memory_count_and_cores_do_not_count_twice(tmp_path: Path) -> None:
    cap = Powercap(tmp_path)
    found = rapl(tmp_path)
    assert counted(found) == 0
    cap.set("intel-rapl:0", 3_000_000)
    cap.set("intel-rapl:0:0", 2_500_000)
    cap.set("intel-rapl:0:1", 1_500_000)
    assert counted(found) == pytest.approx(2.5)
    assert found is not None
    assert found.source == "RAPL, package and dram"


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    cap = Powercap(tmp_path)
    cap.set("intel-rapl:0", 262_143_000_000)
    found = rapl(tmp_path)
    cap.set("intel-rapl:0", 671_150)
    assert counted(found) == pytest.approx(1.0)


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=20))
def test_it_never_decreases_and_adds_up(tmp_path_factory: pytest.TempPathFactory, steps: list[int]) -> None:
    cap = Powercap(tmp_path_factory.mktemp("cap"))
    found, now, limit = rapl(cap.folder), 1_000_000, 262143328850
    for step in steps:
        now = (now + step) % limit
        cap.set("intel-rapl:0", now)
        joules = counted(found)
    assert joules == pytest.approx(sum(steps) / 1e6)


def test_what_only_root_may_read_is_no_counter(tmp_path: Path) -> None:
    Powercap(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as unreadable as the kernel makes it
    assert rapl(tmp_path) is None
    assert rapl(tmp_path / "nothing") is None


def test_a_counter_that_goes_away_says_so(tmp_path: Path) -> None:
    Powercap(tmp_path)
    found = rapl(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert found is not None
    assert found.joules() is None


class Driver:
    """NVML with one device that has used so many millijoules."""

    def __init__(self, fails: str = "") -> None:
        self.millijoules, self._fails = 5000, fails

    def __call__(self, name: str) -> Any:
        assert name == "libnvidia-ml.so.1"
        if self._fails == "missing":
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")
        return self

    def nvmlInit_v2(self) -> int:
        return 9 if self._fails == "init" else 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        return 0 if index == 0 else 2

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, told: Any) -> int:
        if self._fails == "old":
            return 3
        ctypes.cast(told, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return 0


def test_nvml_counts_millijoules() -> None:
    driver = Driver()
    found = nvml(0, driver)
    assert counted(found) == 5.0
    driver.millijoules = 7500
    assert counted(found) == 7.5
    assert nvml(1, driver) is None


@pytest.mark.parametrize("fails", ["missing", "init", "old"])
def test_a_driver_without_counter(fails: str) -> None:
    assert nvml(0, Driver(fails)) is None


def test_powermetrics() -> None:
    assert parse_powermetrics(POWER) == pytest.approx(2.001)
    assert parse_powermetrics("CPU Power: 1000 mW\nGPU Power: 500 mW\n") == pytest.approx(1.5)
    assert parse_powermetrics("powermetrics must be invoked as the superuser") is None
    clock = iter([0, 2_000_000_000])
    found = from_power("x", lambda: 3.0, lambda: next(clock))
    assert counted(found) == 6.0
    assert from_power("x", lambda: None) is None


def test_a_device_that_nobody_counts(tmp_path: Path) -> None:
    assert counter("cpu", tmp_path) is None
    assert counter("nonsense", tmp_path) is None


def row(value: float | None = 50.0) -> Row:
    return Row(
        kind="measured",
        run="r",
        time="t",
        hardware="cpu",
        backend="x",
        model="tiny",
        scheme="fp32",
        metric="decode",
        value=value,
        workload=Workload(8, 4),
        verdict="PASS" if value else "FAIL",
        reason=None if value else "wrong",
    )


def test_joules_a_token_are_mean_power_times_time(monkeypatch: pytest.MonkeyPatch) -> None:
    joules, now = [0.0], [0]
    monkeypatch.setattr("harness.energy_rows.time.perf_counter_ns", lambda: now[0])
    tally = EnergyTally(CPU, lambda device: Counter("fake", lambda: joules[0]))

    def work() -> str:
        joules[0] += 20
        now[0] += 2_000_000_000
        return "done"

    for _ in range(3):
        assert tally.during("decode", work) == "done"
    told = tally.of(row()).extra["energy"]
    assert told == {"joules_per_token": pytest.approx(0.2), "watts": pytest.approx(10), "source": "fake"}
    failed = row(None)
    assert tally.of(failed) is failed


def test_without_a_counter_rows_stay_as_they_are() -> None:
    tally = EnergyTally(CPU, lambda device: None)
    assert tally.during("decode", lambda: 3) == 3
    plain = row()
    assert tally.of(plain) is plain


def test_a_host_is_not_charged_with_this_machines_energy() -> None:
    asked: list[str] = []

    def opened(device: str) -> None:
        asked.append(device)

    tally = EnergyTally(Hardware("cpu", "cpu", "x", host="far"), opened)
    tally.during("decode", lambda: None)
    assert asked == []


def test_a_counter_that_fails_midway_leaves_no_figure() -> None:
    left = [3.0, 4.0, 5.0]
    tally = EnergyTally(CPU, lambda device: Counter("fake", lambda: left.pop() if left else None))
    for _ in range(3):
        tally.during("decode", lambda: None)
    plain = row()
    assert tally.of(plain) is plain
