"""What a child may leave behind: its private temporary folder, and processes that left its process group.

A daemon changes its session, its parent and its environment, and closes its descriptors; what it keeps, through
fork and exec, are its resource limits. So on Linux a child's limit of realtime CPU time is set to a number of
its folder's own, so large that it limits nothing: whoever has that number descends from the child, however
the child itself has ended. A process that sets this limit anew and drops ``TMPDIR`` too, or is started for the
child by a service (systemd, docker), is not found.

Needs only the standard library, and Python 3.9.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # a system without it: folders of killed parents stay
    fcntl = None  # type: ignore[assignment]

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

#: Of another process: Linux only.
_prlimit: Any = getattr(resource, "prlimit", None)

#: Names private folders; the number after it is the parent's process id.
PREFIX = "rwkv-bench-child-"

#: Seconds for which processes that start others are run after, and dying ones waited for.
_ENDING_SECONDS = 2.0


class Folder:
    """A private temporary folder, locked for as long as its owner lives."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._file: int | None = os.open(self.path, os.O_RDONLY)
        _lock(self._file)

    def mark(self, pid: int) -> None:
        """Make a process that was just started, and all that will descend from it, known as this folder's."""
        if _prlimit is None:
            return
        # A limit that somebody has set is left alone; so is a process that is gone or of another user.
        with contextlib.suppress(OSError, ValueError):
            if _prlimit(pid, resource.RLIMIT_RTTIME) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY):
                _prlimit(pid, resource.RLIMIT_RTTIME, (_limit_of(self.path), _limit_of(self.path)))

    def remove(self) -> None:
        """End the processes that are its child's, and delete it. May be called again."""
        end_escaped(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)


def sweep() -> None:
    """Remove what the children of killed parents left."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = path.name[len(PREFIX) :].partition("-")[0]
        if not owner.isdigit() or _exists(int(owner)):
            continue
        # In a container that shares this folder with us, the owner may live under a number that is not ours.
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _lock(file):
                    end_escaped(path)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(file)


def end_escaped(folder: Path) -> None:
    """Kill every process that has inherited ``folder``'s limit, or has it as TMPDIR. Linux only."""
    until = time.monotonic() + _ENDING_SECONDS
    while [number for number in _processes() if _kill_if_marked(number, folder)]:
        if time.monotonic() > until:
            return
        time.sleep(0.002)


def _limit_of(folder: Path) -> int:
    """Microseconds, at least 2**60, which are 36000 years; below 2**62, so that the kernel can add to them."""
    digest = hashlib.sha256(os.fsencode(folder.name)).digest()
    return (1 << 60) + int.from_bytes(digest[:8], "little") % (3 << 60)


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _kill_if_marked(number: int, folder: Path) -> bool:
    """Kill one process if it is ``folder``'s; by descriptor, so that its number cannot change hands."""
    if number == os.getpid() or not _is_marked(number, folder):
        return False
    try:
        process = os.pidfd_open(number)
    except (OSError, AttributeError):  # gone, or a kernel or a Python without it
        return False
    try:
        if _is_marked(number, folder):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            return not _is_zombie(number)
    except OSError:
        pass
    finally:
        os.close(process)
    return False


def _is_marked(number: int, folder: Path) -> bool:
    try:
        if _prlimit is not None and _prlimit(number, resource.RLIMIT_RTTIME)[1] == _limit_of(folder):
            return True
    except (OSError, ValueError):  # gone, somebody else's, or a sandbox that knows no limits but one's own
        pass
    try:
        with open(f"/proc/{number}/environ", "rb") as file:
            return b"\0TMPDIR=" + os.fsencode(folder) + b"\0" in b"\0" + file.read()
    except OSError:
        return False


def _is_zombie(number: int) -> bool:
    """Whether it only waits to be collected, which in some containers nobody does."""
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def _lock(file: int) -> bool:
    """Whether nobody else holds it; false as well where that cannot be told."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
