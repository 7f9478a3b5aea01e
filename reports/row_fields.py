"""Figures that a row may carry beside its own: percentiles, blocks left out, the revision, what the roofline rests on.

One place knows their names; a row without one gives None, never a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.rows import Row


def field(row: Row, name: str) -> Any:
    """A field by name, known to this version or not."""
    return getattr(row, name, None) if name not in row.extra else row.extra[name]


def leave_outs(row: Row) -> str:
    """How many blocks were left out under disturbance, and why; empty where the row does not say."""
    found = field(row, "left_out")
    if isinstance(found, Mapping):
        total = sum(n for n in found.values() if isinstance(n, int))
        why = ", ".join(f"{n} {reason}" for reason, n in found.items() if n)
        return f"{_blocks(total)} left out" + (f" ({why})" if why else "")
    if isinstance(found, (list, tuple)):
        return f"{_blocks(len(found))} left out"
    return f"{_blocks(found)} left out" if isinstance(found, int) else ""


def left_out_count(row: Row) -> int | None:
    """How many blocks were left out; None where the row does not say."""
    found = field(row, "left_out")
    if isinstance(found, Mapping):
        return sum(n for n in found.values() if isinstance(n, int))
    if isinstance(found, (list, tuple)):
        return len(found)
    return found if isinstance(found, int) else None


def percentiles(row: Row) -> dict[int, float]:
    """Percent -> nanoseconds of a step, where the row carries them ready made."""
    found = field(row, "percentiles")
    if not isinstance(found, Mapping):
        return {}
    return {int(str(name).lstrip("p")): float(ns) for name, ns in found.items() if isinstance(ns, (int, float))}


def revision(row: Row) -> str | None:
    """The commit that was measured, short, where the row says so."""
    for name in ("commit", "revision"):
        found = field(row, name)
        if isinstance(found, str) and found:
            return found[:12]
    return None


def device_bytes(row: Row) -> int | None:
    """Peak memory of the device, where the row tells it apart from the host's."""
    found = field(row, "device_peak_bytes")
    return found if isinstance(found, int) else None


def _blocks(n: int) -> str:
    return "1 block" if n == 1 else f"{n} blocks"
