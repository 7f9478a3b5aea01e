"""How many of the first samples are warm-up, judged by the samples themselves: a change-point test on ranks.

Under the hypothesis of no warm-up every order of the samples is equally likely. Against a first stretch of k
samples that is slower (or, before a processor gets hot, faster) than the rest, the rank sum of the first k,
standardised as Wilcoxon's, is extreme; the largest over k, the change-point's, is compared with the same
largest value over random orders of the same samples. The test is exact in level whatever the distribution,
and it is repeated on what is left, since warming up may have stages.

Pettitt, A non-parametric approach to the change-point problem, Applied Statistics 28 (1979); with the
variance of each k divided out, so that short stretches at the beginning count as much as half of all.

With several processes the samples are ranked within each and the sums added: a stretch is warm-up where it
is one in all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Probability that samples without any warm-up lose some.
LEVEL = 0.05

ORDERS = 999

#: No warm-up longer than half of this many samples is looked for.
MOST_SAMPLES = 400


def warmup_length(processes: Sequence[Sequence[float]], level: float = LEVEL, seed: int = 0) -> int:
    """How many of the first samples of each process to leave out; never more than half of the shortest.

    Six samples of one process can show nothing at 5 %: of the 20 choices of three among six, 2 are as extreme.
    Seven or eight begin to.
    """
    rows = [np.asarray(process, float)[:MOST_SAMPLES] for process in processes if len(process)]
    if not rows:
        return 0
    most, dropped = min(map(len, rows)) // 2, 0
    rng = np.random.default_rng(seed)
    while dropped < most:
        k, p = _change(rows, most - dropped, rng)
        if not p <= level:
            break
        dropped += k
        rows = [row[k:] for row in rows]
    return dropped


def _change(rows: Sequence[np.ndarray], most: int, rng: np.random.Generator) -> tuple[int, float]:
    """The likeliest length (at most ``most``) of a first stretch that differs, and its p-value."""
    ranked = [_ranks(row) for row in rows]
    ks = np.arange(1, most + 1)
    variance = sum(np.var(r, ddof=1) * ks * (len(r) - ks) / len(r) for r in ranked)
    if not np.all(variance > 0):  # every sample the same
        return 0, 1.0

    def score(orders: Sequence[np.ndarray]) -> np.ndarray:
        """``(n_orders, most)``: distance of the first k ranks from what they are on average."""
        moved = sum(np.cumsum(order - order.mean(axis=1, keepdims=True), axis=1)[:, :most] for order in orders)
        distance: np.ndarray = np.abs(np.asarray(moved)) / np.sqrt(variance)
        return distance

    seen = score([r[None] for r in ranked])[0]
    orders = score([rng.permuted(np.tile(r, (ORDERS, 1)), axis=1) for r in ranked])
    # Equal but for rounding is equal.
    as_extreme = int(np.sum(orders.max(axis=1) >= seen.max() - 1e-9))
    return int(ks[np.argmax(seen)]), (1 + as_extreme) / (1 + ORDERS)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return shared
