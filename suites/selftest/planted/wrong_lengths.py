"""Faults that depend on the length of a call, the position, the token, the call's number, or the threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.forward import ATT_X, FFN_X
from reference.operations import Here
from suites.selftest.planted.fault import (
    SESSION,
    Around,
    Call,
    Carried,
    Patch,
    Planted,
    Ran,
    Site,
    between,
    calls,
)


def _spoilt(when: Callable[[Call], bool], how: Callable[[np.ndarray], np.ndarray] | None = None) -> Around:
    """The logits are spoilt, in some calls only."""

    def around(call: Call) -> Ran:
        ran = call.usual()
        return ran._replace(logits=(how or _stale_tail)(ran.logits.copy())) if when(call) else ran

    return around


def _stale_tail(logits: np.ndarray) -> np.ndarray:
    """The last quarter of the vocabulary was not written."""
    logits[..., -(logits.shape[-1] // 4 + 1) :] = 0
    return logits


def _one_position_early(call: Call) -> Ran:
    ran = call.usual()
    logits = ran.logits.copy()
    logits[-1] = logits[-2] if len(logits) > 1 else logits[-1]
    return ran._replace(logits=logits)


def _padded_to(multiple: int, left: bool) -> Around:
    """Prompts of more than one token are filled up with id 0, which goes into the state."""

    def around(call: Call) -> Ran:
        n = len(call.tokens)
        padding = [0] * (-n % multiple) if n > 1 else []
        ran = call.run([*padding, *call.tokens] if left else [*call.tokens, *padding], call.past)
        logits = ran.logits[len(padding) :] if left else ran.logits[:n]
        return Ran(logits, ran.after._replace(position=call.position + n))

    return around


def _truncated_to(length: int) -> Around:
    def around(call: Call) -> Ran:
        kept = call.tokens[-length:]
        ran = call.run(kept, call.past)
        missing = len(call.tokens) - len(kept)
        return Ran(np.concatenate([np.zeros((missing, ran.logits.shape[1]), ran.logits.dtype), ran.logits]), ran.after)

    return around


def _in_chunks(length: int, between: Callable[[Carried], Carried | None]) -> Around:
    """Long prompts run in chunks; ``between`` spoils what is carried over."""

    def around(call: Call) -> Ran:
        rows, past = [], call.past
        for at in range(0, len(call.tokens), length):
            if at and past is not None:
                past = between(past)
            ran = call.run(call.tokens[at : at + length], past)
            rows.append(ran.logits)
            past = ran.after
        assert past is not None
        return Ran(np.concatenate(rows), past._replace(position=call.position + len(call.tokens)))

    return around


def _without_shift(past: Carried) -> Carried:
    rows = past.rows.copy()
    rows[:, [ATT_X, FFN_X]] = 0
    return past._replace(rows=rows)


def _skipping(ids: Callable[[int], bool]) -> Around:
    """Some ids leave the state as it was, as padding would."""

    def around(call: Call) -> Ran:
        rows, past = [], call.past
        for token in call.tokens:
            ran = call.run([token], past)
            rows.append(ran.logits)
            past = ran.after if past is None or not ids(token) else past
        assert past is not None
        return Ran(np.concatenate(rows), past)

    return around


def _repeated(call: Call) -> Ran:
    """A cache by token: the same id twice in a row gives the same logits."""
    ran = call.usual()
    last = getattr(call.memory, "last", None)
    if len(call.tokens) == 1 and last is not None and last[0] == call.tokens[0]:
        ran = ran._replace(logits=last[1])
    call.memory.last = (call.tokens[-1], ran.logits[-1:].copy())
    return ran


def _drifting(call: Call) -> Ran:
    ran = call.usual()
    factor = ran.logits.dtype.type(1 + 1e-5 * ran.after.position)
    return ran._replace(logits=ran.logits * factor)


def _only(when: Callable[[Call], bool], point: str, wrong: Callable[[Here], Any]) -> Callable[[Site], Planted]:
    """An operation that is wrong in some calls only."""

    def plant(site: Site) -> Planted:
        replaced = dict.fromkeys(site.names(point), wrong)

        def around(call: Call) -> Ran:
            return call.run(call.tokens, call.past, replaced if when(call) else None)

        return Planted(Patch(around=around), SESSION)

    return plant


def _rows_missing(h: Here) -> np.ndarray:
    """The second thread has not finished: the last rows of a product are zero."""
    y = h.op.at(h.at + "ffn.v").linear(h.read("ffn.k2"), h.weights[h.at + "ffn.value.weight"]).copy()
    y[:, -(y.shape[1] // 4) :] = 0
    return y


FAULTS = (
    calls("logits of the position before", _one_position_early, "A prefill returns the last but one position."),
    calls(
        "wrong on the second call",
        _spoilt(lambda c: c.memory.calls == 2),
        "A workspace is not cleared after the first call.",
    ),
    calls(
        "wrong on every seventh call",
        _spoilt(lambda c: c.memory.calls % 7 == 0),
        "A race that is lost now and then.",
    ),
    calls("wrong from the hundredth call on", _spoilt(lambda c: c.memory.calls >= 100), "A buffer that runs full."),
    calls(
        "wrong for odd lengths",
        _spoilt(lambda c: len(c.tokens) % 2 == 1 and len(c.tokens) > 1),
        "The tail of a loop over pairs of tokens.",
    ),
    calls(
        "wrong for lengths of 4n + 2",
        _spoilt(lambda c: len(c.tokens) % 4 == 2),
        "The tail of a loop over four tokens.",
    ),
    calls("wrong for lengths below 4", _spoilt(lambda c: 1 < len(c.tokens) < 4), "A kernel for small batches."),
    calls("wrong for whole tiles of 16", _spoilt(lambda c: len(c.tokens) % 16 == 0), "A tile that is exactly full."),
    calls("wrong for lengths above 32", _spoilt(lambda c: len(c.tokens) > 32), "A buffer of 32 tokens."),
    calls("wrong beyond position 64", _spoilt(lambda c: c.position + len(c.tokens) > 64), "A table of 64 positions."),
    calls(
        "wrong beyond position 150",
        _spoilt(lambda c: c.position + len(c.tokens) > 150),
        "A table of 150 positions.",
    ),
    calls(
        "wrong for one token from a state",
        _spoilt(lambda c: len(c.tokens) == 1 and c.past is not None),
        "The kernel for single steps.",
    ),
    calls(
        "wrong for a prompt from a state",
        _spoilt(lambda c: len(c.tokens) > 1 and c.past is not None),
        "A prefill that goes on from a state.",
    ),
    calls("wrong with two threads", _spoilt(lambda c: c.threads > 1), "Two threads write the same rows."),
    between(
        "product unfinished with two threads",
        "Rows of the second thread are read too early.",
        _only(lambda c: c.threads > 1 and len(c.tokens) > 8, "blocks.0.ffn.v", _rows_missing),
    ),
    between(
        "product unfinished in prefill",
        "The batched kernel leaves rows out.",
        _only(lambda c: len(c.tokens) > 1, "blocks.0.ffn.v", _rows_missing),
    ),
    between(
        "product unfinished in decode",
        "The single-row kernel leaves rows out.",
        _only(lambda c: len(c.tokens) == 1, "blocks.0.ffn.v", _rows_missing),
    ),
    calls(
        "prompts padded on the left",
        _padded_to(8, left=True),
        "Prompts are filled up to a multiple of 8 with id 0 in front.",
    ),
    calls("prompts padded on the right", _padded_to(16, left=False), "Padding behind the prompt goes into the state."),
    calls("prompts cut to 128 tokens", _truncated_to(128), "Only the last 128 tokens of a prompt are run."),
    calls(
        "chunks of 20 start anew",
        _in_chunks(20, lambda past: None),
        "Long prompts run in chunks that forget the ones before.",
    ),
    calls(
        "chunks of 20 without shift",
        _in_chunks(20, _without_shift),
        "Long prompts run in chunks that forget the token before.",
    ),
    calls(
        "chunks of 100 without shift",
        _in_chunks(100, _without_shift),
        "Long prompts run in chunks that forget the token before.",
    ),
    calls("id 0 skipped", _skipping(lambda i: i == 0), "Id 0 is taken for padding and leaves the state as it was."),
    calls(
        "spaces skipped",
        _skipping(lambda i: i == 32),
        "One id is taken for padding and leaves the state as it was.",
    ),
    calls("cache by token", _repeated, "The same id twice in a row gives the logits of the first time."),
    calls("drift of the logits", _drifting, "Logits are off by 1e-5 more at every token."),
)
