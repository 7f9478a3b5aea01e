"""SIGTERM and SIGHUP end a run the way Ctrl-C does: what has been measured is printed first.

A wish to end that is repeated at once is one wish: a second signal would cut short the printing, a third the
last words, and the status would be that of the signal.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

#: Seconds after a signal for which others are the same wish.
AT_ONCE_SECONDS = 1.0


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt or :class:`Terminated` in the main thread; a signal that is ignored (nohup) stays so.

    After a signal, others do nothing for a second, past the end of the block too, and nothing at all once the
    interpreter ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _usual()
    wish = _Wish()
    for number in before:
        signal.signal(number, wish.come)
    try:
        yield
    finally:
        wish.before = before
        if wish.last is None:
            wish.restore()
        else:
            atexit.register(_ignore, tuple(before))


def _usual() -> dict[int, Any]:
    """The handlers of those signals that nobody else has taken; an earlier block that was left gives its own back."""
    found: dict[int, Any] = {}
    for number in _SIGNALS:
        owner = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(owner, _Wish):
            owner.restore()
        handler = signal.getsignal(number)
        if handler == (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL):
            found[number] = handler
    return found


class _Wish:
    """The handler: when the last signal was obeyed, and once the block has been left, what was before it."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.before: dict[int, Any] | None = None

    def come(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.last is not None and now - self.last < AT_ONCE_SECONDS:
            return
        self.last = now
        if self.before is not None:
            self.restore()
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def restore(self) -> None:
        for number, handler in (self.before or {}).items():
            signal.signal(number, handler)


def _ignore(numbers: tuple[int, ...]) -> None:
    """So that the interpreter's own end, which takes handlers away, keeps its status."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
