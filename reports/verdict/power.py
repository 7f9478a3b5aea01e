"""How small a slowdown the blocks at hand can show, and how many blocks a given one needs.

Both by running the very test on blocks drawn again from those at hand: bursts and coarse clocks count as they are.
The spread of a few blocks is known poorly, so it is taken at an upper bound (:func:`widened`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from reports.verdict.exact import MOST_BLOCKS, critical, fewest
from reports.verdict.permutation import Arms, estimate, statistic

#: Wanted chance to see a slowdown.
POWER = 0.95

#: Blocks asked for beyond those without which nothing can be certain: a burst may put one in the wrong place.
SPARE = 2

#: Reports drawn again to find a chance; one in twenty may miss.
DRAWS = 300

#: More blocks than this are not asked for: a smaller effect, or a quieter machine, is another question.
MOST_ASKED = 4096

_UPPER = 1.645  # standard normal quantile of 95 %

Noise = tuple[np.ndarray, np.ndarray]


def noise(arms: Arms) -> Noise:
    """What is left of ``base (n,)`` and ``head (m,)`` without their difference and centre, widened; for pairs twice
    that of the differences."""
    if arms.paired:
        left = arms.differences() - estimate(arms)
        return (left * widened(len(left) - 1),) * 2
    shift = estimate(arms)
    freedom = sum(arms.sizes) - 2
    centre = np.median(np.concatenate([arms.base, arms.head - shift]))
    return (arms.base - centre) * widened(freedom), (arms.head - shift - centre) * widened(freedom)


def widened(freedom: int) -> float:
    """How much larger a spread may be than what that many degrees of freedom show: its upper 95 % bound, for normal
    noise (chi-square quantile by Wilson & Hilferty, PNAS 17 (1931), 684)."""
    if freedom < 1:
        return math.inf
    part = 2 / (9 * freedom)
    return 1 / math.sqrt((1 - part - _UPPER * math.sqrt(part)) ** 3) if part + _UPPER * math.sqrt(part) < 1 else 10.0


def chance(found: Noise, paired: bool, blocks: tuple[int, int], effect: float, alpha: float, seed: int = 0) -> float:
    """Probability that an effect (of log time, beyond the margin) is significant at ``alpha`` with so many blocks."""
    least = critical(blocks[1], blocks[0], alpha, paired)
    return float(np.mean(statistic(_drawn(found, paired, blocks, seed), -effect) >= least))


def detectable(found: Noise, paired: bool, blocks: tuple[int, int], alpha: float, power: float = POWER) -> float:
    """Smallest effect (of log time, beyond the margin) that is seen with that power; inf if none is."""
    arms = _drawn(found, paired, blocks, 0)
    least = critical(blocks[1], blocks[0], alpha, paired)
    low, high = 0.0, 2 * float(np.ptp(np.concatenate([arms.base.ravel(), arms.head.ravel()]))) + 1e-6

    def seen(effect: float) -> bool:
        return float(np.mean(statistic(arms, -effect) >= least)) >= power

    if not seen(high):
        return math.inf
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


def needed(found: Noise, paired: bool, effect: float, alpha: float, power: float = POWER) -> int | None:
    """Blocks per arm, or pairs, with which that effect is seen with that power; None if more than MOST_ASKED."""
    if not effect > 0 or not all(np.isfinite(part).all() for part in found):
        return None
    least = fewest(alpha, paired) + SPARE

    def enough(n: int) -> bool:
        if n <= MOST_BLOCKS:
            return chance(found, paired, (n, n), effect, alpha) >= power
        # Merged to MOST_BLOCKS in the end: as if the noise of each were smaller by the root of how many it is of.
        scale = math.sqrt(n / MOST_BLOCKS)
        calm = (found[0] / scale, found[1] / scale)
        return chance(calm, paired, (MOST_BLOCKS, MOST_BLOCKS), effect, alpha) >= power

    high = least
    while not enough(high):
        if high >= MOST_ASKED:
            return None
        high = min(MOST_ASKED, high * 2)
    return _first(enough, max(least, high // 2), high)


def _first(enough: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest number from ``low`` to ``high`` that is enough; ``high`` is, and to one in sixteen is near enough."""
    while low < high and high - low > max(0, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def _drawn(found: Noise, paired: bool, blocks: tuple[int, int], seed: int) -> Arms:
    """``DRAWS`` reports of so many blocks, drawn with replacement; of pairs, signs drawn as well."""
    rng = np.random.default_rng(seed)
    n, m = blocks
    if paired:
        drawn = rng.choice(found[0], (DRAWS, n)) * rng.choice((-1.0, 1.0), (DRAWS, n))
        return Arms(np.zeros((DRAWS, n)), drawn, True)
    pool = np.concatenate(found)  # under the test's null both arms have one noise
    return Arms(rng.choice(pool, (DRAWS, n)), rng.choice(pool, (DRAWS, m)))
