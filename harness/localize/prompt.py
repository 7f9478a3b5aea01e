"""The shortest prompt that still fails: delta debugging over tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

#: Beyond these, the shortest prompt so far is the answer.
MOST_TRIES, MOST_SECONDS = 200, 12.0

Fails = Callable[[Sequence[int]], bool]


def shortest(
    fails: Fails, tokens: Sequence[int], near: int | None = None, clock: Callable[[], float] = time.monotonic
) -> tuple[tuple[int, ...], bool]:
    """A prompt that fails and of which no single token can be left out, and whether there was time to show that.

    ``tokens`` itself must fail; ``near``: the position where it seems to, tried first. Then ends, chunks and single
    tokens are left out (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002).
    """
    limit = clock() + MOST_SECONDS
    known: dict[tuple[int, ...], bool] = {}

    def check(candidate: tuple[int, ...]) -> bool:
        if candidate not in known:
            if len(known) >= MOST_TRIES or clock() > limit:
                raise _Enough
            known[candidate] = bool(candidate) and fails(candidate)
        return known[candidate]

    best = [tuple(int(token) for token in tokens)]
    try:
        for likely in [] if near is None else [best[0][near : near + 1], best[0][: near + 1]]:
            if check(likely):
                best[0] = likely
                break
        _beginning(check, best)
        _complements(check, best)
    except _Enough:
        return best[0], False
    return best[0], True


class _Enough(Exception):
    """No more tries."""


def _beginning(check: Callable[[tuple[int, ...]], bool], best: list[tuple[int, ...]]) -> None:
    """Halve from the end while that still fails."""
    while len(best[0]) > 1 and check(best[0][: (len(best[0]) + 1) // 2]):
        best[0] = best[0][: (len(best[0]) + 1) // 2]


def _complements(check: Callable[[tuple[int, ...]], bool], best: list[tuple[int, ...]]) -> None:
    parts = 2
    while len(best[0]) > 1:
        prompt = best[0]
        step = -(-len(prompt) // parts)
        cuts = [prompt[:a] + prompt[a + step :] for a in range(0, len(prompt), step)]
        shorter = next((cut for cut in cuts if check(cut)), None)
        if shorter is not None:
            best[0], parts = shorter, max(2, parts - 1)
        elif step == 1:
            return
        else:
            parts = min(len(prompt), 2 * parts)
