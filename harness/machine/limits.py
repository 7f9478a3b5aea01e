"""What a container allows a process: control groups of version 2 and 1, its own and those above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """CPUs (a quota may be a fraction) and bytes of memory; ``None``: no limit."""

    cpus: float | None = None
    memory_bytes: int | None = None


#: Version 1 writes "no limit" as a number of this size.
_UNLIMITED = 1 << 60


def limits(root: Path = Path("/")) -> Limits:
    """The tightest limits over the process's control group and all groups above it, below ``root``."""
    cpus: list[float] = []
    memory: list[int] = []
    for folder in _groups(root):
        quota = _read(folder / "cpu.max").split()
        if not quota:
            quota = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]) > 0:
            cpus.append(int(quota[0]) / int(quota[1]))
        most = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if most.isdigit() and int(most) < _UNLIMITED:
            memory.append(int(most))
    return Limits(min(cpus, default=None), min(memory, default=None))


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the process's groups; inside a container the path that it is told may not exist: then the top."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        tops = [mount / name for name in {controllers, *controllers.split(",")}] if controllers else [mount]
        for top in tops:
            folder = top / path.strip("/")
            while folder != top and top in folder.parents:
                yield folder
                folder = folder.parent
    yield mount
    yield mount / "cpu"
    yield mount / "cpu,cpuacct"
    yield mount / "memory"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
