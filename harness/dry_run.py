"""What a run would do: its cells with estimated time and memory; nothing is loaded, nothing stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backends.api import Unavailable
from backends.index import load_backend
from harness.budget import GIB
from harness.estimate import estimate
from harness.measure import Sampling
from harness.plan import Cell, Plan
from harness.session import check_usable
from harness.status import Ran

Records = list[dict[str, Any]]

#: What a sweep may vary, shown where it does.
_POINTS = ("threads", "prompt_tokens", "decode_tokens", "batch")


@dataclass(frozen=True)
class Foreseen:
    """A cell with predicted seconds and bytes; ``reason`` is why it would not run."""

    cell: Cell
    seconds: float
    bytes: int
    reason: str | None


def foresee(planned: Plan, sampling: Sampling | None) -> list[Foreseen]:
    """What each cell would come to, in order."""
    found = []
    for cell in planned.cells:
        guess = estimate(cell, sampling)
        reason = guess.short
        try:
            check_usable(cell.backend, load_backend(cell.backend))
        except Unavailable as error:
            reason = str(error)
        found.append(Foreseen(cell, guess.seconds, guess.bytes, reason and f"UNAVAILABLE: {reason}"))
    return found


def records(planned: Plan, cells: Sequence[Foreseen]) -> Records:
    """One flat record per cell and per refusal."""
    return [
        {
            "backend": it.cell.backend,
            "scheme": it.cell.scheme,
            "hardware": it.cell.hardware.name,
            "model": it.cell.model,
            "threads": it.cell.threads,
            **vars(it.cell.workload),
            "seconds": None if it.reason else round(it.seconds, 1),
            "memory_bytes": it.bytes,
            "reason": it.reason,
        }
        for it in cells
    ] + [
        {
            "backend": refusal.backend,
            "scheme": refusal.scheme,
            "hardware": refusal.hardware,
            "model": refusal.model,
            "seconds": None,
            "memory_bytes": None,
            "reason": f"{refusal.verdict}: {refusal.reason}",
        }
        for refusal in planned.refused
    ]


def for_people(found: Records) -> Records:
    """The same records with times and sizes as people read them."""
    swept = [key for key in _POINTS if len({record[key] for record in found if key in record}) > 1]
    return [
        {
            **{key: record[key] for key in ("backend", "scheme", "hardware", "model")},
            **{key.removesuffix("_tokens"): record.get(key) for key in swept},
            "time": None if record["seconds"] is None else duration(record["seconds"]),
            "memory": None if record["memory_bytes"] is None else f"{record['memory_bytes'] / GIB:.1f} GiB",
            "would run": record["reason"] or "yes",
        }
        for record in found
    ]


def total(cells: Sequence[Foreseen]) -> str:
    """How many cells, how long, how much."""
    running = [it for it in cells if it.reason is None]
    most = max((it.bytes for it in running), default=0)
    count = f"{len(running)} of {len(cells)} cells would run"
    if not running:
        return f"{count}; nothing was run"
    took = duration(sum(it.seconds for it in running))
    return f"{count}, about {took} and at most {most / GIB:.1f} GiB (predicted from a probe); nothing was run"


def would_run(cells: Sequence[Foreseen]) -> set[Ran]:
    """The cells that can run, as :func:`harness.status.unmet` takes them."""
    ready = [it.cell for it in cells if it.reason is None]
    return {Ran(c.backend, c.model, c.scheme, c.hardware.device, c.hardware.name, c.hardware.host) for c in ready}


def duration(seconds: float) -> str:
    """``0.5 s``, ``40 s``, ``12 min``, ``3.2 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
