"""Faults of the state between calls: its rows, its memory, its export."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.forward import AA, ATT_X, BB, FFN_X, PP, PP_START
from reference.weights import bf16_to_f32, f32_to_bf16
from suites.selftest.planted.fault import (
    SESSION,
    Around,
    Call,
    Patch,
    Planted,
    Ran,
    Site,
    between,
    calls,
    rounded,
)


def _passed(change: Callable[[np.ndarray], np.ndarray]) -> Around:
    """The rows of the state change on their way into a call."""

    def around(call: Call) -> Ran:
        if call.past is None:
            return call.usual()
        return call.run(call.tokens, call.past._replace(rows=change(call.past.rows.copy())))

    return around


def _left(change: Callable[[np.ndarray, Call], np.ndarray]) -> Around:
    """The rows of the state change on their way out."""

    def around(call: Call) -> Ran:
        ran = call.usual()
        return ran._replace(after=ran.after._replace(rows=change(ran.after.rows.copy(), call)))

    return around


def _rows(a: int, b: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[:, [a, b]] = rows[:, [b, a]]
        return rows

    return change


def _row_set(row: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[:, row] = value
        return rows

    return change


def _sums_rounded(to: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, Call], np.ndarray]:
    def change(rows: np.ndarray, call: Call) -> np.ndarray:
        rows[:, AA : BB + 1] = to(rows[:, AA : BB + 1])
        return rows

    return change


def _not_updated(call: Call) -> Ran:
    ran = call.usual()
    if len(call.tokens) > 1 or call.past is None:
        return ran
    rows = ran.after.rows.copy()
    rows[:, [ATT_X, FFN_X]] = call.past.rows[:, [ATT_X, FFN_X]]
    return ran._replace(after=ran.after._replace(rows=rows))


def _prefill_forgets(call: Call) -> Ran:
    ran = call.usual()
    if len(call.tokens) == 1:
        return ran
    rows = ran.after.rows.copy()
    rows[:, AA : PP + 1] = call.start.rows[:, AA : PP + 1]
    return ran._replace(after=ran.after._replace(rows=rows))


def _layers_exchanged(rows: np.ndarray) -> np.ndarray:
    return rows[[1, 0, *range(2, len(rows))]] if len(rows) > 1 else rows[:, ::-1].copy()


def _mutating(call: Call) -> Ran:
    ran = call.usual()
    if call.past is not None:
        call.past.rows[...] = ran.after.rows
    return ran


def _one_buffer(call: Call) -> Ran:
    """All states of a session are the same memory."""
    ran = call.usual()
    if not hasattr(call.memory, "buffer"):
        call.memory.buffer = ran.after.rows
    call.memory.buffer[...] = ran.after.rows
    return ran._replace(after=ran.after._replace(rows=call.memory.buffer))


def _sums_shared(call: Call) -> Ran:
    """aa and bb of all sessions of a process are the same memory; each call goes on from whatever is there."""
    past = call.start
    if call.past is not None and getattr(call.shared, "sums", None) is not None:
        past = past._replace(rows=past.rows.copy())
        past.rows[:, AA : PP + 1] = call.shared.sums
    ran = call.run(call.tokens, past)
    call.shared.sums = ran.after.rows[:, AA : PP + 1].copy()
    return ran


def _no_reset(call: Call) -> Ran:
    """A new prompt goes on from where the last one ended."""
    past = call.past if call.past is not None else getattr(call.memory, "last", None)
    ran = call.run(call.tokens, past)
    call.memory.last = ran.after._replace(rows=ran.after.rows.copy())
    return ran


def _old_logits(call: Call) -> Ran:
    """What is copied to the host is the result of the call before."""
    ran = call.usual()
    old = getattr(call.memory, "old", ran.logits[-1])
    call.memory.old = ran.logits[-1].copy()
    logits = ran.logits.copy()
    logits[-1] = old
    return ran._replace(logits=logits)


def _growing(call: Call) -> Ran:
    """Every call leaves the sums a hundred-thousandth too large against their exponent."""
    ran = call.usual()
    rows = ran.after.rows.copy()
    rows[:, AA] *= 1 + 1e-4
    return ran._replace(after=ran.after._replace(rows=rows))


def _exported(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Site], Planted]:
    return lambda site: Planted(Patch(given=change), SESSION)


def _imported(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Site], Planted]:
    return lambda site: Planted(Patch(taken=change), SESSION)


def _nan_in(row: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(rows: np.ndarray) -> np.ndarray:
        rows[-1, row, -1] = np.nan
        return rows

    return change


FAULTS = (
    calls(
        "att and ffn rows swapped",
        _passed(_rows(ATT_X, FFN_X)),
        "Two rows of the state change places between calls.",
    ),
    calls("aa and bb rows swapped", _passed(_rows(AA, BB)), "Two rows of the state change places between calls."),
    calls("bb and pp rows swapped", _passed(_rows(BB, PP)), "Two rows of the state change places between calls."),
    calls("two layers' states exchanged", _passed(_layers_exchanged), "The state of layer 0 is that of layer 1."),
    calls("pp reset", _passed(_row_set(PP, PP_START)), "The exponent starts anew at every call, the sums do not."),
    calls("pp lost", _passed(_row_set(PP, 0.0)), "The exponent is taken for zero at every call."),
    calls("sums reset", _passed(lambda rows: _row_set(BB, 0.0)(_row_set(AA, 0.0)(rows))), "aa and bb start anew."),
    calls(
        "token shift not carried",
        _passed(lambda r: _row_set(ATT_X, 0.0)(_row_set(FFN_X, 0.0)(r))),
        "Each call starts with no token before.",
    ),
    calls(
        "att's shift not carried",
        _passed(_row_set(ATT_X, 0.0)),
        "Half of the token shift starts anew in each call.",
    ),
    calls(
        "shift not updated by single steps",
        _not_updated,
        "Decode hands the token shift on as it found it, prefill does not.",
    ),
    calls("state not updated by prefill", _prefill_forgets, "A prompt in one call leaves the sums it found."),
    calls(
        "state in fp16",
        _left(_sums_rounded(lambda x: rounded(x, np.float16))),
        "aa and bb are handed on in half precision.",
    ),
    calls(
        "state in bf16",
        _left(_sums_rounded(lambda x: bf16_to_f32(f32_to_bf16(x)))),
        "aa and bb are handed on in bfloat16.",
    ),
    calls("state mutated", _mutating, "The state passed in is overwritten."),
    calls("one buffer for all states", _one_buffer, "Every state that a session returns is the same memory."),
    calls("sums shared by sessions", _sums_shared, "aa, bb and pp of all sessions of a process are the same memory."),
    calls("no reset", _no_reset, "A new prompt goes on from the end of the last one."),
    calls("logits of the call before", _old_logits, "The copy to the host does not wait for the result."),
    calls("drift of the sums", _growing, "Every call leaves aa a little too large."),
    between(
        "export without pp",
        "The exported exponent is that of an empty state.",
        _exported(_row_set(PP, PP_START)),
    ),
    between("export in another order", "The exported rows aa and bb change places.", _exported(_rows(AA, BB))),
    between(
        "NaN in an unused channel",
        "One exponent of the exported state is NaN, and nothing reads it.",
        _exported(_nan_in(PP)),
    ),
    between("import without pp", "The imported exponent is taken for zero.", _imported(_row_set(PP, 0.0))),
    between("import without att's row", "One row is not taken over.", _imported(_row_set(ATT_X, 0.0))),
)
