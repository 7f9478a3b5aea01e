"""What the measuring loop adds to a decode step of known cost, as a share of it.

    python -m suites.throughput.overhead_of_measuring [--step-ms 1] [--tokens 64] [--turns 20]

A backend that does nothing but spin for a millisecond on the same clock stands for the runtime, so its cost is
known to the reading of a clock. Two ratios: what a recorded step is longer than that (in the figure), and what a
turn takes longer than its steps, per step (between the figures: arg-max, the look for NaN, the noise watch).
The medians are printed, since whatever else the machine does is in the rest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.noise import NoiseWatch
from harness.turns import DECODE, Turns

_VOCABULARY = 50_277


class Spinning:
    """A session whose ``forward`` takes ``ns``; ``spent`` is how long each call really took."""

    def __init__(self, ns: int) -> None:
        self._ns, self._logits, self.spent = ns, np.zeros(_VOCABULARY, np.float32), [0]

    def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
        start = now = time.perf_counter_ns()
        while now - start < self._ns:
            now = time.perf_counter_ns()
        self.spent.append(now - start)
        return self._logits, state


def overhead(step_ns: int, tokens: int, turns: int) -> tuple[float, float]:
    """Shares of a step: within the recorded times, and outside them."""
    session = Spinning(step_ns)
    measuring = Turns(session, NoiseWatch())
    measuring.begin(DECODE, [0], tokens)
    inside, outside = [], []
    for _ in range(turns):
        session.spent.clear()
        start = time.perf_counter_ns()
        taken = measuring.turn(1, settle=False)
        whole = time.perf_counter_ns() - start
        recorded = taken.steps[0]
        inside += [(ns - spent) / spent for ns, spent in zip(recorded, session.spent, strict=True)]
        outside.append((whole - sum(recorded)) / sum(session.spent))
    return statistics.median(inside), statistics.median(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    asked = parser.parse_args()
    inside, outside = overhead(round(asked.step_ms * 1e6), asked.tokens, asked.turns)
    print(f"a recorded step of {asked.step_ms:g} ms is {100 * inside:.3f} % longer than the backend took")
    print(f"between the steps, measuring takes {100 * outside:.3f} % of the backend's time (not in any figure)")


if __name__ == "__main__":
    main()
