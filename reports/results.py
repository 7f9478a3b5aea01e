"""Several result files as one list of rows: read, joined, copies dropped by rule, and what was noticed said.

A copy of a row, equal in every field, is dropped. Two rows of one identity (run, time, kind, metric, cell) that
differ are one result that somebody changed: the one read first stands, and both places are named.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.rows import Row, identity
from harness.store import TruncatedStore, read

#: So many places are named one by one; more are counted.
_NAMED = 3


@dataclass(frozen=True)
class Results:
    """Rows of all files, in the order of the files, and a line for each thing noticed while reading."""

    rows: tuple[Row, ...]
    files: tuple[str, ...]
    said: tuple[str, ...] = ()


def read_results(paths: Sequence[str | os.PathLike[str]]) -> Results:
    """Read and join. Raises StoreError for a file that cannot be read or is not ours: all of it or nothing."""
    rows: list[Row] = []
    places: list[str] = []
    said: list[str] = []
    for path in paths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncatedStore)
            found = read(path)
        said += [str(warning.message) for warning in caught if issubclass(warning.category, TruncatedStore)]
        if not found:
            said.append(f"{os.fspath(path)}: no rows in it")
        rows += found
        places += [f"{os.fspath(path)}, row {i}" for i in range(1, len(found) + 1)]
    kept, dropped = _once(rows, places)
    return Results(tuple(kept), tuple(os.fspath(path) for path in paths), (*said, *dropped))


def _once(rows: Sequence[Row], places: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Each result once, and what is said of those left out."""
    first: dict[tuple[Any, ...], int] = {}
    kept: list[Row] = []
    copies: list[str] = []
    changed: list[str] = []
    for i, row in enumerate(rows):
        key = _key(row)
        at = first.setdefault(key, i)
        if at == i:
            kept.append(row)
        elif rows[at] == row:
            copies.append(f"{places[i]} (of {places[at]})")
        else:
            changed.append(f"{places[i]} differs from {places[at]}, though run, time and cell are the same: left out")
    return kept, [*_copies(copies), *changed]


def _key(row: Row) -> tuple[Any, ...]:
    """Identity of a row; what has no run and time, as a published figure, is only what all of it says."""
    if row.run is None or row.time is None:
        return (*identity(row), row.value, row.interval, row.samples, row.reason, str(row.extra))
    return identity(row)


def _copies(found: Sequence[str]) -> list[str]:
    if not found:
        return []
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    rows = "1 row" if len(found) == 1 else f"{len(found)} rows"
    return [f"{rows} left out as copies: {'; '.join(found[:_NAMED])}{more}"]
