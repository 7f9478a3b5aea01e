"""A pipe by which a child dies with its parent, however that one ended and however busy the child is.

The parent holds the write end; when it is gone, even by SIGKILL, the kernel closes it. On Linux the kernel
then sends SIGKILL to the child's process group by itself, so a loop in C that never lets Python run is no
shelter, and what the child has started goes too. ``PR_SET_PDEATHSIG`` would not do: it follows the *thread*
that started the child, and reaches the child alone.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

#: Environment variable that tells a child the number of its read end.
VARIABLE = "RWKV_BENCH_LIFELINE"


def hold() -> None:
    """In the child: die when the write end closes. Does nothing where no lifeline was given."""
    number = os.environ.pop(VARIABLE, "")
    if not number:
        return
    file = int(number)
    os.set_inheritable(file, False)
    if not _kernel_watches(file):
        threading.Thread(target=_watch, args=(file,), name="lifeline", daemon=True).start()
    elif _closed(file, 0):  # the parent was gone before the kernel was asked to watch
        _die()


def _kernel_watches(file: int) -> bool:
    """Ask for a signal, SIGKILL, to this process group when something happens to the pipe: fcntl(2), F_SETSIG."""
    try:
        import fcntl

        set_signal = fcntl.F_SETSIG  # Linux only
        own_group = os.getpgrp() == os.getpid()
        fcntl.fcntl(file, fcntl.F_SETOWN, -os.getpgrp() if own_group else os.getpid())
        fcntl.fcntl(file, set_signal, signal.SIGKILL)
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):
        return False
    return True


def _watch(file: int) -> None:
    """Elsewhere a thread has to do; a loop in C that keeps the interpreter's lock outlives the parent."""
    while not _closed(file, None):
        pass
    _die()


def _closed(file: int, milliseconds: int | None) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(milliseconds))


def _die() -> None:
    with contextlib.suppress(OSError):
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)
