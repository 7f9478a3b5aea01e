"""Does one cell diverge more than another? Both on the same positions of one text, compared position by position.

Two cells err at the same places of a text, where it is hard to predict: of the difference of their divergences, what
the places do to both is gone, and its interval is several times narrower than those of the two divergences. Its
blocks are those of :mod:`harness.quality.intervals`, so that what neighbouring positions have in common, with the
state carried through too, is in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.quality.intervals import LEAST_BLOCKS, Mean, mean

NO_WORSE, WORSE, UNDECIDED = "no worse", "worse", "undecided"

#: A difference below this, in nat, may be the rounding of the baseline (:mod:`harness.quality.baseline`).
ROUNDING = 1e-11


@dataclass(frozen=True)
class Against:
    """The cell that others are compared with. ``kl (n,)``: its divergence from the fp32 weights, in nat, at every
    position; ``None``: it has none, since it did not run or gave no logits."""

    backend: str
    scheme: str
    kl: np.ndarray | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.scheme}"


def paired(kl: np.ndarray, other: np.ndarray, blocks: np.ndarray) -> Mean:
    """Mean of ``kl - other``, both ``(n,)``, over blocks that begin at ``blocks``; 0 for the same cell, exactly."""
    return mean(kl - other, blocks)


def finding(difference: Mean) -> str:
    """What the interval of a difference says: all of it at most 0, all of it above, or neither."""
    if difference.interval is None:
        return NO_WORSE if not any(abs(block) > ROUNDING for block in difference.blocks) else UNDECIDED
    low, high = difference.interval
    if high <= ROUNDING:
        return NO_WORSE
    return WORSE if low > ROUNDING else UNDECIDED


def why(difference: Mean | None) -> str | None:
    """What keeps a difference undecided; ``None`` where it is decided. ``difference``: ``None``, there is no figure."""
    if difference is None:
        return "no figures"
    if finding(difference) != UNDECIDED:
        return None
    if difference.interval is None:
        return f"{len(difference.blocks)} blocks of {LEAST_BLOCKS}"
    return "its interval holds 0"


def compared(kl: np.ndarray, against: Against, blocks: np.ndarray) -> dict[str, Any]:
    """For the ``quality`` of a row of divergence: the other cell, its divergence, the difference, what follows."""
    about: dict[str, Any] = {"backend": against.backend, "scheme": against.scheme}
    if against.kl is None:
        return {**about, "value": None, "difference": None, "interval": None, "finding": UNDECIDED, "why": why(None)}
    difference = paired(kl, against.kl, blocks)
    return {
        **about,
        "value": float(np.mean(against.kl)),
        "difference": difference.value,
        "interval": None if difference.interval is None else list(difference.interval),
        "finding": finding(difference),
        "why": why(difference),
    }


def shortcoming(about: Mapping[str, Any], strict: bool) -> str | None:
    """Why a comparison (:func:`compared`) does not meet "no worse than"; ``strict``: it must be shown to be so."""
    found = about["finding"]
    if found == NO_WORSE or (found == UNDECIDED and not strict):
        return None
    other = f"{about['backend']} {about['scheme']}"
    if about["difference"] is None:
        return f"not shown to be no worse than {other}, which gave no figures"
    if about["interval"] is None:
        return f"not shown to be no worse than {other}: too few blocks for an interval"
    low, high = about["interval"]
    words = f"worse than {other}" if found == WORSE else f"not shown to be no worse than {other}"
    return f"{words}: divergence {about['difference']:+.3g} nat/token, 95 % from {low:+.3g} to {high:+.3g}"
