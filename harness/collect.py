"""Rows as they arrive: on disk at once, told on stderr cell by cell, kept for the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from harness.cache import state_folder
from harness.plan import Cell
from harness.progress import Progress
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
        self._since = 0

    def tell(self, cell: Cell, phase: str) -> None:
        """A cell starts or goes on to its next phase."""
        if cell != self._cell:
            self.finish_cell()
            self._cell, self._since = cell, len(self.rows)
        self._progress.tell(cell, phase)

    def add(self, row: Row, named: bool) -> None:
        """Store one row; ``named``: its cell was asked for by name."""
        append(self.store, row)
        self.rows.append(row)
        self.named.append(named)

    def finish_cell(self) -> None:
        """Tell the result of the cell at work, if it has any."""
        if self._cell is not None and len(self.rows) > self._since:
            self._progress.done(self._summary(self.rows[self._since :]))
        self._cell = None


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
