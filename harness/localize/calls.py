"""The call that fails, where a whole prompt in one call is right: which one, and how to come to it.

Two of the gate's checks have none to trace: ``state after prefill``, which is of the whole prompt in one call, and
``greedy``, whose loop a backend does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from backends.api import Session, State, StateAccess
from harness.checks import call, logits_check
from harness.parity import CALLS, Gate, cuts
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
            return f"the first {self.end} tokens in one call" if self.end > 1 else "the first token alone"
        what = f"token {self.begin}" if self.end == self.begin + 1 else f"tokens {self.begin}..{self.end - 1}"
        lengths = [b - a for a, b in self.before]
        how = "one token at a time" if set(lengths) == {1} else "in one call"
        if len(set(lengths)) > 1:
            how = f"in calls of {', '.join(str(length) for length in lengths)} tokens"
        return f"{what} in a call after the others {how}"


def failing(session: Session, truth: Truth, judged: Gate) -> list[Call]:
    """The calls in which a session fails otherwise than with the whole prompt, by the gate's failing checks.

    Those from the initial state first: only of these can a cause be computed.
    """
    found = []
    n = len(truth.tokens)
    rows = iter(CALLS)
    for check in (*judged.logits, *judged.state):
        row = next(rows) if check.name == "chunks" else ()
        if check.passed:
            continue
        if check.name in ("decode", "state after decode"):
            position = _first_wrong(session, truth) if check.name == "decode" else n - 1
            found.append(Call(check.name, position, position + 1, _singly(position)))
        elif check.name == "step":
            found.append(Call(check.name, n - 1, n, ((0, n - 1),)))
        elif check.name == "chunks":
            found += _of_chunks(session, truth, row)
        elif check.name == "scoring" and n > 1:
            found += [Call(check.name, 0, n // 2, ()), Call(check.name, n // 2, n, ((0, n // 2),))]
        elif check.name.startswith("replay of position "):
            position = int(check.name.rpartition(" ")[2])
            found.append(Call(check.name, position, position + 1, _singly(position), twice=True))
        elif check.name == "handover":
            found.append(Call(check.name, n // 2, n, (), imported=True))
    return sorted(dict.fromkeys(found), key=lambda one: one.begin > 0)


def _of_chunks(session: Session, truth: Truth, lengths: Sequence[int]) -> list[Call]:
    """Of the calls of these lengths, the first whose logits are wrong, then the one that has left its state."""
    pairs = tuple(pairwise(cuts(lengths, len(truth.tokens))))
    state: State | None = None
    at = len(pairs) - 1
    for i, (begin, end) in enumerate(pairs):
        logits, state = call(session, truth.tokens[begin:end], state)
        if not logits_check("chunks", logits, truth, slice(end - 1, end)).passed:
            at = i
            break
    return [Call("chunks", *pairs[i], pairs[:i]) for i in (at, at - 1) if i >= 0]


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
