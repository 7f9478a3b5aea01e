"""Graphics processors, from what their own tools print and from sysfs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Fields asked of nvidia-smi, in this order.
NVIDIA_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory"),
    *("power.limit", "compute_cap"),
)
NVIDIA_COMMAND = ("nvidia-smi", f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader,nounits")
ROCM_COMMAND = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showmaxpower", "--showdriverversion")
APPLE_COMMAND = ("system_profiler", "SPDisplaysDataType", "-json")

_AMD_VENDOR = "0x1002"


@dataclass(frozen=True)
class Gpu:
    """One device; ``None`` where nothing tells.

    clock_mhz, memory_clock_mhz   the highest it may run at
    power_limit_w                 the limit in force
    compute                       compute capability (NVIDIA), architecture (AMD), cores (Apple)
    """

    name: str
    vendor: str
    memory_bytes: int | None = None
    driver: str | None = None
    clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_limit_w: float | None = None
    compute: str | None = None


def parse_nvidia(text: str) -> list[Gpu]:
    """What :data:`NVIDIA_COMMAND` prints, one device a line; memory in MiB, ``[N/A]`` where a field has none.

    A driver too old for a field answers in one line that is no list of devices: then there are none.
    """
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(NVIDIA_FIELDS):
            continue
        name, driver, memory, clock, memory_clock, power, compute = values
        mib = _number(memory)
        found.append(
            Gpu(
                name,
                "NVIDIA",
                None if mib is None else int(mib) << 20,
                _text(driver),
                _whole(clock),
                _whole(memory_clock),
                _number(power),
                _text(compute),
            )
        )
    return found


def parse_rocm(text: str) -> list[Gpu]:
    """What :data:`ROCM_COMMAND` with ``--json`` prints, of any of its spellings of the fields."""
    try:
        told = json.loads(text)
    except ValueError:
        return []
    if not isinstance(told, dict):
        return []
    driver = next((str(v) for v in told.get("system", {}).values()), None)
    found = []
    for key in sorted((k for k in told if re.fullmatch(r"card\d+", k)), key=lambda k: int(k[4:])):
        fields: Mapping[str, Any] = {name.lower(): value for name, value in told[key].items()}
        name = _first(fields, "card series", "card model", "device name")
        memory = _first(fields, "vram total memory (b)")
        power = _first(fields, "max graphics package power (w)")
        gfx = _first(fields, "gfx version")
        found.append(
            Gpu(
                name or "AMD GPU",
                "AMD",
                _whole(memory or ""),
                driver,
                power_limit_w=_number(power or ""),
                compute=gfx,
            )
        )
    return found


def amd_sysfs(root: Path = Path("/")) -> list[Gpu]:
    """AMD devices of a Linux kernel below ``root``, where no rocm-smi is; the name only where the card tells it."""
    found = []
    for card in sorted(root.glob("sys/class/drm/card[0-9]*/device")):
        if _read(card / "vendor") != _AMD_VENDOR or "-" in card.parent.name:
            continue
        caps = sorted(card.glob("hwmon/hwmon*/power1_cap"))
        cap = _number(_read(caps[0])) if caps else None
        found.append(
            Gpu(
                _read(card / "product_name") or f"AMD GPU {_read(card / 'device')}",
                "AMD",
                _whole(_read(card / "mem_info_vram_total")),
                _read(root / "sys/module/amdgpu/version") or None,
                power_limit_w=None if cap is None else cap / 1e6,  # microwatts
            )
        )
    return found


def parse_apple(text: str) -> list[Gpu]:
    """What :data:`APPLE_COMMAND` prints; memory is the machine's."""
    try:
        devices = json.loads(text)["SPDisplaysDataType"]
    except (ValueError, KeyError, TypeError):
        return []
    return [
        Gpu(str(device["sppci_model"]), "Apple", compute=f"{device['sppci_cores']} cores")
        for device in devices
        if str(device.get("sppci_model", "")).startswith("Apple") and "sppci_cores" in device
    ]


def _first(fields: Mapping[str, Any], *names: str) -> str | None:
    return next((str(fields[name]) for name in names if fields.get(name) not in (None, "", "N/A")), None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported], [Unknown Error]
        return None


def _whole(text: str) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def _text(value: str) -> str | None:
    return None if not value or value.startswith("[") else value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
