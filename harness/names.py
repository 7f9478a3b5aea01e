"""A wrong name -> the nearest right one, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'torch'? `` with its trailing space, or nothing if no name is near.

    Case is ignored, and an O for a zero is one letter less wrong than another digit.
    """
    folded = {_folded(word): word for word in known}
    near = difflib.get_close_matches(_folded(name), folded, n=1, cutoff=0.5)
    return f"did you mean {folded[near[0]]!r}? " if near else ""


def _folded(name: str) -> str:
    return name.lower().replace("o", "0")
