"""What is happening, on stderr: each cell's result as it ends, and on a terminal a live line below."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from harness.plan import Cell

#: The phase of a cell that will do no more.
ENDED = ""


class Progress:
    """Shows results as they come; with ``live`` also the cell and the phase at work.

    A stream that can no longer be written to does not end the run: what it would have shown is lost.
    """

    def __init__(self, stream: TextIO, cells: Sequence[Cell], live: bool) -> None:
        self._stream = stream
        self._cells = cells
        self._cell: Cell | None = None
        self._done = 0
        self._began = time.monotonic()
        self._bar = _Bar(stream, len(cells)) if live and cells else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()

    def tell(self, cell: Cell, phase: str) -> None:
        """``cell`` is now doing ``phase``."""
        self._cell = cell
        if self._bar is not None and phase != ENDED:
            self._bar.show(self._done, f"{self._label(cell)}: {phase}")

    def done(self, text: str) -> None:
        """The cell told last has ended with the result ``text``; stays on the screen."""
        seconds = time.monotonic() - self._began
        self._done += 1
        label = "" if self._cell is None else self._label(self._cell)
        line = f"[{self._done}/{len(self._cells)}, {seconds:.0f} s] {label}: {text}"
        with suppress(OSError):
            if self._bar is not None:
                self._bar.print(line)
            else:
                self._stream.write(line + "\n")
                self._stream.flush()

    def _label(self, cell: Cell) -> str:
        """Backend and scheme; hardware and model where there are several."""
        words = [cell.backend, cell.scheme]
        if len({other.hardware.name for other in self._cells}) > 1:
            words += ["on", cell.hardware.name]
        if len({other.model for other in self._cells}) > 1:
            words.append(cell.model)
        return " ".join(words)


class _Bar:
    """rich's progress bar, imported only where somebody looks at it."""

    def __init__(self, stream: TextIO, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        self._progress = RichProgress(*columns, console=Console(file=stream), transient=True)
        self._task = self._progress.add_task("", total=total)
        self._progress.start()

    def show(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, description=text)

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()
