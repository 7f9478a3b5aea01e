"""Start a child process with a channel, in a session and process group of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from harness.isolation import lifeline


def spawned(
    command: Sequence[str], environment: Mapping[str, str], over_stdio: bool
) -> tuple[subprocess.Popen[bytes], tuple[Any, Any], tuple[Any, ...]]:
    """The process, what its channel is read from and written to, and what else is held open for it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the kernel forgets how children end
    if over_stdio:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
            bufsize=0,
        )
        return process, (process.stdout, process.stdin), ()
    with ExitStack() as ours, ExitStack() as theirs:
        near, far = socket.socketpair()
        ours.enter_context(near)
        theirs.enter_context(far)
        read_end, write_end = os.pipe()
        theirs.callback(os.close, read_end)
        line = ours.enter_context(os.fdopen(write_end, "wb", buffering=0))
        process = subprocess.Popen(
            [*command, str(far.fileno()), str(far.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(far.fileno(), read_end),
            start_new_session=True,
            env={**environment, lifeline.VARIABLE: str(read_end)},
        )
        ours.pop_all()  # nothing has failed: they are the caller's now
        return process, (near, near), (line,)
