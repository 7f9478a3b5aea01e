"""Why tests were skipped, told once for each reason: cells of one backend that lack the same are one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

#: How a cell begins the reason that it was not opened for: ``triton q0f16 on cpu, model tiny: no CUDA driver``.
_CELL = re.compile(
    r"(?P<backend>\S.*) (?P<scheme>\S+) on (?P<device>\S+), model (?P<model>\S+): (?P<why>.+)", re.DOTALL
)


def folded(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """``182 triton (fp32, fp16) on cpu: no CUDA driver here``, the most frequent first.

    ``skipped``: reason and place of each test; the place is told of what no other test says.
    """
    counts: dict[tuple[str, str], int] = {}
    places: dict[tuple[str, str], str] = {}
    schemes: dict[tuple[str, str], dict[str, None]] = {}
    for reason, place in skipped:
        cell = _CELL.fullmatch(reason)
        key = (f"{cell['backend']}|{cell['device']}", cell["why"]) if cell else ("", reason)
        counts[key] = counts.get(key, 0) + 1
        places[key] = place
        schemes.setdefault(key, {}).update({cell["scheme"]: None} if cell else {})
    lines = []
    for key in sorted(counts, key=lambda key: -counts[key]):
        backend, _, device = key[0].partition("|")
        cells = f"{backend} ({', '.join(schemes[key])}) on {device}: " if backend else ""
        where = f" ({places[key]})" if counts[key] == 1 and places[key] else ""
        lines.append(f"{counts[key]:5} {cells}{' '.join(key[1].split())}{where}")
    return lines


def reason_of(longrepr: object) -> tuple[str, str]:
    """Reason and place in what pytest keeps of a skipped test: a file, a line and ``Skipped: REASON``."""
    if isinstance(longrepr, Sequence) and len(longrepr) == 3:
        return str(longrepr[2]).removeprefix("Skipped: "), f"{os.path.basename(str(longrepr[0]))}:{longrepr[1]}"
    return str(longrepr), ""
