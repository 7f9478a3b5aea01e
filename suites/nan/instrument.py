"""What people do today: count what is not finite in everything a backend shows, and read the list from the top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from backends.api import Traceable


class Counted(NamedTuple):
    """A trace point with results that are not finite."""

    point: str
    nan: int
    inf: int


def counts(session: Traceable, tokens: Sequence[int]) -> list[Counted]:
    """Every such point of a traced run, in execution order."""
    found: list[Counted] = []

    def look(name: str, x: np.ndarray) -> None:
        nan, inf = int(np.isnan(x).sum()), int(np.isinf(x).sum())
        if nan or inf:
            found.append(Counted(name, nan, inf))

    session.trace(list(tokens), None, look)
    return found
