"""The call that fails, where a whole prompt in one call is right: which one, and how to come to it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from backends.api import Session, State, StateAccess
from harness.checks import call
from harness.parity import Gate
from harness.tolerance import K, Truth


class Call(NamedTuple):
    """``tokens`` from position ``begin`` on, after everything before in calls of its own.

    name    of the gate's check that fails there
    before  the prompt up to ``begin``, as it was run
    twice   whether the state it starts from had been used before
    """

    name: str
    begin: int
    end: int
    before: tuple[tuple[int, int], ...]
    twice: bool = False
    imported: bool = False

    def __str__(self) -> str:
        if self.imported:
            return f"tokens {self.begin}..{self.end - 1} after the true state was taken over"
        if self.twice:
            return f"token {self.begin} from a state that had been used before"
        if not self.before:
            return f"the first {self.end} tokens in one call"
        what = f"token {self.begin}" if self.end == self.begin + 1 else f"tokens {self.begin}..{self.end - 1}"
        how = "one token at a time" if self.before[-1] == (self.begin - 1, self.begin) else "in one call"
        return f"{what} in a call after the others {how}"


def failing(session: Session, truth: Truth, judged: Gate) -> list[Call]:
    """The calls in which a session fails otherwise than with the whole prompt, by the gate's failing checks."""
    found = []
    n = len(truth.tokens)
    for check in (*judged.logits, *judged.state):
        if check.passed:
            continue
        if check.name in ("decode", "state after decode"):
            position = _first_wrong(session, truth) if check.name == "decode" else n - 1
            found.append(Call(check.name, position, position + 1, _singly(position)))
        elif check.name == "step":
            found.append(Call(check.name, n - 1, n, ((0, n - 1),)))
        elif check.name == "chunks":
            one, third = min(1, n - 1), 1 + n // 3
            cuts = sorted({0, one, third, n})
            pairs = tuple(pairwise(cuts))
            found += [Call(check.name, a, b, pairs[:i]) for i, (a, b) in enumerate(pairs) if i]
        elif check.name.startswith("replay of position "):
            position = int(check.name.rpartition(" ")[2])
            found.append(Call(check.name, position, position + 1, _singly(position), twice=True))
        elif check.name == "handover":
            found.append(Call(check.name, n // 2, n, (), imported=True))
    return list(dict.fromkeys(found))


def _singly(end: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, i + 1) for i in range(end))


def _first_wrong(session: Session, truth: Truth) -> int:
    """First position whose logits, token by token, are not finite or beyond the bound of a single position."""
    state: State | None = None
    for position, token in enumerate(truth.tokens):
        logits, state = call(session, [token], state)
        error = float(np.sqrt(np.mean(np.square(logits - truth.logits[position])))) / truth.unit
        if not error <= K * truth.e_worst:
            return position
    return len(truth.tokens) - 1


def arrive(session: Session, tokens: Sequence[int], truth: Truth, wanted: Call) -> State | None:
    """Make the calls before, and give the state that the failing one starts from."""
    if wanted.imported:
        assert isinstance(session, StateAccess)
        return session.import_state(truth.middle.astype(np.float32))
    state: State | None = None
    for a, b in wanted.before:
        _, state = session.forward(tokens[a:b], state)
    if wanted.twice:
        later = state
        for token in tokens[wanted.begin :]:
            _, later = session.forward([token], later)
    return state
