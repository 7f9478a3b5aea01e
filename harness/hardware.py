"""Which hardware is here, under the short names people use, found without importing a runtime."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from harness.names import did_you_mean
from reference.errors import InputError

#: Short name -> pattern of the name its driver or system reports. Order matters: "A800" before "A8".
KNOWN: dict[str, str] = {
    "a800": r"A800",
    "a100": r"A100",
    "h100": r"H100",
    "h200": r"H200",
    "rtx3060ti": r"RTX 3060 Ti",
    "rtx3090": r"RTX 3090",
    "rtx4090": r"RTX 4090",
    "rx7900xtx": r"RX 7900 XTX",
    "m2pro": r"Apple M2 Pro",
    "m2": r"Apple M2$",
    "snapdragon865": r"Snapdragon 865|SM8250",
}


#: Below this many parameters a model's weights stay in the cache of one core or two.
SMALL_PARAMETERS = 8_000_000


class UnknownHardware(InputError):
    """A hardware name that is neither local nor known; one line."""


@dataclass(frozen=True)
class Hardware:
    """One place of this machine where cells can run.

    name    short name for tables (``cpu``, ``h200``)
    device  what a backend calls it (``cpu``, ``cuda:0``, ``mps``)
    detail  the full name, as the system tells it
    host    the inventory's host it belongs to; ``None``: this machine
    facts   of another machine, what :func:`describe` says of this one
    """

    name: str
    device: str
    detail: str
    host: str | None = None
    facts: Mapping[str, str | int] = field(default_factory=dict, compare=False)


@lru_cache(maxsize=1)
def local_hardware() -> tuple[Hardware, ...]:
    """The CPU, then every GPU whose driver answers."""
    found = [Hardware("cpu", "cpu", cpu_name())]
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append(Hardware(short_name(cpu_name()), "mps", cpu_name()))
    found += [Hardware(short_name(name), f"cuda:{i}", name) for i, name in enumerate(_nvidia_gpus())]
    return tuple(found)


def hardware_names() -> list[str]:
    """Every name ``--hardware`` takes."""
    return ["local", "cpu", *KNOWN]


def resolve(name: str) -> list[Hardware]:
    """Hardware of this machine that ``name`` means; empty if it is known but not here.

    Raises :class:`UnknownHardware` with the nearest names otherwise.
    """
    here = local_hardware()
    if name in ("local", "all"):
        return list(here)
    matches = [item for item in here if item.name == name]
    if not matches and name not in hardware_names():
        known = list(dict.fromkeys([*hardware_names(), *(item.name for item in here)]))
        raise UnknownHardware(f"no hardware {name!r}; {did_you_mean(name, known)}known: {', '.join(known)}")
    return matches


def short_name(detail: str) -> str:
    """``NVIDIA A800-SXM4-80GB`` -> ``a800``; an unknown name becomes a slug of itself."""
    for name, pattern in KNOWN.items():
        if re.search(pattern, detail, re.IGNORECASE):
            return name
    return re.sub(r"[^a-z0-9]+", "-", detail.lower()).strip("-")


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Model name of the processor, with its number of logical CPUs that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = match.group(1).strip() if match else name
    except OSError:
        if platform.system() == "Darwin":
            name = _run(["sysctl", "-n", "machdep.cpu.brand_string"]) or name
    return name


def usable_cpus() -> int:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads(parameters: int) -> int:
    """Threads a cell runs with when none are asked for: one per physical core it may use, one if the model is small.

    Products of matrices that stay in the cache take microseconds; a second thread then costs more than it
    brings, and hundreds of times more where anything else runs on its core.
    """
    if parameters < SMALL_PARAMETERS:
        return 1
    return max(1, min(usable_cpus(), physical_cores() or usable_cpus()))


def physical_cores() -> int | None:
    """Cores, hyper-threads not counted; ``None`` where nothing tells."""
    try:
        import psutil
    except ImportError:  # on somebody's host
        return None
    cores: int | None = psutil.cpu_count(logical=False)
    return cores


def available_bytes() -> int:
    """Memory that can be used without swapping: the system's figure, or a container's limit if that is less."""
    available = _free_bytes()
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(0, available)


def _free_bytes() -> int:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    import psutil

    return int(psutil.virtual_memory().available)


def describe(hardware: Hardware) -> dict[str, str | int]:
    """``hardware_detail`` of a row: full name, and what of the host bears on speed."""
    if hardware.host is not None:
        return {**hardware.facts, "name": hardware.detail, "host": hardware.host}
    return {
        "name": hardware.detail,
        "cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _nvidia_gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    return _run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()


def _run(command: list[str]) -> str:
    """What a query prints, or nothing where it fails: hardware that cannot be asked is not listed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
