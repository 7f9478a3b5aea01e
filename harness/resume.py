"""Continue a broken run: which cells of a plan have finished rows in the store, so that only the others are measured.

Every row that is timed names, under ``session``, what was asked of its cell and by which code: backend, scheme,
place, the model's content, threads, workload, sampling, seed, how its process is run, the source of
``reference``, ``backends`` and ``harness``, and the versions of the runtime and of what it computes with. A cell is
finished where a run has told its decode row: a speed, or the verdict that there is none. What was interrupted,
crashed or hung, or was not available, is measured again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import harness
import reference
from backends.index import LIBRARIES, load_backend
from harness.isolation.start import environment
from harness.plan import Cell, Request
from harness.rows import Row
from harness.samples import INTERRUPTED, Sampling
from harness.session import version
from harness.store import read

_AGAIN = ("CRASHED", "TIMEOUT", "UNAVAILABLE")


#: What runtimes compute with whose own version says nothing of it.
_LIBRARIES = ("numpy", "torch")


@dataclass(frozen=True)
class Earlier:
    """Rows that are taken over, the cells left to measure, and what to tell the user."""

    rows: tuple[Row, ...]
    left: tuple[Cell, ...]
    message: str


def earlier(store: Path, cells: Sequence[Cell], session_of: Callable[[Cell], str]) -> Earlier:
    """What of ``cells`` the store has finished; ``session_of`` a cell is :func:`session`. Raises StoreError."""
    stored = read(store) if store.exists() else []
    finished = _finished(stored)
    names = {cell: session_of(cell) for cell in cells}
    rows = [row for cell in cells for row in finished.get(names[cell], ())]
    left = [cell for cell in cells if names[cell] not in finished]
    return Earlier(tuple(rows), tuple(left), _message(store, cells, left, rows, stored))


def session(cell: Cell, model_sha256: str, request: Request, sampling: Sampling) -> str:
    """Sixteen hex digits that are equal only where the same was asked of the same cell by the same code and runtime."""
    asked = {
        "backend": [cell.backend, os.environ.get(LIBRARIES.get(cell.backend, ""))],
        "scheme": cell.scheme,
        "place": [cell.hardware.name, cell.hardware.device, cell.hardware.detail, cell.hardware.host],
        "model": [cell.model, model_sha256],
        "threads": cell.threads,
        "workload": vars(cell.workload),
        "sampling": sampling.to_dict(),
        "seed": request.seed,
        "process": [request.isolate, request.timeout, request.placement and str(request.placement)],
        "code": code_version(cell.backend),
        "runtime": runtime(cell),
    }
    return _digest(json.dumps(asked, sort_keys=True, default=str).encode())


@lru_cache(maxsize=64)
def code_version(backend: str) -> str:
    """Of the source that measures a backend, its own included, as it lies here."""
    at = Path(inspect.getfile(load_backend)).parent
    files = [at / "api.py", at / "index.py", *(at / "shared").rglob("*.py"), *_source(backend)]
    for package in (reference, harness):
        files += Path(str(package.__file__)).parent.rglob("*.py")
    told = hashlib.sha256()
    for file in sorted(files):
        told.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return told.hexdigest()[:16]


def runtime(cell: Cell) -> list[str] | None:
    """Versions of what computes a cell on this machine; ``None`` on a host, which is not asked before it measures."""
    if cell.hardware.host is not None:
        return None
    module = load_backend(cell.backend)
    try:
        apart = environment(cell.backend, module)
        if apart is not None:
            return [apart.version, *apart.lock]
        told = version(module)
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and says so when it is opened
        told = type(error).__name__
    libraries = [f"{name} {_installed(name)}" for name in _LIBRARIES]
    return [f"{cell.backend} {told}", f"Python {platform.python_version()}", *libraries]


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _source(backend: str) -> list[Path]:
    """The file of a backend, which may lie outside, or all of its package."""
    file = Path(str(load_backend(backend).__file__))
    return list(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _finished(stored: Sequence[Row]) -> dict[str, list[Row]]:
    """Session -> the rows of the last run that finished it."""
    by_run: dict[tuple[str, str], list[Row]] = {}
    for row in stored:
        if row.session is not None and row.run is not None:
            by_run.setdefault((row.session, row.run), []).append(row)
    return {name: rows for (name, _), rows in by_run.items() if _is_whole(rows)}


def _is_whole(rows: Sequence[Row]) -> bool:
    """Whether these rows of one cell are all that it has to tell."""
    broken = any(row.verdict in _AGAIN or row.stopped == INTERRUPTED for row in rows)
    return not broken and any(row.metric == "decode" for row in rows)


def _message(
    store: Path, cells: Sequence[Cell], left: Sequence[Cell], rows: Sequence[Row], stored: Sequence[Row]
) -> str:
    done = len(cells) - len(left)
    if not done:
        known = {(row.backend, row.scheme, row.model, row.device) for row in stored if row.session is not None}
        alike = any((cell.backend, cell.scheme, cell.model, cell.hardware.device) in known for cell in cells)
        why = "; what it has of these cells is unfinished, or of other options or code" if alike else ""
        return f"resume: {store} has no finished cell of this plan{why}; everything is measured"
    runs = dict.fromkeys(f"{row.run}" for row in rows)
    of = f"{'run' if len(runs) == 1 else 'runs'} {', '.join(runs)}"
    rest = f"{len(left)} to measure" if left else "nothing is left to measure"
    return f"resume: {done} of {len(cells)} cells taken over from {of} in {store}; {rest}"
