"""What is happening, on stderr: each cell's result as it ends, and on a terminal a live line below."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from harness.plan import Cell


class Progress:
    """Shows results as they come; with ``live`` also the cell and the phase at work."""

    def __init__(self, stream: TextIO, total: int, live: bool) -> None:
        self._stream = stream
        self._total = total
        self._cell: Cell | None = None
        self._index = 0
        self._began = time.monotonic()
        self._bar = _Bar(stream, total) if live else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, cell: Cell, phase: str) -> None:
        """``cell`` is now doing ``phase``."""
        if cell != self._cell:
            self._cell, self._index = cell, self._index + 1
        if self._bar is not None:
            self._bar.show(self._index, f"{cell}: {phase}")

    def done(self, text: str) -> None:
        """The cell at work has ended with the result ``text``; stays on the screen."""
        seconds = time.monotonic() - self._began
        line = f"[{self._index}/{self._total}, {seconds:.0f} s] {self._cell}: {text}"
        if self._bar is not None:
            self._bar.print(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


class _Bar:
    """rich's progress bar, imported only where somebody looks at it."""

    def __init__(self, stream: TextIO, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._progress = RichProgress(*columns, console=Console(file=stream), transient=True)
        self._task = self._progress.add_task("", total=total)
        self._progress.start()

    def show(self, index: int, text: str) -> None:
        self._progress.update(self._task, completed=index - 1, description=text)

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()
