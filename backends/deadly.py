"""A backend that takes its process with it, in the way its device name says, for testing isolation.

It runs the numpy reference until it strikes: at its first call, or, with ``late-`` before the name, while
decode is timed. It refuses to run in the harness's own process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from backends.api import BackendInfo, Session, State, Unsupported
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.weights import Weights

#: The gate and its repetition take some 130 calls, the timed decode of 64 tokens 512 more.
LATE_CALL = 300

LATE = "late-"


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def _segfault() -> None:
    _say("deadly: about to read address 0")
    ctypes.string_at(0)


def _abort() -> None:
    _say("GGML_ASSERT: deadly.c:1: false")
    os.abort()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(0)


def _status() -> None:
    _say("deadly: cannot go on")
    os._exit(7)


def _busy() -> None:
    """A loop in C that holds the interpreter's lock: no thread and no signal handler of Python's gets a turn."""
    sum(iter(int, 1))


def _sleep() -> None:
    time.sleep(1e6)


def _orphan() -> None:
    """Leave a process behind, and die."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)", "rwkv-bench-orphan"])
    _kill()


def _escape() -> None:
    """Leave a process of another session behind, which holds every descriptor it can, and die."""
    code = "import time; time.sleep(1e6)"
    subprocess.Popen([sys.executable, "-c", code, "rwkv-bench-orphan"], start_new_session=True, close_fds=False)
    _kill()


def _daemon() -> None:
    """Leave a daemon behind, without parent, session, environment or descriptors of ours, and die."""
    folder = os.environ.get("TMPDIR", "")
    read_end, write_end = os.pipe()  # both are closed by exec
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.chdir("/")
            os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(1e6)", folder], {})
        os._exit(0)
    os.close(write_end)
    os.read(read_end, 1)  # until it runs
    _kill()


def _forge() -> None:
    """Write to every socket, the channel among them, a frame that ends any request."""
    import socket

    text = b'{"ok": {}, "arrays": []}'
    for file in range(3, 64):
        try:
            with socket.socket(fileno=os.dup(file)) as found:
                found.send(b"\x93RB1" + len(text).to_bytes(4, "little") + text)
        except OSError:
            continue


def _fork() -> None:
    """Die while a copy of this process keeps the channel open."""
    if os.fork() == 0:
        time.sleep(1e6)
    _kill()


def _shut() -> None:
    """Close every descriptor, as daemons do, and go on."""
    os.closerange(3, 1 << 16)
    time.sleep(1e6)


def _stop() -> None:
    """Be stopped, as by a debugger or a scheduler of jobs."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _memory() -> None:
    """Ask for more than the process may have."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    bytearray(4 << 30)


def _flood() -> None:
    """Fill both pipes for longer than any buffer holds, then die."""
    block = b"\x93RB1 \x00\xff flood \n" * 4096
    for _ in range(2000):
        os.write(1, block)
        os.write(2, block)
    _say("deadly: drowned")
    os.abort()


def _noise() -> None:
    """Print what libraries print, binary included, and go on."""
    os.write(1, b"loading... \x1b[31m\x00\x93RB1\xff\xff\xff\xff" + bytes(range(256)) * 64)
    _say("warning: \x1b[2J noise")


def _litter() -> None:
    """Leave a file in the temporary folder, and die."""
    import tempfile

    with open(os.path.join(tempfile.gettempdir(), "rwkv-bench-litter"), "w") as file:
        file.write("litter")
    _kill()


FAULTS: dict[str, Callable[[], None]] = {
    "segfault": _segfault,
    "abort": _abort,
    "kill": _kill,
    "exit": _exit,
    "status": _status,
    "busy": _busy,
    "sleep": _sleep,
    "orphan": _orphan,
    "escape": _escape,
    "daemon": _daemon,
    "forge": _forge,
    "fork": _fork,
    "shut": _shut,
    "stop": _stop,
    "memory": _memory,
    "flood": _flood,
    "noise": _noise,
    "litter": _litter,
}

INFO = BackendInfo(
    name="deadly",
    description="the numpy reference until it takes its process down, as --device says",
    origin="this project, for testing the harness",
    devices=(*FAULTS, *(LATE + name for name in FAULTS)),
    schemes={"fp32": Arithmetic()},
)


class DeadlySession:
    """The reference, until its call number ``strike``."""

    def __init__(self, weights: Weights, fault: Callable[[], None], strike: int) -> None:
        self._weights, self._fault, self._left = weights, fault, strike

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        self._left -= 1
        if self._left == 0:
            self._fault()
        return forward(self._weights, tokens, state)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session with the fault that ``device`` names."""
    if "RWKV_BENCH_ISOLATED" not in os.environ:
        raise Unsupported("deadly runs in a process of its own only; give --isolate")
    strike = LATE_CALL if device.startswith(LATE) else 1
    return DeadlySession(checkpoint.in_memory(np.float32), FAULTS[device.removeprefix(LATE)], strike)
