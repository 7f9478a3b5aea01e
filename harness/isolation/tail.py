"""What a child prints: drained, so that a flood neither blocks it nor fills memory or disk; its end is kept.

Needs only the standard library, and Python 3.9.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from typing import IO

_KEPT_BYTES = 32 << 10
_LINE_CHARACTERS = 200


class Tail:
    """Reads a pipe to its end in a thread."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._pipe = pipe
        self._kept: deque[bytes] = deque()
        self._size = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, name="tail", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the pipe; somebody who escaped the group may hold it open."""
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._pipe.close()

    def lines(self) -> list[str]:
        """The last lines, printable, without empty ones."""
        with self._lock:
            text = b"".join(self._kept)[-_KEPT_BYTES:].decode("utf-8", "replace")
        shown = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines())
        return [line[:_LINE_CHARACTERS] for line in shown if line]

    def _drain(self) -> None:
        with suppress(OSError, ValueError):
            while block := os.read(self._pipe.fileno(), 1 << 16):
                with self._lock:
                    self._kept.append(block)
                    self._size += len(block)
                    while self._size - len(self._kept[0]) > _KEPT_BYTES:
                        self._size -= len(self._kept.popleft())
