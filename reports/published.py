"""Figures that others have published: claims with a source, never mixed with what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from harness.rows import Row
from reference.schemes import SCHEMES

_FILE = Path(__file__).with_name("published.json")


def published_rows(hardware: str, schemes: Iterable[str] = ("all",)) -> list[Row]:
    """Published rows of a hardware, for schemes by name or class; what a source leaves out is null."""
    wanted = set(schemes)
    rows = [Row.from_dict(record) for record in json.loads(_FILE.read_text(encoding="utf-8"))["rows"]]
    return [row for row in rows if row.hardware == hardware and ("all" in wanted or wanted & _names(row))]


def _names(row: Row) -> set[str]:
    scheme = SCHEMES.get(row.scheme)
    return {row.scheme, row.scheme_class or (scheme.scheme_class if scheme else row.scheme)}
