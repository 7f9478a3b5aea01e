"""Which runs were taken far enough apart in time to count one by one?

What disturbs a machine lasts, so runs that follow each other are alike, and few of them cannot show it: with one cell
and a dozen runs a side the test of :mod:`reports.verdict.dependence` seldom finds what raises a false alarm in every
fourth report. So it is how they were measured that counts: runs without a pause between them are one sitting, worth
one value, the median of its runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np

from reference.errors import InputError

#: Seconds from the end of a run to the beginning of the next one of another sitting. Recorded blocks are alike for
#: up to two minutes (``scripts/verdict_rates.py --lags``).
PAUSE = 300.0

#: Begin and end, in seconds since the epoch.
Span = tuple[float, float]


def sittings(spans: Sequence[Span]) -> list[list[int]]:
    """The runs of each sitting, by number, in order of time."""
    found: list[list[int]] = []
    end = -np.inf
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        if spans[i][0] - end >= PAUSE:
            found.append([])
        found[-1].append(i)
        end = max(end, spans[i][1])
    return found


def apart(arm: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """``(..., n)`` runs -> ``(..., sittings)``: the median of each sitting, in order of time."""
    groups = sittings(spans)
    if not groups:
        return arm
    return np.stack([np.median(arm[..., group], axis=-1) for group in groups], axis=-1)


def seconds(text: str) -> float:
    """A time as rows have it (ISO 8601, UTC where it says nothing else), since the epoch. Raises InputError."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise InputError(f"a row's time is {text!r}; a time such as 2026-01-02T03:04:05+00:00 is needed") from None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


def needed_text(needed: int | None) -> str:
    """What to do about a side that has one sitting: the next one may differ by more than its blocks do."""
    return f"give {needed} or more runs a side, {PAUSE / 60:g} min or more apart, or use ab"
