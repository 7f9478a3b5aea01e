"""A child process behind a channel: started, waited for with a time limit, ended with everything it started.

ChildDied      it is gone: signal or exit status, and its last words
ChildTimedOut  it gave no sign of life for the time limit and was killed
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from harness.isolation import leftovers
from harness.isolation.frames import Channel, ChannelClosed, FrameError
from harness.isolation.spawn import spawned
from harness.isolation.tail import Tail

#: Seconds without a frame after which a child counts as hung, unless asked otherwise.
TIMEOUT_SECONDS = 600.0

#: Seconds that a child which was asked to close gets before it is killed.
CLOSING_SECONDS = 10.0

#: How often a silent child is looked at: a death that does not close the channel is seen this late.
_POLL_SECONDS = 0.2

_LAST_LINES = 5

_alive: weakref.WeakSet[Child] = weakref.WeakSet()

#: Held while a process group is signalled or its leader reaped, so that no signal goes to a number given away.
_signalling = threading.RLock()


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
        if not self.timeout > 0:
            raise ValueError(f"a time limit of {self.timeout} s; more than 0 is needed")
        self.doing = "starting"
        self.elsewhere = over_stdio
        self._owner = os.getpid()
        self._limit, self._deadline = self.timeout, 0.0
        self._busy, self._stopped = False, 0
        self._end: ChildDied | ChildTimedOut | None = None
        leftovers.sweep()
        self._private = leftovers.Folder()
        self.folder = self._private.path
        try:
            started = spawned(command, {**environment, "TMPDIR": str(self.folder)}, over_stdio)
        except BaseException:
            self._private.remove()
            raise
        self.process, self._near, self._lifeline = started
        self._private.mark(self.process.pid)  # long before its interpreter runs anything
        self._out: Tail | None = None
        self._err: Tail | None = None
        _alive.add(self)
        try:
            self._err = Tail(self.process.stderr)
            self._out = None if over_stdio else Tail(self.process.stdout)
            for file in self._near:
                os.set_blocking(file.fileno(), False)
        except BaseException:
            self.kill()
            raise
        self.channel_file = self._near[0].fileno()
        self.channel = Channel(self._near[0].fileno(), self._near[1].fileno(), self._wait)

    @contextmanager
    def waiting(self, doing: str, limit: float | None = None) -> Iterator[None]:
        """Talk over the channel inside; a child that dies or falls silent raises ChildDied or ChildTimedOut.

        Whatever else is raised inside, Ctrl-C included, may have cut a frame in two: the child is killed.
        """
        if self not in _alive:  # its descriptors may belong to somebody else by now
            raise ChildDied(f"it was ended before {doing}") if self._end is None else type(self._end)(str(self._end))
        self.doing, self._limit = doing, limit or self.timeout
        self.sign_of_life()
        self._begin()
        try:
            yield
        except (ChannelClosed, FrameError) as error:
            how = self.how_it_ended(str(error) if isinstance(error, FrameError) else "")
            self.kill()
            self._end = ChildDied(how + self.last_words())
            raise self._end from None
        except _Silent:
            self.kill()
            text = f"no sign of life for {self._limit:g} s during {doing}; killed"
            self._end = ChildTimedOut(text + self.last_words())
            raise self._end from None
        except BaseException:
            self.kill()
            raise
        finally:
            self._busy = False

    def sign_of_life(self) -> None:
        """The time limit starts anew."""
        self._deadline = time.monotonic() + self._limit

    def stop(self) -> bool:
        """Stop its processes, unless somebody is waiting for it; whether :meth:`go_on` is to be called."""
        with _signalling:
            if self.elsewhere or self._busy or not self._signal(signal.SIGSTOP):
                return False
            self._stopped += 1
            return True

    def go_on(self) -> None:
        """Undo one :meth:`stop`."""
        with _signalling:
            self._stopped -= 1
            if not self._stopped:
                self._signal(signal.SIGCONT)

    def end(self) -> None:
        """After it was asked to close: wait a little, then kill whatever is left."""
        if self in _alive:
            with suppress(subprocess.TimeoutExpired):
                self._await_exit(CLOSING_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the process and all it has started, free what it held. May be called again, after Ctrl-C too."""
        if self not in _alive:
            return
        with _signalling:
            self._signal(signal.SIGKILL)
            self.process.wait()
        for file in (*self._near, *self._lifeline):
            file.close()
        self._private.remove()
        for tail in (self._out, self._err):
            if tail is not None:
                tail.finish()
        _alive.discard(self)

    def _begin(self) -> None:
        """From now on it runs, though another session may just be measured: somebody waits for it."""
        with _signalling:
            self._busy = True
            if self._stopped:
                self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> bool:
        """Signal its process group, which has its number for as long as the leader is not reaped."""
        if self.process.returncode is not None:
            return False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
        return True

    def last_words(self) -> str:
        """The last lines it wrote to stderr, else to stdout, for a message; empty if there are none."""
        lines = next((lines for tail in (self._err, self._out) if tail and (lines := tail.lines())), [])
        return f"; last words: {' | '.join(lines[-_LAST_LINES:])}" if lines else ""

    def how_it_ended(self, broken: str = "") -> str:
        """Signal, exit status or what else was wrong, and during what; waits a moment for the process to end."""
        while_doing = f"during {self.doing}"
        with suppress(subprocess.TimeoutExpired):
            self._await_exit(1.0)
        code = self._exit_code()
        if broken:
            return f"sent {broken} {while_doing}"
        if code is None:
            return f"closed its channel {while_doing} and went on running; killed"
        if self.elsewhere and code == 255:  # what ssh says of its own failures
            return f"the connection was lost {while_doing}"
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
        try:
            found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # somebody else has collected it
            return self.process.poll()
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
            # What has come counts even after the limit: this process, not the child, may have been stopped.
            if _ready(file, select.POLLOUT if writing else select.POLLIN, min(max(left, 0), _POLL_SECONDS)):
                return
            if left <= 0:
                raise _Silent
            if self._exit_code() is not None and not _ready(file, select.POLLIN, 0):
                raise ChannelClosed("the process has ended")


@contextmanager
def alone(child: Child | None) -> Iterator[None]:
    """Stop every other idle child while this one (``None``: this process) is measured.

    The threads of an idle runtime may spin for a while after their last call, and take the cores. A child
    that another thread waits for runs on: who measures two at once has asked for it.
    """
    stopped: list[Child] = []
    try:
        for other in list(_alive):
            if other is not child and other.stop():
                stopped.append(other)
        yield
    finally:
        for other in stopped:
            other.go_on()


@atexit.register
def _end_all() -> None:
    """Sessions that nobody closed."""
    for child in list(_alive):
        if child._owner == os.getpid():  # not in a fork of the owner
            child.kill()


class _Silent(Exception):
    """The time limit has passed."""


def _ready(file: int, event: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(1000 * seconds))
