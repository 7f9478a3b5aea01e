"""Energy counters on fake files, drivers and texts; a machine that counts nothing has no figure."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.energy_rows import EnergyTally
from harness.hardware import Hardware
from harness.machine import powermetrics
from harness.machine.energy import Counter, counter, nvml, rapl
from harness.machine.powermetrics import Windows
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
    """NVML with devices that have used so many millijoules."""

    def __init__(self, fails: str = "", devices: int = 1) -> None:
        self.millijoules, self._fails, self._devices = 5000, fails, devices
        self.asked: list[str] = []

    def __call__(self, name: str) -> Any:
        assert name == "libnvidia-ml.so.1"
        if self._fails == "missing":
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")
        return self

    def nvmlInit_v2(self) -> int:
        return 9 if self._fails == "init" else 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        self.asked.append(f"index {index}")
        return 0 if index < self._devices else 2

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked.append(name.decode())
        return 0

    def nvmlDeviceGetCount_v2(self, told: Any) -> int:
        ctypes.cast(told, ctypes.POINTER(ctypes.c_uint))[0] = self._devices
        return 0

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


@pytest.mark.parametrize(
    ("visible", "device"),
    [(None, "index 0"), ("1", "index 1"), ("2,1", "index 2"), ("GPU-abc", "GPU-abc"), ("1,0", "index 1")],
)
def test_the_joules_are_those_of_the_device_that_cuda_means(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    driver = Driver(devices=3)
    assert nvml(0, driver) is not None
    assert driver.asked == [device]


def test_a_device_that_is_hidden_has_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert nvml(1, Driver(devices=3)) is None


def test_what_powermetrics_says() -> None:
    assert powermetrics.parse(POWER) == pytest.approx(2.001)
    assert powermetrics.parse("CPU Power: 1000 mW\nGPU Power: 500 mW\n") == pytest.approx(1.5)
    assert powermetrics.parse("CPU Power: 1000 mW\n") is None  # the rest of the window is still to come
    assert powermetrics.parse("powermetrics must be invoked as the superuser") is None


class Mac:
    """A clock, and powermetrics that tells of windows of 100 ms as its lines are read."""

    def __init__(self) -> None:
        self.now = 0
        self.windows = Windows(lambda: self.now)

    def passes(self, watts: float, of_it: int = 100) -> None:
        """The end of a window, of which so many milliseconds are still to come."""
        self.now += of_it * 1_000_000
        text = POWER.replace("activity ***", "activity (Fri Sep 11) (100.00ms elapsed) ***")
        self.windows.read(text.replace("2001", f"{1000 * watts:.0f}").splitlines(keepends=True))
        self.windows._over = False


def test_only_windows_within_the_span_count() -> None:
    """A Mac that draws 20 W at work and 1 W before and after."""
    mac = Mac()
    tally = EnergyTally(CPU, lambda device: mac.windows)

    def work() -> None:
        mac.passes(8.6, 40)  # 60 ms of it were before
        for _ in range(3):
            mac.passes(20)
        mac.now += 30_000_000

    for _ in range(2):
        mac.passes(1)
        mac.now += 60_000_000
        tally.during("decode", work)
        mac.passes(6.7, 70)
    told = tally.of(row(50.0)).extra["energy"]
    assert told == {
        "joules_per_token": pytest.approx(0.4), "watts": pytest.approx(20), "source": "powermetrics, CPU and GPU"
    }  # fmt: skip


def test_a_span_without_a_window_has_no_figure() -> None:
    mac = Mac()
    tally = EnergyTally(CPU, lambda device: mac.windows)
    mac.passes(5)
    tally.during("decode", lambda: None)
    plain = row()
    assert tally.of(plain) is plain


def test_a_process_is_read_while_it_runs_and_its_end_is_seen() -> None:
    window = POWER.replace("activity ***", "activity (x) (20.5ms elapsed) ***")
    script = f"import time\nfor _ in range(4):\n    print({window!r}, flush=True)\n    time.sleep(0.05)\n"
    powermetrics.windows.cache_clear()
    found = powermetrics.windows((sys.executable, "-c", script))
    assert found is not None
    found.begin()
    deadline = time.monotonic() + 30
    while not found._over and time.monotonic() < deadline:
        time.sleep(0.01)
    joules, seconds = found.end() or (0.0, 0.0)
    assert joules == pytest.approx(2.001 * seconds)
    assert 0.06 < seconds < 0.083
    found.begin()
    assert found.end() is None
    powermetrics.windows.cache_clear()
    assert powermetrics.windows(("no such program",)) is None
    powermetrics.windows.cache_clear()


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
    monkeypatch.setattr("harness.machine.energy.time.perf_counter_ns", lambda: now[0])
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
