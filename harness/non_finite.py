"""What is said of a checkpoint that holds NaN or Inf itself, whoever computes with it."""

from __future__ import annotations

from collections.abc import Sequence

from reference.weights import Weights, find_non_finite

#: Names that are told before the rest is counted.
_SHOWN = 4


def checkpoint_holds(weights: Weights) -> str:
    """``the checkpoint holds NaN or Inf in NAME``; empty where every number of ``weights`` is finite."""
    names = weights.non_finite or find_non_finite(weights)
    return f"the checkpoint holds NaN or Inf in {first(names)}" if names else ""


def first(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
