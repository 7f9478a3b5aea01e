"""Rows as they arrive: on disk at once, told on stderr cell by cell, kept for the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from harness.cache import state_folder
from harness.plan import Cell
from harness.progress import ENDED, Progress
from harness.rows import Row
from harness.store import StoreError, append, check_writable


class Collector:
    """``add`` and ``tell`` are what :func:`harness.run.run` calls; ``rows`` is what it gave.

    summary   rows of one cell -> one line
    """

    def __init__(self, store: Path, progress: Progress, summary: Callable[[Sequence[Row]], str]) -> None:
        self.store = store
        self.rows: list[Row] = []
        self.named: list[bool] = []
        self._progress = progress
        self._summary = summary
        self._cell: Cell | None = None
        self._of: dict[Cell, list[Row]] = {}

    def tell(self, cell: Cell, phase: str) -> None:
        """What a cell, of those that may be at work in turns, is doing; ENDED: it will do no more."""
        self._cell = cell
        self._progress.tell(cell, phase)
        if phase == ENDED:
            self._finish(cell)

    def add(self, row: Row, named: bool) -> None:
        """Store one row of the cell told last; ``named``: its cell was asked for by name."""
        append(self.store, row)
        self.rows.append(row)
        self.named.append(named)
        if self._cell is not None:
            self._of.setdefault(self._cell, []).append(row)

    def take_over(self, rows: Sequence[Row], named: bool) -> None:
        """Put rows that an earlier run has stored before those of this one."""
        self.rows[:0] = rows
        self.named[:0] = [named] * len(rows)

    def finish(self) -> None:
        """Tell the results of the cells that have any and have not ended."""
        for cell in list(self._of):
            self._progress.tell(cell, ENDED)
            self._finish(cell)

    def _finish(self, cell: Cell) -> None:
        rows = self._of.pop(cell, [])
        if rows:
            self._progress.done(self._summary(rows))


def store_path(option: str | None, make: bool = True) -> Path:
    """The store that ``--store`` names, or the user's own.

    With ``make`` it exists afterwards; raises StoreError if it cannot be written.
    """
    path = Path(option) if option else state_folder() / "rows.jsonl"
    if not make:
        return path
    if not option:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {path.parent}: {error.strerror}; name a file with --store") from None
    check_writable(path)
    return path
