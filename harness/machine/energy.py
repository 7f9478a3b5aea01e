"""Energy, where the machine counts it: RAPL for a processor, NVML for an NVIDIA device, powermetrics on a Mac.

A counter is of the whole package or device: idle power and whatever else runs there are in it. Where nothing counts,
or the user may not read it, there is no counter and no figure.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: RAPL domains that do not contain each other: a package has its cores in it, not its memory.
_DOMAINS = re.compile(r"package-\d+|dram")

POWERMETRICS = ("powermetrics", "--samplers", "cpu_power,gpu_power", "-i", "200", "-n", "1")


@dataclass(frozen=True)
class Counter:
    """Joules since some moment in the past, never decreasing; ``None`` once it no longer answers."""

    source: str
    joules: Callable[[], float | None]


def counter(device: str, root: Path = Path("/")) -> Counter | None:
    """Of a device as backends name it, on this machine; ``None`` where nothing counts."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and platform.system() == "Linux":
        return rapl(root / "sys/class/powercap")
    if kind == "cuda":
        return nvml(int(index or 0))
    if platform.system() == "Darwin" and hasattr(os, "geteuid") and os.geteuid() == 0:
        return from_power("powermetrics, CPU and GPU", _powermetrics)
    return None


def rapl(folder: Path) -> Counter | None:
    """Sum of the packages and their memory below ``/sys/class/powercap``; ``None`` where one cannot be read.

    A counter that starts again from 0 (they hold 60 s to some hours) is continued.
    """
    domains = [
        path
        for path in sorted(folder.glob("intel-rapl:*"))
        if _DOMAINS.fullmatch(_text(path / "name")) and _number(path / "energy_uj") is not None
    ]
    if not any(_text(path / "name").startswith("package") for path in domains):
        return None
    last = {path: _number(path / "energy_uj") or 0 for path in domains}
    total = 0

    def joules() -> float | None:
        nonlocal total
        for path in domains:
            now = _number(path / "energy_uj")
            if now is None:
                return None
            wrapped = now < last[path]
            total += now - last[path] + (_number(path / "max_energy_range_uj") or 0 if wrapped else 0)
            last[path] = now
        return total / 1e6

    names = dict.fromkeys(_text(path / "name").partition("-")[0] for path in domains)
    return Counter(f"RAPL, {' and '.join(names)}", joules)


def nvml(index: int, library: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> Counter | None:
    """Of an NVIDIA device from Volta on, by the driver's own library."""
    try:
        driver = library("libnvidia-ml.so.1")
        handle, told = ctypes.c_void_p(), ctypes.c_ulonglong()
        if driver.nvmlInit_v2() != 0 or driver.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
            return None
        if driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(told)) != 0:
            return None
    except (OSError, AttributeError):
        return None

    def joules() -> float | None:
        failed = driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(told))
        return None if failed else told.value / 1e3  # millijoules

    return Counter("NVML, the whole device", joules)


def from_power(
    source: str, watts: Callable[[], float | None], clock: Callable[[], int] = time.perf_counter_ns
) -> Counter | None:
    """A counter where only power is told: each reading counts for the time since the one before."""
    if watts() is None:
        return None
    total, last = 0.0, clock()

    def joules() -> float | None:
        nonlocal total, last
        power, now = watts(), clock()
        if power is None:
            return None
        total, last = total + power * (now - last) / 1e9, now
        return total

    return Counter(source, joules)


def parse_powermetrics(text: str) -> float | None:
    """Watts of processor and graphics together; ``None`` where the text does not say."""
    found = re.search(r"^Combined Power.*?:\s*(\d+(?:\.\d+)?)\s*mW", text, re.MULTILINE)
    if found:
        return float(found[1]) / 1e3
    parts = re.findall(r"^(?:CPU|GPU) Power:\s*(\d+(?:\.\d+)?)\s*mW", text, re.MULTILINE)
    return sum(map(float, parts)) / 1e3 if parts else None


def _powermetrics() -> float | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(POWERMETRICS, capture_output=True, text=True, timeout=10, check=True)
        return parse_powermetrics(done.stdout)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """A counter's value; ``None`` where there is none, or only root may read it."""
    text = _text(path)
    return int(text) if text.isdigit() else None
