"""What a change costs: decode with it and without it, in turn, so that both see the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from time import monotonic

from harness.samples import LOOP, Sampling
from harness.session import Opened

#: Rounds of one sample each; fewer where they take longer than the budget.
ROUNDS = 7
BUDGET_SECONDS = 4.0
STEPS = 6

_ONE = Sampling(repeats=1, warmup=0)
_WARM = Sampling(repeats=1, warmup=1)


def cost(before: Opened, after: Opened, prompt: Sequence[int]) -> float:
    """Median over rounds of the ratio of decode speeds, ``after`` over ``before``; below 1 it is slower."""
    ratios: list[float] = []
    start = monotonic()
    while len(ratios) < ROUNDS and (len(ratios) < 3 or monotonic() - start < BUDGET_SECONDS):
        order = (before, after) if len(ratios) % 2 else (after, before)
        ns = {id(one): _decode(one, prompt, _ONE if ratios else _WARM) for one in order}
        ratios.append(ns[id(before)] / ns[id(after)])
    return statistics.median(ratios)


def _decode(opened: Opened, prompt: Sequence[int], sampling: Sampling) -> int:
    """Nanoseconds of some steps after the prompt."""
    return opened.meter.decode(prompt, STEPS, sampling, lambda text: None, LOOP).ns[0]
