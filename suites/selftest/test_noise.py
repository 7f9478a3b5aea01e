"""The noise watch over a made-up /proc and /sys and a made-up driver; what counts as a disturbance."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness.disturbance import disturbances, left_out
from harness.noise import NoiseWatch
from harness.noise_gpu import GpuWatch

TICK = os.sysconf("SC_CLK_TCK")


class Machine:
    """Files that say what this test wants: seconds of every CPU this process may use."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 0.0
        self.cpus = sorted(os.sched_getaffinity(0))
        self.other_cpu = max(self.cpus) + 1
        self.write("proc/self/schedstat", "0 0 1")
        self.busy(0, 0)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def busy(self, seconds: float, steal: float) -> None:
        """So long was the first CPU busy, and so much of it stolen; a CPU that is not ours burns all the time."""
        rows = ["cpu 1 2 3 4 5 6 7 8 9 10"]
        for cpu in self.cpus:
            mine = cpu == self.cpus[0]
            user, stolen = (round(TICK * s) if mine else 0 for s in (seconds, steal))
            rows.append(f"cpu{cpu} {user} 0 0 99999 5 0 0 {stolen} 0 0")
        rows.append(f"cpu{self.other_cpu} 99999999 0 0 0 0 0 0 99999999 0 0")
        self.write("proc/stat", "\n".join(rows) + "\n")

    def clock(self) -> float:
        return self.now


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_counters_become_differences_over_the_window(machine: Machine) -> None:
    watch = NoiseWatch(root=machine.root, clock=machine.clock)
    machine.busy(5, 1)
    watch.begin()
    machine.now, (busy, steal) = 2.0, (5.75, 1.25)
    machine.busy(busy, steal)
    machine.write("proc/self/schedstat", "123 250000000 9")
    seen = watch.end()
    assert (seen["seconds"], seen["cpu_s"]) == (2.0, 2.0 * len(machine.cpus))
    assert seen["others_s"] == pytest.approx(0.75, abs=0.1)  # less what this test itself burnt
    assert (seen["steal_s"], seen["waited_s"]) == (0.25, 0.25)


def test_own_time_is_nobody_elses(machine: Machine) -> None:
    watch = NoiseWatch(root=machine.root, clock=machine.clock)
    watch.begin()
    start = time.process_time()
    while time.process_time() - start < 0.2:
        pass
    machine.busy(0.2, 0)
    assert watch.end()["others_s"] == pytest.approx(0, abs=0.05)


def test_clock_heat_and_throttling_are_those_of_our_cpus(machine: Machine) -> None:
    for cpu, khz in ((machine.cpus[0], 2_000_000), (machine.other_cpu, 9_000_000)):
        at = f"sys/devices/system/cpu/cpu{cpu}"
        machine.write(f"{at}/cpufreq/scaling_cur_freq", f"{khz}\n")
        machine.write(f"{at}/thermal_throttle/core_throttle_count", "3\n")
    for zone, (kind, milli) in enumerate((("x86_pkg_temp", 61000), ("cpu-thermal", 64500), ("iwlwifi", 99000))):
        machine.write(f"sys/class/thermal/thermal_zone{zone}/type", kind)
        machine.write(f"sys/class/thermal/thermal_zone{zone}/temp", str(milli))
    watch = NoiseWatch(root=machine.root, clock=machine.clock)
    machine.write(f"sys/devices/system/cpu/cpu{machine.cpus[0]}/thermal_throttle/core_throttle_count", "5\n")
    seen = watch.end()
    assert (seen["mhz"], seen["celsius"], seen["throttled"]) == (2000, 64.5, 2)


def test_cpuinfo_tells_the_clock_where_cpufreq_does_not(machine: Machine) -> None:
    count = max(machine.cpus) + 1
    machine.write("proc/cpuinfo", "".join(f"processor\t: {n}\ncpu MHz\t\t: {1000 + n}.5\n" for n in range(count)))
    seen = NoiseWatch(root=machine.root, clock=machine.clock).end()
    assert seen["mhz"] == pytest.approx(sum(1000.5 + n for n in machine.cpus) / len(machine.cpus))


def test_a_system_that_tells_nothing_is_not_a_quiet_one(tmp_path: Path) -> None:
    seen = NoiseWatch(root=tmp_path / "nothing").end()
    assert set(seen) <= {"seconds", "load"}
    assert disturbances([seen]) == [None]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not tell waiting times")
def test_the_real_machine_tells_what_it_can() -> None:
    watch = NoiseWatch()
    watch.begin()
    time.sleep(0.05)
    seen = watch.end()
    assert 0.05 <= seen["seconds"] < 5
    assert 0 <= seen["waited_s"] <= seen["seconds"] * 1.5
    assert seen["cpu_s"] == pytest.approx(seen["seconds"] * len(os.sched_getaffinity(0)), rel=1e-3)


class Driver:
    """As much of NVML as is asked for. ``pids`` is what computes on the device."""

    def __init__(self, pids: list[int]) -> None:
        self.pids, self.asked = pids, ""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, found: Any) -> int:
        self.asked = f"index {index}"
        return 0 if index < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name: bytes, found: Any) -> int:
        self.asked = name.decode()
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, processes: Any) -> int:
        for i, pid in enumerate(self.pids):
            processes[i].pid = pid
        count._obj.value = len(self.pids)
        return 0

    def nvmlDeviceGetClockInfo(self, device: Any, what: int, value: Any) -> int:
        ctypes.cast(value, ctypes.POINTER(ctypes.c_uint))[0] = 1500
        return 0


def test_others_on_the_gpu_are_counted_without_ourselves() -> None:
    driver = Driver([os.getpid(), 77])
    watch = GpuWatch.of("cuda:1", driver)
    assert watch is not None
    assert driver.asked == "index 1"
    assert watch.look() == {"gpu_others": 1, "gpu_mhz": 1500}


def test_in_a_container_those_there_from_the_start_are_us() -> None:
    driver = Driver([1, 2])
    watch = GpuWatch.of("cuda", driver)
    assert watch is not None
    assert watch.look()["gpu_others"] == 0
    driver.pids.append(3)
    assert watch.look()["gpu_others"] == 1


def test_the_device_is_the_one_that_cuda_means(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-abc")
    assert GpuWatch.of("cuda:0", driver) is not None
    assert driver.asked == "index 1"
    assert GpuWatch.of("cuda:1", driver) is not None
    assert driver.asked == "GPU-abc"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert GpuWatch.of("cuda:7", driver) is None
    assert GpuWatch.of("cpu", driver) is None


def quiet(**changed: float) -> dict[str, float]:
    return {"seconds": 1.0, "cpu_s": 2.0, "others_s": 0.02, "steal_s": 0.0, "waited_s": 0.001, "mhz": 3000, **changed}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steal_s": 0.05}, "steal took 2 %"),
        ({"others_s": 0.3}, "other processes took 15 %"),
        ({"waited_s": 0.06}, "waited 6 %"),
        ({"mhz": 2600.0}, "the CPU's clock was 2600 MHz, 3000 as a rule"),
        ({"throttled": 1.0}, "slowed for heat"),
        ({"gpu_others": 1.0}, "on the GPU"),
    ],
)
def test_each_disturbance_marks_its_block_and_no_other(changed: dict[str, float], words: str) -> None:
    why = disturbances([quiet(), quiet(), quiet(**changed), quiet()])
    assert [i for i, reason in enumerate(why) if reason] == [2]
    assert words in str(why[2])


@pytest.mark.parametrize(
    "changed", [{"steal_s": 0.039}, {"others_s": 0.19}, {"waited_s": 0.049}, {"mhz": 2710.0}, {"others_s": -0.01}]
)
def test_below_the_limits_nothing_is_disturbed(changed: dict[str, float]) -> None:
    assert disturbances([quiet(), quiet(**changed), quiet()]) == [None] * 3


def test_short_blocks_are_judged_with_their_neighbours() -> None:
    """A tick of a hundredth of a second in a block of ten milliseconds is half of its CPU time, and no evidence."""
    short = {"seconds": 0.01, "cpu_s": 0.02, "others_s": 0.0, "steal_s": 0.0}
    once = [dict(short) for _ in range(50)]
    once[7]["others_s"] = 0.01
    assert disturbances(once) == [None] * 50
    often = [{**short, "others_s": 0.01 if i < 25 else 0.0} for i in range(50)]
    assert [bool(reason) for reason in disturbances(often)] == [True] * 25 + [False] * 25
    assert disturbances(once[:3]) == [None] * 3


def test_disturbed_blocks_are_left_out_while_enough_others_remain() -> None:
    assert left_out([None, "x", None, None]) == [False, True, False, False]
    assert left_out([None, "x", "x", None]) == [False] * 4
    assert left_out(["x"] * 7) == [False] * 7
    assert left_out([]) == []
