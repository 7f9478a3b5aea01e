"""Earlier rows of a store: figures that another program printed, and what was measured on hardware not here now."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.rows import Row, identity
from harness.samples import Workload
from harness.store import read
from reference.schemes import SCHEMES

#: Rows of hardware on which ``gpu-check`` has run, one file each.
COMMITTED = Path(__file__).parents[1] / "reports" / "recorded"


def recorded_rows(store: str | os.PathLike[str], hardware: str, schemes: Iterable[str] = ("all",)) -> list[Row]:
    """Recorded rows of a hardware, for schemes by name or class; a row that was imported twice comes once.

    No store, no rows. Raises :class:`harness.store.StoreError` for one that cannot be read.
    """
    wanted = set(schemes)
    rows: dict[object, Row] = {}
    for row in _recorded(store):
        if row.hardware == hardware and ("all" in wanted or wanted & _names(row)):
            rows.setdefault(identity(row), row)
    return list(rows.values())


def every_recorded(store: str | os.PathLike[str]) -> list[Row]:
    """Recorded rows of any hardware, each once."""
    return list({identity(row): row for row in _recorded(store)}.values())


def measured_rows(store: str | os.PathLike[str], hardware: str) -> list[Row]:
    """What was measured on a hardware before, here or through the inventory, the latest last."""
    path = Path(store)
    return [row for row in read(path) if row.kind == "measured" and row.hardware == hardware] if path.exists() else []


def recorded_names(store: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Hardware and models that recorded rows of a store already bear."""
    rows = _recorded(store)
    return list(dict.fromkeys(row.hardware for row in rows)), list(dict.fromkeys(row.model for row in rows))


def known_workload(metric: str, prompt: int | None, output: int | None) -> Workload | None:
    """The workload of a printed figure, where as much of it is known as the metric depends on."""
    if prompt is None or prompt < 1 or (metric == "decode" and not output):
        return None
    return Workload(prompt, output or 0)


def _recorded(store: str | os.PathLike[str]) -> list[Row]:
    """Of the store, and of the files that come with this project; what was only rehearsed is nobody's figure."""
    files = [path for path in (Path(store), *sorted(COMMITTED.glob("*.jsonl"))) if path.exists()]
    return [row for path in files for row in read(path) if row.kind == "recorded" and not _rehearsed(row)]


def _rehearsed(row: Row) -> bool:
    told = row.extra.get("gpu_check")
    return isinstance(told, Mapping) and bool(told.get("rehearsal"))


def _names(row: Row) -> set[str]:
    scheme = SCHEMES.get(row.scheme)
    return {row.scheme, row.scheme_class or (scheme.scheme_class if scheme else row.scheme)}
