"""Flat records in named sections, as ``rwkv-bench list`` and ``--dry-run`` print them: text or one JSON document."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

Records = Sequence[Mapping[str, Any]]

#: A column is never wrapped to fewer characters.
_NARROWEST = 12

#: Schema of the JSON document.
SCHEMA = 1


def as_json(sections: Mapping[str, Records]) -> str:
    """One JSON document, an array per section."""
    return json.dumps({"schema": SCHEMA, **sections}, indent=1) + "\n"


def as_text(sections: Mapping[str, Records], width: int | None = None) -> str:
    """Aligned columns, a blank line between sections; the widest columns are wrapped to fit ``width``."""
    return "\n".join(_section(name, records, width) for name, records in sections.items())


def _section(name: str, records: Records, width: int | None) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record))
    lines = [keys, *([_text(record.get(key)) for key in keys] for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    while width is not None and sum(widths) + 2 * len(widths) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return f"{name}:\n" + "".join(f"  {row}\n" for line in lines for row in _rows(line, widths))


def _rows(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One record, as many lines as its longest cell needs."""
    cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(line, widths, strict=True)]
    return [
        "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*cells, fillvalue="")
    ]


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
