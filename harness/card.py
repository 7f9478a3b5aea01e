"""A graphics card as it is right now: free memory, clocks, who else is on it; asked of nvidia-smi alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import cuda_order

_FIELDS = ("index", "uuid", "name", "memory.free", "memory.total", "clocks.sm", "clocks.mem", "driver_version")
CARDS = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
PROCESSES = (
    "nvidia-smi",
    "--query-compute-apps=gpu_uuid,pid,process_name,used_memory",
    "--format=csv,noheader,nounits",
)

GIB = 1 << 30


@dataclass(frozen=True)
class Process:
    """Somebody who computes on a card; ``used_bytes`` where the driver tells."""

    pid: int
    name: str
    used_bytes: int | None

    def __str__(self) -> str:
        size = "" if self.used_bytes is None else f", {self.used_bytes / GIB:.1f} GiB"
        return f"{os.path.basename(self.name)} (pid {self.pid}{size})"


@dataclass(frozen=True)
class Card:
    """One card now; ``None`` where the driver does not tell."""

    index: int
    uuid: str
    name: str
    free_bytes: int | None
    total_bytes: int | None
    clock_mhz: int | None
    memory_clock_mhz: int | None
    driver: str
    others: tuple[Process, ...] = ()

    def detail(self) -> dict[str, Any]:
        """What a row's ``hardware_detail`` records of it beyond what stays the same."""
        told = {
            "driver": self.driver,
            "free_bytes_before": self.free_bytes,
            "clock_mhz": self.clock_mhz,
            "memory_clock_mhz": self.memory_clock_mhz,
            "other_processes": [str(process) for process in self.others] or None,
        }
        return {name: value for name, value in told.items() if value is not None}


def card_of(device: str) -> Card | None:
    """The card of ``cuda`` or ``cuda:1`` as it is now; ``None`` where there is none or nobody tells for certain."""
    if device.partition(":")[0] != "cuda":
        return None
    return chosen(parse(_run(CARDS), _run(PROCESSES), own=_own()), device)


def parse(cards: str, processes: str, own: set[int]) -> list[Card]:
    """What :data:`CARDS` and :data:`PROCESSES` print; ``own``: processes that are ours."""
    others: dict[str, list[Process]] = {}
    for line in processes.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) >= 4 and values[1].isdigit() and int(values[1]) not in own:
            # A path may hold commas: it is what is between the second and the last.
            name, used = ", ".join(values[2:-1]), _mib(values[-1])
            others.setdefault(values[0], []).append(Process(int(values[1]), name, used))
    found = []
    for line in cards.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS) or not values[0].isdigit():
            continue  # a message in place of a list
        index, uuid, name, free, total, clock, memory_clock, driver = values
        found.append(
            Card(
                int(index),
                uuid,
                name,
                _mib(free),
                _mib(total),
                _whole(clock),
                _whole(memory_clock),
                driver,
                tuple(others.get(uuid, ())),
            )
        )
    return found


def chosen(cards: Sequence[Card], device: str, told: Mapping[str, str] | None = None) -> Card | None:
    """Which of the machine's cards ``cuda:1`` is; ``told``: the environment, as :mod:`harness.cuda_order` has it."""
    number = int(device.partition(":")[2] or 0)
    cards = sorted(cards, key=lambda card: card.index)
    order = cuda_order.numbered([card.uuid for card in cards], told)
    at = order[number] if number < len(order) else None
    return None if at is None else cards[at]


def warning(device: str, card: Card | None) -> str | None:
    """One line for people where somebody else is on the card."""
    if card is None or not card.others:
        return None
    who = ", ".join(map(str, card.others[:3])) + (", ..." if len(card.others) > 3 else "")
    return f"{who} also on {device} ({card.name}): speeds may be disturbed, and the rows say so"


def recorded(detail: Mapping[str, Any] | None, card: Card | None) -> dict[str, Any]:
    """``hardware_detail`` with what the card is now."""
    return {**(detail or {}), **(card.detail() if card is not None else {})}


def _own() -> set[int]:
    """This process, whoever started it, and what it has started."""
    try:
        import psutil
    except ImportError:  # on somebody's host
        return {os.getpid(), os.getppid()}
    return {os.getpid(), os.getppid(), *(child.pid for child in psutil.Process().children(recursive=True))}


def _run(command: Sequence[str]) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _mib(text: str) -> int | None:
    whole = _whole(text)
    return None if whole is None else whole << 20
