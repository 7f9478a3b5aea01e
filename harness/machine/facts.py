"""All that is known of this machine, asked once and only when somebody wants it."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from harness.machine import cpu as processors
from harness.machine import gpu as devices
from harness.machine.cpu import Cpu
from harness.machine.gpu import Gpu
from harness.machine.limits import Limits, limits

Detail = dict[str, "str | int | float"]


@dataclass(frozen=True)
class Facts:
    """The processor, every graphics device in the order of its driver, and a container's limits."""

    cpu: Cpu
    gpus: tuple[Gpu, ...]
    limits: Limits
    memory_bytes: int
    system: str


@lru_cache(maxsize=1)
def facts() -> Facts:
    """Of this machine."""
    return Facts(_cpu(), tuple(_gpus()), limits(), _memory(), system_name())


def system_name() -> str:
    """``Linux 6.8.0 x86_64``, ``Darwin 23.5.0 arm64``."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cpu_detail(found: Facts) -> Detail:
    """What of the processor and of the container bears on speed; only what is known."""
    cpu, limit = found.cpu, found.limits
    detail: dict[str, str | int | float | None] = {
        "isa": " ".join(cpu.isa) or None,
        **{f"{level}_bytes": size for level, size in cpu.caches.items()},
        "max_mhz": cpu.max_mhz,
        "governor": cpu.governor,
        "container_cpus": limit.cpus,
        "container_memory_bytes": limit.memory_bytes,
    }
    return {name: value for name, value in detail.items() if value is not None}


def gpu_detail(gpu: Gpu) -> Detail:
    """What of a device bears on speed; only what is known."""
    detail: dict[str, str | int | float | None] = {
        "vendor": gpu.vendor,
        "device_memory_bytes": gpu.memory_bytes,
        "driver": gpu.driver,
        "max_mhz": gpu.clock_mhz,
        "memory_max_mhz": gpu.memory_clock_mhz,
        "power_limit_w": gpu.power_limit_w,
        "compute": gpu.compute,
    }
    return {name: value for name, value in detail.items() if value is not None}


def allowed_cpus() -> int:
    """Logical CPUs that this process may keep busy: its affinity, or a container's quota if that is less."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = limits().cpus
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _cpu() -> Cpu:
    if platform.system() == "Darwin":
        return processors.parse_sysctl(_run(["sysctl", "hw", "machdep.cpu"]))
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return processors.linux(cpus)


def _gpus() -> list[Gpu]:
    if platform.system() == "Darwin":
        return devices.parse_apple(_run(devices.APPLE_COMMAND)) if platform.machine() == "arm64" else []
    found = devices.parse_nvidia(_run(devices.NVIDIA_COMMAND))
    amd = devices.parse_rocm(_run([*devices.ROCM_COMMAND, "--json"]))
    return found + (amd or devices.amd_sysfs(Path("/")))


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run(command: Sequence[str]) -> str:
    """What a query prints, or nothing where it fails: hardware that cannot be asked is not listed."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
