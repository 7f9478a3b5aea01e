"""A prompt that still fails and of which no token can be left out: each token alone, then delta debugging."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

#: Beyond these, the shortest prompt so far is the answer. Single tokens may take half of either.
MOST_TRIES, MOST_SECONDS = 200, 12.0

Fails = Callable[[Sequence[int]], bool]


def shortest(
    fails: Fails, tokens: Sequence[int], near: int | None = None, clock: Callable[[], float] = time.monotonic
) -> tuple[tuple[int, ...], str]:
    """A prompt that fails, and what ended the search (``12 s``, ``200 tries``); empty: no token can be left out.

    ``tokens`` itself must fail; ``fails`` may raise Enough, which ends the search; ``near``: the position where it
    seems to. Tokens are tried alone, that one first; then ends, chunks and single tokens are left out (Zeller and
    Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002), which by itself may end at two tokens
    where another one fails alone.
    """
    began = clock()
    known: dict[tuple[int, ...], bool] = {}

    def check(candidate: tuple[int, ...]) -> bool:
        if candidate not in known:
            if len(known) >= MOST_TRIES:
                raise Enough(f"{MOST_TRIES} tries")
            if clock() - began > MOST_SECONDS:
                raise Enough(f"{MOST_SECONDS:.0f} s")
            known[candidate] = bool(candidate) and fails(candidate)
        return known[candidate]

    best = [tuple(int(token) for token in tokens)]
    try:
        for token in dict.fromkeys([*([] if near is None else best[0][near : near + 1]), *best[0]]):
            if len(known) >= MOST_TRIES / 2 or clock() - began > MOST_SECONDS / 2:
                break
            if check((token,)):
                return (token,), ""
        if near is not None and check(best[0][: near + 1]):
            best[0] = best[0][: near + 1]
        _beginning(check, best)
        _complements(check, best)
    except Enough as enough:
        return best[0], str(enough)
    return best[0], ""


class Enough(Exception):
    """No more tries; what has run out, or what came in between."""


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
