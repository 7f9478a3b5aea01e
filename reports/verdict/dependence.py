"""Are neighbouring blocks alike? A permutation test of blocks that are not independent raises false alarms.

Of every arm, the lag-1 autocorrelation of the ranks of its blocks in the order of their time (Wald & Wolfowitz, Ann.
Math. Stat. 14 (1943), 378: mean -1/(n-1), variance near 1/n for independent blocks). What disturbs a machine
disturbs all cells, so the evidence of all arms of a report is taken together. Blocks that are alike are merged, two,
four, eight to one, until nothing shows any more, and once more to be safe: their means are nearly independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reports.verdict.exact import MOST_BLOCKS

#: Standard normal quantile beyond which neighbours count as alike: one report in two hundred by chance.
_ALIKE = 2.58

#: An arm of fewer blocks says nothing of its neighbours.
_FEWEST = 5


def merge_factor(arms: Sequence[np.ndarray]) -> int:
    """How many neighbours become one block: 1 where they are independent, else a power of two."""
    factor = 1
    while alike([merged(arm, factor) for arm in arms]):
        factor *= 2
    return factor if factor == 1 else 2 * factor


def alike(arms: Sequence[np.ndarray]) -> bool:
    """Whether neighbours are more alike than chance makes them, over all arms together."""
    by_length: dict[int, list[np.ndarray]] = {}
    for arm in arms:
        if len(arm) >= _FEWEST:
            by_length.setdefault(len(arm), []).append(arm)
    if not by_length:
        return False
    excess = sum(n * float((autocorrelations(np.stack(own)) + 1 / (n - 1)).sum()) for n, own in by_length.items())
    return excess / math.sqrt(sum(n * len(own) for n, own in by_length.items())) > _ALIKE


def autocorrelation(arm: np.ndarray) -> float:
    """Lag-1 autocorrelation of the ranks of ``(n,)`` values in order of time; 0 where all are one value."""
    return float(autocorrelations(arm[None])[0])


def autocorrelations(arms: np.ndarray) -> np.ndarray:
    """The same of each of ``(arms, n)``: ``(arms,)``."""
    ranks = np.argsort(np.argsort(arms, axis=1, kind="stable"), axis=1) - (arms.shape[1] - 1) / 2
    found = (ranks[:, 1:] * ranks[:, :-1]).sum(axis=1) / np.square(ranks).sum(axis=1)
    return np.asarray(np.where(np.ptp(arms, axis=1) > 0, found, 0.0))


def likeness(values: np.ndarray, lag: int) -> float:
    """Correlation of the ranks of ``(n,)`` values in order of time with those ``lag`` later."""
    ranks = np.argsort(np.argsort(values, kind="stable")) - (len(values) - 1) / 2
    return float((ranks[lag:] * ranks[:-lag]).mean() / np.square(ranks).mean())


def merged(arm: np.ndarray, factor: int) -> np.ndarray:
    """Means of ``factor`` neighbours at a time, the last axis; what is left over at the beginning is left out."""
    if factor == 1:
        return arm
    kept = arm.shape[-1] // factor
    found = arm[..., arm.shape[-1] - kept * factor :]
    return np.asarray(found.reshape(*arm.shape[:-1], kept, factor).mean(axis=-1))


def countable(arm: np.ndarray) -> int:
    """Factor by which an arm comes to no more blocks than can be counted."""
    return max(1, math.ceil(len(arm) / MOST_BLOCKS))
