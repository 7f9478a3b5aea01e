"""A fake clock, and sessions that spend scripted time on it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np

VOCAB = 5


class FakeClock:
    """Stands still but for what the session spends, and ``read_ns`` at each reading."""

    def __init__(self, read_ns: int = 0) -> None:
        self.now = 1_000
        self.read_ns = read_ns

    def __call__(self) -> int:
        self.now += self.read_ns
        return self.now


class Scripted:
    """``forward`` spends ``costs`` in turn (the last for ever); its state counts the tokens seen.

    The next token is the count modulo the vocabulary, so a state that leaks between samples shows in the
    ids. ``bad`` maps the number of a call to the value its logit 2 takes.
    """

    def __init__(self, clock: FakeClock, costs: Sequence[int], bad: dict[int, float] | None = None) -> None:
        self.clock = clock
        self.costs = list(costs)
        self.bad = bad or {}
        self.calls: list[tuple[list[int], int | None]] = []
        self.gc_enabled: list[bool] = []
        self.raise_at: tuple[int, BaseException] | None = None

    def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
        number = len(self.calls)
        self.calls.append((list(tokens), state))
        self.gc_enabled.append(gc.isenabled())
        if self.raise_at is not None and number == self.raise_at[0]:
            raise self.raise_at[1]
        self.clock.now += self.costs[min(number, len(self.costs) - 1)]
        count = (state or 0) + len(tokens)
        logits = np.zeros(VOCAB, np.float32)
        logits[count % VOCAB] = 1
        if number in self.bad:
            logits[2] = self.bad[number]
        return logits, count


class ScriptedGreedy(Scripted):
    """The same with a loop of its own, which spends ``greedy_costs``."""

    def __init__(self, clock: FakeClock, costs: Sequence[int], greedy_costs: Sequence[int], short: int = 0) -> None:
        super().__init__(clock, costs)
        self.greedy_costs = list(greedy_costs)
        self.short = short
        self.blocks: list[tuple[int, Any, int]] = []
        self.greedy_gc: list[bool] = []

    def greedy(self, token: int, state: Any, n: int) -> tuple[np.ndarray, Any]:
        self.clock.now += self.greedy_costs[len(self.blocks)]
        self.blocks.append((token, state, n))
        self.greedy_gc.append(gc.isenabled())
        ids = (state + 1 + np.arange(n - self.short)) % VOCAB
        return ids.astype(np.int64), state + n
