"""A child process behind a channel: started, waited for with a time limit, ended with everything it started.

ChildDied      it is gone: signal or exit status, and its last words
ChildTimedOut  it gave no sign of life for the time limit and was killed
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from harness.isolation.frames import Channel, ChannelClosed, FrameError

#: Seconds without a frame after which a child counts as hung, unless asked otherwise.
TIMEOUT_SECONDS = 600.0

#: Seconds that a child which was asked to close gets before it is killed.
_CLOSING_SECONDS = 10.0

#: How often a silent child is looked at: a death that does not close the channel is seen this late.
_POLL_SECONDS = 0.2

_TAIL_BYTES = 32 << 10
_LAST_LINES = 5

#: Names private folders, so that those of a killed parent can be told and removed.
_PREFIX = "rwkv-bench-child-"

_alive: weakref.WeakSet[Child] = weakref.WeakSet()


class ChildDied(Exception):
    """The child is gone; one line with how, what it was doing, and its last words."""


class ChildTimedOut(Exception):
    """The child gave no sign of life and was killed; one line."""


class Child:
    """One child process in a process group, and a private temporary folder, of its own.

    command     arguments; the numbers of its two channel descriptors are appended, unless those are its
                standard input and output (``over_stdio``, as ssh has them)
    timeout     seconds without a frame while it is waited for
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        timeout: float | None = None,
        over_stdio: bool = False,
    ) -> None:
        self.timeout = TIMEOUT_SECONDS if timeout is None else timeout
        self.doing = "starting"
        self._sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            self.process, self._near = _started(command, {**environment, "TMPDIR": str(self.folder)}, over_stdio)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        for file in self._near:
            os.set_blocking(file.fileno(), False)
        self._out = None if over_stdio else _Tail(self.process.stdout)
        self._err = _Tail(self.process.stderr)
        self._deadline = 0.0
        self.channel = Channel(self._near[0].fileno(), self._near[1].fileno(), self._wait)
        _alive.add(self)

    @contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Talk over the channel inside; a child that dies or falls silent raises ChildDied or ChildTimedOut."""
        self.doing = doing
        self.sign_of_life()
        try:
            yield
        except (ChannelClosed, FrameError) as error:
            broken = str(error) if isinstance(error, FrameError) else ""
            how = self._how_it_ended(broken)
            self.kill()
            raise ChildDied(how + self.last_words()) from None
        except _Silent:
            self.kill()
            text = f"no sign of life for {self.timeout:g} s during {doing}; killed"
            raise ChildTimedOut(text + self.last_words()) from None

    def sign_of_life(self) -> None:
        """The time limit starts anew."""
        self._deadline = time.monotonic() + self.timeout

    def end(self) -> None:
        """After it was asked to close: wait a little, then kill whatever is left."""
        with suppress(subprocess.TimeoutExpired):
            self._await_exit(_CLOSING_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the process and all it has started, free what it held. May be called again."""
        if self not in _alive:
            return
        _alive.discard(self)
        # The leader is not reaped before this, so the group's number cannot have been given to another.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in self._near:
            file.close()
        for tail in (self._out, self._err):
            if tail is not None:
                tail.finish()
        shutil.rmtree(self.folder, ignore_errors=True)

    def last_words(self) -> str:
        """The last lines it wrote to stderr, else to stdout, for a message; empty if there are none."""
        lines = self._err.lines() or (self._out.lines() if self._out else [])
        return f"; last words: {' | '.join(lines[-_LAST_LINES:])}" if lines else ""

    def _how_it_ended(self, broken: str) -> str:
        while_doing = f"during {self.doing}"
        with suppress(subprocess.TimeoutExpired):
            self._await_exit(1.0)
        code = self._exit_code()
        if broken:
            return f"sent {broken} {while_doing}"
        if code is None:
            return f"closed its channel {while_doing} and went on running; killed"
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
            why = ", which nobody here sent: out of memory is the usual cause" if -code == signal.SIGKILL else ""
            return f"killed by {name} {while_doing}{why}"
        silently = " without an answer" if code == 0 else ""
        return f"exited with status {code}{silently} {while_doing}"

    def _exit_code(self) -> int | None:
        """Exit status without reaping, so that the group can still be killed by its number."""
        if not hasattr(os, "waitid"):
            return self.process.poll()
        if self.process.returncode is not None:
            return self.process.returncode
        found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _await_exit(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while self._exit_code() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(str(self.process.args), seconds)
            time.sleep(0.01)

    def _wait(self, file: int, writing: bool) -> None:
        """Until the channel can be read or written; see :data:`harness.isolation.frames.Wait`."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise _Silent
            if _ready(file, select.POLLOUT if writing else select.POLLIN, min(left, _POLL_SECONDS)):
                return
            if self._exit_code() is not None and not _ready(file, select.POLLIN, 0):
                raise ChannelClosed("the process has ended")

    @staticmethod
    def _sweep() -> None:
        """Remove the folders of children whose parent was killed."""
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            owner = folder.name[len(_PREFIX) :].partition("-")[0]
            if owner.isdigit() and not _exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(child: Child | None) -> Iterator[None]:
    """Stop every other child while this one (``None``: this process) is measured.

    The threads of an idle runtime may spin for a while after their last call, and take the cores.
    """
    others = [other for other in list(_alive) if other is not child]
    for other in others:
        with suppress(ProcessLookupError):
            os.killpg(other.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            with suppress(ProcessLookupError):
                os.killpg(other.process.pid, signal.SIGCONT)


def _started(
    command: Sequence[str], environment: Mapping[str, str], over_stdio: bool
) -> tuple[subprocess.Popen[bytes], tuple[Any, Any]]:
    """The process, and what its channel is read from and written to."""
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
        return process, (process.stdout, process.stdin)
    near, far = socket.socketpair()
    try:
        process = subprocess.Popen(
            [*command, str(far.fileno()), str(far.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(far.fileno(),),
            start_new_session=True,
            env=environment,
        )
    except BaseException:
        near.close()
        raise
    finally:
        far.close()
    return process, (near, near)


class _Silent(Exception):
    """The time limit has passed."""


class _Tail:
    """Drains a pipe and keeps its end, so that a flood neither blocks the child nor fills memory or disk."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._pipe = pipe
        self._kept: deque[bytes] = deque()
        self._size = 0
        self._thread = threading.Thread(target=self._drain, name="tail", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the pipe; somebody who escaped the group may hold it open."""
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._pipe.close()

    def lines(self) -> list[str]:
        """The last lines, printable, without empty ones."""
        text = b"".join(list(self._kept))[-_TAIL_BYTES:].decode("utf-8", "replace")
        shown = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines())
        return [line[:200] for line in shown if line]

    def _drain(self) -> None:
        with suppress(OSError, ValueError):
            while block := os.read(self._pipe.fileno(), 1 << 16):
                self._kept.append(block)
                self._size += len(block)
                while self._size - len(self._kept[0]) > _TAIL_BYTES:
                    self._size -= len(self._kept.popleft())


def _ready(file: int, event: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(1000 * seconds))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
