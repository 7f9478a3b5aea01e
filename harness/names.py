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


def one_line(text: str) -> str:
    """What somebody else's code said, fit for a message: on one line, nothing in it that moves a cursor."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
