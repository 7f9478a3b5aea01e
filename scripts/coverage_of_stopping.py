"""How often the interval covers the median when measuring stops as soon as it is narrow: exactly, and by simulation.

    python scripts/coverage_of_stopping.py [--runs 1000]

Exactly: how many of n samples lie below the median is a walk with steps of 0 or 1, each with probability 1/2,
for any continuous distribution. The interval of a look misses where the walk is beyond its rank. Carrying the
walk's distribution from look to look gives the probability that any look misses: a bound for every rule of
stopping at looks, whatever it looks at.

By simulation: the code that measures (:class:`harness.blocks.Blocks`), fed with times of several distributions, with
warm-up judged and cut off, until it stops; beside it the usual 95 % interval, looked at after every sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from harness.blocks import Blocks, Kept
from harness.samples import Sampling, Taken
from harness.stats import (
    CONFIDENCE,
    LOOK_CONFIDENCE,
    LOOKS,
    half_width,
    interval_of_looks,
    interval_rank,
    median_interval,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]

#: Distributions of a time with median 1, as a share of it above: how far real ones are from any one of them is unknown.
DISTRIBUTIONS: dict[str, Draw] = {
    "lognormal, cv 2 %": lambda rng, n: rng.lognormal(0, 0.02, n),
    "lognormal, cv 10 %": lambda rng, n: rng.lognormal(0, 0.10, n),
    "exponential tail": lambda rng, n: 1 + 0.1 * (rng.exponential(1, n) - np.log(2)),
    "one in five slow": lambda rng, n: _median_one(rng.normal(1, 0.02, n) + 0.5 * (rng.random(n) < 0.2)),
}

_MOST = 400


def _median_one(times: np.ndarray) -> np.ndarray:
    """The normal's median moves to its 1 / 1.6 quantile where a fifth lies far above; brought back to 1."""
    return times - 0.02 * 0.31863936


def missed_by_any_look(looks: tuple[int, ...] = LOOKS, confidence: Fraction = LOOK_CONFIDENCE) -> float:
    """Probability that the interval of at least one look does not cover the median."""
    walk, taken, missed = np.array([1.0]), 0, 0.0
    for n in looks:
        for _ in range(n - taken):
            walk = (np.append(walk, 0) + np.insert(walk, 0, 0)) / 2
        taken = n
        k = interval_rank(n, confidence)
        if k is None:
            continue
        missed += float(walk[:k].sum() + walk[n - k + 1 :].sum())
        walk[:k] = walk[n - k + 1 :] = 0
    return missed


def measured(times: np.ndarray, precision: float) -> tuple[float, float] | None:
    """The interval at which measuring stops, in units of the median, if it does."""
    found = Blocks(Sampling(_MOST, precision=precision, minimum=6))
    for time in times:
        found.add(Taken((round(time * 1e9),)), 0)
        if found.stopped() is not None:
            break
    interval = interval_of_looks(Kept.of(found).times)
    return None if interval is None else (interval[0] / 1e9, interval[1] / 1e9)


def looked_at_always(times: np.ndarray, precision: float) -> tuple[float, float] | None:
    """The same with the interval for a fixed number of samples, looked at after each one from the sixth on."""
    interval = None
    for n in range(6, len(times) + 1):
        interval = median_interval(times[:n].tolist(), CONFIDENCE)
        if interval is not None and half_width(times[:n].tolist(), interval) <= precision:
            break
    return interval


def covered(how: Callable[[np.ndarray, float], tuple[float, float] | None], draw: Draw, runs: int) -> float:
    """Share of runs whose interval holds the median; the precision is what 40 samples would about give."""
    rng, hits = np.random.default_rng(1), 0
    spread = draw(np.random.default_rng(0), 20_000)
    precision = 1.25 * (np.quantile(spread, 0.75) - np.quantile(spread, 0.25)) / 1.35 * 2.75 / 40**0.5
    for _ in range(runs):
        interval = how(draw(rng, _MOST), precision)
        hits += interval is not None and interval[0] <= 1 <= interval[1]
    return hits / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    print(
        f"any of {len(LOOKS)} looks from {LOOKS[0]} to {LOOKS[-1]} samples misses: {missed_by_any_look():.4f} (exact)"
    )
    print(f"the same looks at 95 % each: {missed_by_any_look(confidence=CONFIDENCE):.4f} (exact)")
    print(f"{'coverage of ' + str(runs) + ' runs each':24} {'as measured':>12} {'95 %, always looking':>22}")
    for name, draw in DISTRIBUTIONS.items():
        print(f"{name:24} {covered(measured, draw, runs):12.3f} {covered(looked_at_always, draw, runs):22.3f}")


if __name__ == "__main__":
    main()
