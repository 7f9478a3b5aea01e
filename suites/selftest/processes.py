"""Real processes for the tests of isolation: the command line as a user starts it, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

#: The command line as a program.
MAIN = "import sys; from harness.cli import main; sys.exit(main())"
ROOT = Path(__file__).parents[2]


class Place:
    """Folders of their own for runs of the command line: cache, state, and a temporary folder to look into."""

    def __init__(self, root: Path) -> None:
        self.temporary = root / "temporary files"
        self.store = root / "rows.jsonl"
        self.temporary.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "XDG_STATE_HOME": str(root / "state"),
            "RWKV_BENCH_CACHE": str(root / "cache"),
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """The command line, at work."""
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            text=True,
        )

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """The command line, to its end."""
        process = self.start(*argv)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def children(self) -> list[psutil.Process]:
        """Processes, of whatever session, whose temporary folder lies in ours: workers and what they started."""
        return [process for process in psutil.process_iter() if self._ours(process)]

    def left(self) -> list[str]:
        """Names in the temporary folder."""
        return sorted(os.listdir(self.temporary))

    def _ours(self, process: psutil.Process) -> bool:
        try:
            folder = process.environ().get("TMPDIR", "")
            return bool(folder.startswith(f"{self.temporary}/") and process.status() != psutil.STATUS_ZOMBIE)
        except (psutil.Error, OSError):
            return False


def eventually(what: Callable[[], object], seconds: float = 15.0) -> bool:
    """Whether ``what()`` becomes true in time."""
    limit = time.monotonic() + seconds
    while not what():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def signalled(process: subprocess.Popen[str], number: int) -> float:
    """Send a signal and wait for the end: seconds that took."""
    began = time.monotonic()
    os.kill(process.pid, number)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return time.monotonic() - began


def stop(processes: Sequence[psutil.Process]) -> None:
    """Clean up after a test that failed."""
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except OSError:
            continue
