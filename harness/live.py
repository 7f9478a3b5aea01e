"""One line on stderr that says what is happening; on a terminal it changes, elsewhere only results are lines."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import TextIO


def printable(text: str) -> str:
    """One line without what would move the cursor or colour the screen: an installer's lines come through here."""
    return "".join(c if c.isprintable() else " " for c in text)


class LiveLine:
    """``show`` replaces the line at the bottom of a terminal; ``done`` leaves one that stays."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._status = None
        if stream.isatty():
            from rich.console import Console

            self._console = Console(file=stream)
            self._status = self._console.status("")
            self._status.start()

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            with suppress(OSError):
                self._status.stop()

    def show(self, text: str) -> None:
        """What is happening now."""
        if self._status is not None:
            from rich.text import Text

            with suppress(OSError):
                width = max(20, self._console.width - 4)
                self._status.update(Text(printable(text)[:width], no_wrap=True))

    def done(self, text: str) -> None:
        """What has happened; stays on the screen."""
        line = f"[{time.monotonic() - self._began:.0f} s] {printable(text)}"
        with suppress(OSError):
            if self._status is not None:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                self._stream.write(line + "\n")
                self._stream.flush()
