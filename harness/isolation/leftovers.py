"""What a child may leave behind: its private temporary folder, and processes that left its process group.

Needs only the standard library, and Python 3.9.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without it: folders of killed parents stay
    fcntl = None  # type: ignore[assignment]

#: Names private folders; the number after it is the parent's process id.
PREFIX = "rwkv-bench-child-"


class Folder:
    """A private temporary folder, locked for as long as its owner lives."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._file: int | None = os.open(self.path, os.O_RDONLY)
        _lock(self._file)

    def remove(self) -> None:
        """End the processes that have it as their temporary folder, and delete it. May be called again."""
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
    """Kill every process whose TMPDIR is ``folder``: what left the process group inherited that. Linux only."""
    mark = b"\0TMPDIR=" + os.fsencode(folder) + b"\0"
    for _ in range(10):  # one that starts others may be ahead of us by a few
        if not [number for number in _processes() if _kill_if_marked(number, mark)]:
            return


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _kill_if_marked(number: int, mark: bytes) -> bool:
    """Kill one process if its environment holds ``mark``; by descriptor, so that its number cannot change hands."""
    if number == os.getpid():
        return False
    try:
        with open(f"/proc/{number}/environ", "rb") as file:
            if mark not in b"\0" + file.read():
                return False
        process = os.pidfd_open(number)
    except (OSError, AttributeError):  # gone, somebody else's, or a kernel without it
        return False
    try:
        with open(f"/proc/{number}/environ", "rb") as file:
            if mark in b"\0" + file.read():
                signal.pidfd_send_signal(process, signal.SIGKILL)
                return True
    except OSError:
        pass
    finally:
        os.close(process)
    return False


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
