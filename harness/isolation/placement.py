"""Which CPUs a cell runs on: ``0-3,6``, or a NUMA node with its memory; applied to the process itself.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reference.errors import InputError

_NODE_CPUS = "/sys/devices/system/node/node{}/cpulist"
_MOST_CPUS = 1 << 16


class BadPlacement(InputError):
    """CPUs that cannot be had; one line."""


@dataclass(frozen=True)
class Placement:
    """CPUs by number, or a NUMA node, which stands for its CPUs and its memory wherever the process runs."""

    cpus: tuple[int, ...] | None
    node: int | None = None

    def __str__(self) -> str:
        return as_ranges(self.cpus or ()) if self.node is None else f"node:{self.node}"


def parse(text: str) -> Placement:
    """``0-3,6`` or ``node:0``, as it is written. Raises :class:`BadPlacement`."""
    node = re.fullmatch(r"node:([0-9]{1,4})", text)
    return Placement(None, int(node[1])) if node else Placement(_numbers(text))


def usable(placement: Placement) -> tuple[int, ...]:
    """The CPUs that a placement means on this machine.

    Raises :class:`BadPlacement` for those that this process may not use, or a system without a way to say it.
    """
    cpus = _of_node(placement.node) if placement.cpus is None else placement.cpus
    if not hasattr(os, "sched_getaffinity"):
        raise BadPlacement("--cpus: this system cannot bind a process to CPUs; leave it out")
    allowed = os.sched_getaffinity(0)
    missing = [cpu for cpu in cpus if cpu not in allowed]
    if missing:
        raise BadPlacement(
            f"--cpus: CPU {as_ranges(missing)} is not to be had; usable are {as_ranges(sorted(allowed))}"
        )
    return cpus


def _of_node(node: int | None) -> tuple[int, ...]:
    try:
        with open(_NODE_CPUS.format(node)) as file:
            return _numbers(file.read().strip())
    except OSError:
        raise BadPlacement(f"--cpus node:{node}: no such NUMA node there; give CPUs, such as 0-3") from None


def pin(placement: Placement | None) -> str | None:
    """Bind this process, the threads it has and those it will start; what it is bound to, or ``None``.

    Memory is bound to a node where the kernel lets us; the answer says whether it did. Raises
    :class:`BadPlacement`.
    """
    if placement is None:
        return None
    cpus, node = usable(placement), placement.node
    os.sched_setaffinity(0, cpus)
    for thread in _threads():  # importing numpy has started those of its BLAS, and the call above is of one thread
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cpus)
    bound = as_ranges(sorted(os.sched_getaffinity(0)))
    if node is None:
        return bound
    return f"{bound}, memory of node {node}" if _bind_memory(node) else f"{bound}, memory not bound"


def as_ranges(cpus: Sequence[int]) -> str:
    """``[0, 1, 2, 6]`` -> ``0-2,6``."""
    ranges: list[list[int]] = []
    for cpu in cpus:
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _numbers(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= _MOST_CPUS:
            raise BadPlacement(f"--cpus {text}: {part!r} is no CPU; give numbers and ranges such as 0-3,6, or node:0")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _threads() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return []


def _bind_memory(node: int) -> bool:
    """set_mempolicy(MPOL_BIND), which glibc does not wrap."""
    number = {"x86_64": 238, "aarch64": 237}.get(platform.machine())
    if number is None or node > 63:
        return False
    mpol_bind = 2
    mask = ctypes.c_ulong(1 << node)
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL(None).syscall(number, mpol_bind, ctypes.byref(mask), ctypes.c_ulong(65))) == 0
    return False
