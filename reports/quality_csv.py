"""Quality rows as CSV: what every table of rows has, and on what each was measured, one column each."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from harness.rows import Row
from reports import tables

#: Keys of a row's ``quality`` that are columns.
ABOUT = ("text", "positions", "context", "blocks", "documents", "ids_sha256", "fp32", "times_fp32")

#: Its parts with an interval of their own: key -> its number, beside ``interval``.
PARTS = {"weights": "value", "kernel": "value", "against": "difference"}

_NAMED = ("against_backend", "against_scheme", "against_value", "against_finding", "against_why")


def to_csv(rows: Sequence[Row]) -> str:
    """Every row, one line each, raw samples left out; no column that no row has anything for."""
    records = list(csv.DictReader(io.StringIO(tables.to_csv(rows))))
    if not records:
        return tables.to_csv(rows)
    more = [_columns(row) for row in rows]
    names = [name for name in _names() if any(found.get(name) is not None for found in more)]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*records[0], *names], lineterminator="\n")
    writer.writeheader()
    for record, found in zip(records, more, strict=True):
        writer.writerow({**record, **{name: found.get(name) for name in names}})
    return out.getvalue()


def _names() -> list[str]:
    """Of all columns, in their order."""
    parts = [f"{part}_{end}" for part in PARTS for end in (PARTS[part], "low", "high")]
    return [*ABOUT, "times_fp32_low", "times_fp32_high", *parts, *_NAMED]


def _columns(row: Row) -> dict[str, Any]:
    about = row.quality or {}
    found = {name: about.get(name) for name in ABOUT}
    found["times_fp32_low"], found["times_fp32_high"] = about.get("times_fp32_interval") or (None, None)
    for part, key in PARTS.items():
        share = about.get(part) or {}
        found[f"{part}_{key}"] = share.get(key)
        found[f"{part}_low"], found[f"{part}_high"] = share.get("interval") or (None, None)
    for name in _NAMED:
        found[name] = (about.get("against") or {}).get(name.removeprefix("against_"))
    return found
