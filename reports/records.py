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
    least = [min(most, max(_NARROWEST, longest)) for most, longest in zip(widths, _words(lines), strict=True)]
    room = None if width is None else width - 2 * len(widths)
    if room is not None and sum(least) > room:
        return f"{name}:\n" + "".join(_block(keys, line, width or 0) for line in lines[1:])
    while room is not None and sum(widths) > room:
        spare = [w if w > low else 0 for w, low in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return f"{name}:\n" + "".join(f"  {row}\n" for line in lines for row in _rows(line, widths))


def _words(lines: Sequence[Sequence[str]]) -> list[int]:
    """Length of the longest word of each column: it is not broken."""
    return [
        max((len(word) for cell in column for word in cell.split()), default=0) for column in zip(*lines, strict=True)
    ]


def _block(keys: Sequence[str], line: Sequence[str], width: int) -> str:
    """One record below another, where its columns do not fit beside each other."""
    margin = 4 + max(map(len, keys))
    text = ""
    for key, cell in zip(keys, line, strict=True):
        wrapped = textwrap.wrap(cell, max(_NARROWEST, width - margin), break_on_hyphens=False, break_long_words=False)
        text += "".join(f"  {key if not i else '':{margin - 2}}{part}\n" for i, part in enumerate(wrapped))
    return text + "\n"


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
