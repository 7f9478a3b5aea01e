"""Flat records in named sections, as ``rwkv-bench list`` and ``--dry-run`` print them: text or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]

#: Schema of the JSON document.
SCHEMA = 1


def as_json(sections: Mapping[str, Records]) -> str:
    """One JSON document, an array per section."""
    return json.dumps({"schema": SCHEMA, **sections}, indent=1) + "\n"


def as_text(sections: Mapping[str, Records]) -> str:
    """Aligned columns, a blank line between sections."""
    return "\n".join(_section(name, records) for name, records in sections.items())


def _section(name: str, records: Records) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record))
    lines = [keys, *([_text(record.get(key)) for key in keys] for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return f"{name}:\n" + "".join(f"  {row}\n" for row in rows)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.0f} M"
    if isinstance(value, str) or not isinstance(value, Iterable):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return ", ".join(str(item) for item in value)
