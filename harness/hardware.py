"""Which hardware is here, under the short names people use, found without importing a runtime."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from harness import cuda_order
from harness.machine.facts import allowed_cpus, cpu_detail, gpu_detail
from harness.machine.facts import facts as machine_facts
from harness.machine.gpu import Gpu
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


#: Vendor -> what torch calls its devices; ROCm's have CUDA's name there.
_DEVICES = {"NVIDIA": "cuda:{}", "AMD": "cuda:{}", "Apple": "mps"}

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
    facts: Mapping[str, str | int | float] = field(default_factory=dict, compare=False)


@lru_cache(maxsize=1)
def local_hardware() -> tuple[Hardware, ...]:
    """The CPU, then every GPU whose driver answers and that CUDA_VISIBLE_DEVICES leaves."""
    return (Hardware("cpu", "cpu", cpu_name()), *(place for place, _ in _gpus()))


def _gpus() -> list[tuple[Hardware, Gpu | None]]:
    """Every GPU as backends number them; ``None`` where it is not known for certain which one that is."""
    everyone = machine_facts().gpus
    cards = [gpu for gpu in everyone if gpu.vendor == "NVIDIA"]
    named = cards and any(not word.isdigit() for word in cuda_order.words() or ())
    order = cuda_order.numbered(cuda_order.asked_uuids(len(cards)) if named else [""] * len(cards))
    found = [_card(number, None if at is None else cards[at], cards) for number, at in enumerate(order)]
    counts = dict.fromkeys(_DEVICES, 0)
    for gpu in everyone:
        if gpu.vendor != "NVIDIA":
            index, counts[gpu.vendor] = counts[gpu.vendor], counts[gpu.vendor] + 1
            found.append((Hardware(short_name(gpu.name), _DEVICES[gpu.vendor].format(index), gpu.name), gpu))
    return found


def _card(number: int, gpu: Gpu | None, cards: list[Gpu]) -> tuple[Hardware, Gpu | None]:
    """``cuda:<number>``: ``gpu``, or one of ``cards``; cards that are all the same need no telling apart."""
    if gpu is None and len(set(cards)) == 1:
        gpu = cards[0]
    device = _DEVICES["NVIDIA"].format(number)
    if gpu is not None:
        return Hardware(short_name(gpu.name), device, gpu.name), gpu
    names = ", ".join(dict.fromkeys(card.name for card in cards))
    why = f"{cuda_order.ORDER} is not {cuda_order.BY_BUS}" if not cuda_order.by_bus() else "a part of a card"
    return Hardware("nvidia-gpu", device, f"one of {names}: {why}"), None


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
    """Model name of the processor, as its system tells it."""
    return machine_facts().cpu.name or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Logical CPUs this process may keep busy, a container's quota included."""
    return allowed_cpus()


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


def describe(hardware: Hardware) -> dict[str, str | int | float]:
    """``hardware_detail`` of a row: full name, and what of the machine bears on speed."""
    if hardware.host is not None:
        return {**hardware.facts, "name": hardware.detail, "host": hardware.host}
    found = machine_facts()
    on_cpu = hardware.device == "cpu"
    own = cpu_detail(found) if on_cpu else _of_device(hardware)
    return {
        "name": hardware.detail,
        "cpus": usable_cpus(),
        **({} if physical_cores() is None else {"cores": physical_cores() or 0}),
        "memory_bytes": found.memory_bytes,
        "system": found.system,
        "python": platform.python_version(),
        **own,
        **({} if on_cpu else {"cpu": cpu_name()}),
    }


def _of_device(hardware: Hardware) -> dict[str, str | int | float]:
    """What the driver tells of a device; nothing for one that nobody has detected."""
    gpu = next((gpu for place, gpu in _gpus() if place.device == hardware.device), None)
    return {} if gpu is None else gpu_detail(gpu)
