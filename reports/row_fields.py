"""Figures that a row carries beside its own: percentiles of a step, blocks left out, the revision, its roofline.

One place knows their names; a row without one gives nothing, never a default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.rows import Row
from harness.stats import step_percentiles
from reports.digits import number

_NS = 1e9


@dataclass(frozen=True)
class Roofline:
    """What a figure is a fraction of, or why it is of nothing.

    rate    byte/s for decode, FLOP/s for prefill
    """

    fraction: float | None = None
    of: str = ""
    rate: float | None = None
    unit: str = ""
    reason: str = ""


def roofline(row: Row) -> Roofline:
    """As the row has it; all unknown for a row of an older version."""
    told = row.extra.get("roofline")
    told = told if isinstance(told, Mapping) else {}
    rate = told.get("rate")
    return Roofline(
        row.roofline_fraction,
        str(told.get("of", "")),
        float(rate) if isinstance(rate, (int, float)) and rate > 0 else None,
        str(told.get("unit", "")),
        str(told.get("reason", "")),
    )


def roofline_text(row: Row) -> str:
    """``34 % of read bandwidth, 38.2 GB/s``, or why there is none."""
    found = roofline(row)
    if found.fraction is None:
        return found.reason
    rate = ""
    if found.rate is not None:
        unit = {"byte/s": "B/s"}.get(found.unit, found.unit)
        tera = found.rate >= 1e12
        rate = f", {number(found.rate / (1e12 if tera else 1e9))} {'T' if tera else 'G'}{unit}"
    return f"{100 * found.fraction:.0f} % of {found.of or 'the roofline'}{rate}"


def left_out(row: Row) -> int:
    """Blocks left out of value and interval because the machine did something else meanwhile."""
    return sum(bool(block.get("left_out")) for block in row.blocks or ())


def blocks_text(row: Row) -> str:
    """``3 of 12 blocks left out (2 others, 1 steal)``; empty where nothing was disturbed."""
    blocks = row.blocks or ()
    why = Counter(str(block["disturbed"]) for block in blocks if block.get("disturbed"))
    if not why:
        return ""
    out = left_out(row)
    reasons = ", ".join(f"{n} {reason}" for reason, n in why.most_common())
    if out:
        return f"{out} of {len(blocks)} blocks left out ({reasons})"
    return f"{sum(why.values())} of {len(blocks)} blocks disturbed and yet used ({reasons})"


def excluded_samples(row: Row) -> set[int]:
    """Positions of samples that lie in blocks left out."""
    blocks = [block for block in row.blocks or () if block.get("left_out")]
    return {i for block in blocks for i in range(block["start"], block["start"] + block["count"])}


def percentiles_text(row: Row) -> str:
    """``p50 3.1 ms · p90 3.4 ms · p99 5.2 ms``; empty where there are no steps."""
    found: dict[str, float] = dict(row.percentiles or {})
    if not found and row.steps and any(row.steps):
        found = {f"p{percent}": ns / _NS for percent, ns in step_percentiles(row.steps).items()}
    known = {name: s for name, s in found.items() if isinstance(s, (int, float))}
    return " · ".join(f"{name} {number(1e3 * seconds)} ms" for name, seconds in known.items())


def revision(row: Row) -> str | None:
    """The commit that was measured, short, where the row says so; ``-dirty``: with changes."""
    for name in ("commit", "revision"):
        found = row.extra.get(name)
        if isinstance(found, str) and found:
            commit, dirty, _ = found.partition("-dirty")
            return commit[:12] + dirty
    return None


def device_bytes(row: Row) -> int | None:
    """Peak memory of the device, where the row tells it apart from the host's."""
    found: Any = row.extra.get("device_peak_bytes")
    return found if isinstance(found, int) else None
