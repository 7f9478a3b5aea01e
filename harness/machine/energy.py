"""Energy, where the machine counts it: RAPL for a processor, NVML for an NVIDIA device, powermetrics on a Mac.

A counter is of the whole package or device: idle power and whatever else runs there are in it. Where nothing counts,
or the user may not read it, there is no counter and no figure.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.machine import powermetrics
from harness.noise_gpu import find_device

#: RAPL domains that do not contain each other: a package has its cores in it, not its memory.
_DOMAINS = re.compile(r"package-\d+|dram")


class Spans(Protocol):
    """What counts the energy of one span after another."""

    source: str

    def begin(self) -> None:
        """A span begins now."""

    def end(self) -> tuple[float, float] | None:
        """Joules and seconds of it, as far as they were counted; ``None`` once nothing is told any more."""


@dataclass
class Counter:
    """Joules since some moment in the past, never decreasing; ``None`` once it no longer answers."""

    source: str
    joules: Callable[[], float | None]
    _before: float | None = None
    _began: int = 0

    def begin(self) -> None:
        self._before, self._began = self.joules(), time.perf_counter_ns()

    def end(self) -> tuple[float, float] | None:
        after, ended = self.joules(), time.perf_counter_ns()
        if self._before is None or after is None:
            return None
        return after - self._before, (ended - self._began) / 1e9


def counter(device: str, root: Path = Path("/")) -> Spans | None:
    """Of a device as backends name it, on this machine; ``None`` where nothing counts."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and platform.system() == "Linux":
        return rapl(root / "sys/class/powercap")
    if kind == "cuda":
        return nvml(int(index or 0))
    if platform.system() == "Darwin" and hasattr(os, "geteuid") and os.geteuid() == 0:
        return powermetrics.windows()
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


def nvml(number: int, library: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> Counter | None:
    """Of the NVIDIA device that CUDA calls ``number``, from Volta on, by the driver's own library."""
    try:
        driver = library("libnvidia-ml.so.1")
        handle, told = ctypes.c_void_p(), ctypes.c_ulonglong()
        if driver.nvmlInit_v2() != 0 or not find_device(driver, number, handle):
            return None
        if driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(told)) != 0:
            return None
    except (OSError, AttributeError):
        return None

    def joules() -> float | None:
        failed = driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(told))
        return None if failed else told.value / 1e3  # millijoules

    return Counter("NVML, the whole device", joules)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """A counter's value; ``None`` where there is none, or only root may read it."""
    text = _text(path)
    return int(text) if text.isdigit() else None
