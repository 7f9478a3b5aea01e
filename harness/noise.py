"""What else the machine did while a block of samples was taken: load, steal, others' CPU, clock, heat, GPU.

A :class:`NoiseWatch` lives in the process that runs the backend. It reads the kernel's counters at both ends
of a block, outside every timed span, and gives the differences:

    seconds    length of the window
    cpu_s      CPU time that there was in it: the window times the CPUs that this process may use
    others_s   of those CPUs' time, what neither idled nor was this process's own (or its children's)
    steal_s    what the hypervisor gave to other machines
    waited_s   for how long the main thread was ready to run and had no CPU (nanosecond resolution)
    load       load average over one minute
    mhz        mean clock of those CPUs        celsius   the hottest sensor of the CPU
    throttled  how often a core was slowed for heat meanwhile
    gpu_others, gpu_mhz, gpu_celsius           see :mod:`harness.noise_gpu`

What a system does not tell is absent, never 0. Which of it counts as a disturbance:
:mod:`harness.disturbance`. Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.noise_gpu import GpuWatch

#: Clock, heat and load are read at most so often: reading a clock can take the kernel a millisecond.
_KEPT_SECONDS = 1.0

#: Fields of a cpu line of /proc/stat, see proc(5): user nice system idle iowait irq softirq steal.
_IDLE, _STEAL, _FIELDS = (3, 4), 7, 8

_COOLING = re.compile(r"cpu|core|package|x86_pkg_temp|soc", re.IGNORECASE)


@dataclass(frozen=True)
class Counters:
    """Running totals at one moment, in seconds; ``None`` where this system does not tell."""

    at: float
    own: float
    busy: float | None = None
    steal: float | None = None
    waited: float | None = None
    throttled: int | None = None


class NoiseWatch:
    """``begin`` a block, ``end`` it: what was seen. ``root`` stands for ``/``; ``device`` as a backend calls it."""

    def __init__(
        self, device: str = "cpu", root: Path = Path("/"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._root, self._clock = root, clock
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self._tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
        self._children = _children(root)
        self._sensors = _sensors(root)
        cpus = [root / f"sys/devices/system/cpu/cpu{number}" for number in self._cpus or ()]
        self._clock_files = _there(cpu / "cpufreq/scaling_cur_freq" for cpu in cpus)
        self._throttle_files = _there(cpu / "thermal_throttle/core_throttle_count" for cpu in cpus)
        self._wanted = {f"cpu{number}" for number in self._cpus or ()}
        self._seen: dict[str, float] = {}
        self._seen_at = -_KEPT_SECONDS
        self._gpu = GpuWatch.of(device)
        self._began = self._counters()

    def begin(self) -> None:
        """The window opens."""
        self._began = self._counters()

    def end(self) -> dict[str, float]:
        """The window closes; what was seen in it, in the fields named above."""
        before, now = self._began, self._counters()
        seen: dict[str, float] = {"seconds": now.at - before.at}
        own = now.own - before.own
        if now.busy is not None and before.busy is not None:
            seen["cpu_s"] = (now.at - before.at) * len(self._cpus or ())
            # The kernel counts in ticks and own time finer, so the difference may come out below nothing.
            seen["others_s"] = now.busy - before.busy - own
        for name in ("steal", "waited"):
            first, last = getattr(before, name), getattr(now, name)
            if first is not None and last is not None:
                seen[f"{name}_s"] = last - first
        if now.throttled is not None and before.throttled is not None:
            seen["throttled"] = now.throttled - before.throttled
        if now.at - self._seen_at >= _KEPT_SECONDS:
            self._seen, self._seen_at = self._present(), now.at
        seen.update(self._seen)
        return {name: round(value, 6) for name, value in seen.items()}

    def _present(self) -> dict[str, float]:
        """What has a value rather than a total."""
        found: dict[str, float] = {}
        with suppress(OSError, AttributeError):
            found["load"] = os.getloadavg()[0]
        mhz = _mean(self._clocks())
        if mhz is not None:
            found["mhz"] = mhz
        heat = [value for value in (_number(path) for path in self._sensors) if value is not None]
        if heat:
            found["celsius"] = max(heat) / 1000
        if self._gpu is not None:
            found.update(self._gpu.look())
        return found

    def _counters(self) -> Counters:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        own += sum(_process_seconds(self._root, pid, self._tick) for pid in self._children)
        busy, steal = self._cpu_seconds()
        return Counters(self._clock(), own, busy, steal, _waited(self._root), self._throttled())

    def _cpu_seconds(self) -> tuple[float | None, float | None]:
        """Busy and stolen seconds of the CPUs this process may use, since the system started."""
        if self._cpus is None:
            return None, None
        busy = steal = 0
        seen = 0
        for line in _text(self._root / "proc/stat").splitlines():
            if not line.startswith("cpu"):
                break
            name, *words = line.split()
            if name not in self._wanted:
                continue
            ticks = [int(word) for word in words[:_FIELDS]]
            if len(ticks) == _FIELDS:
                seen += 1
                steal += ticks[_STEAL]
                busy += sum(ticks) - sum(ticks[i] for i in (*_IDLE, _STEAL))
        return (busy / self._tick, steal / self._tick) if seen else (None, None)

    def _clocks(self) -> list[float]:
        """MHz of those CPUs: of cpufreq, else of /proc/cpuinfo."""
        found = [value / 1000 for value in (_number(path) for path in self._clock_files) if value]
        if found:
            return found
        text = _text(self._root / "proc/cpuinfo")
        every = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
        return [every[n] for n in self._cpus or () if n < len(every)]

    def _throttled(self) -> int | None:
        found = [value for value in (_number(path) for path in self._throttle_files) if value is not None]
        return int(sum(found)) if found else None


def _waited(root: Path) -> float | None:
    """Seconds the main thread has spent ready but not running; see the kernel's sched-stats.rst."""
    words = _text(root / "proc/self/schedstat").split()
    return int(words[1]) / 1e9 if len(words) == 3 else None


def _children(root: Path) -> list[int]:
    """Processes that this one has started and that are alive: what they burn is no disturbance."""
    me, found = os.getpid(), []
    with suppress(OSError):
        for name in os.listdir(root / "proc"):
            if name.isdigit() and _stat(root, int(name))[1:2] == [str(me)]:
                found.append(int(name))
    return found


def _process_seconds(root: Path, pid: int, tick: int) -> float:
    words = _stat(root, pid)
    return (int(words[11]) + int(words[12])) / tick if len(words) > 12 else 0.0


def _stat(root: Path, pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: a name in brackets may hold blanks."""
    return _text(root / f"proc/{pid}/stat").rpartition(")")[2].split()


def _there(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def _sensors(root: Path) -> list[Path]:
    """Files with the CPU's temperatures, in thousandths of a degree."""
    found = []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if _COOLING.search(_text(zone / "type")):
            found.append(zone / "temp")
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
