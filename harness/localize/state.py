"""A backend that shows its recurrent state, compared after every token: which layer, and which half of it.

The state holds ln1 and ln2 of the last token of every layer and the sums of WKV. After every token, it pins a fault
to the operations between two rows. The sums follow from the rows before them, so they are compared locally too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from backends.api import Session, State, StateAccess
from harness.checks import call
from harness.compare import at_exponent, first_non_finite
from harness.localize.finding import Seen
from harness.localize.lockstep import Own, Stream, layers
from harness.localize.off import allowed, finite, first_place, largest, off, rounding, size
from harness.localize.trace import DRAWS
from harness.tolerance import FLOOR
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, WkvState, initial_state, vector, wkv
from reference.numerics import UNIT_ROUNDOFF, Arithmetic, Emulated, Exact, Op
from reference.operations import BLOCK, FIRST, LAST, Step
from reference.weights import Weights

#: Rows in the order in which a layer makes them.
ROWS = (ATT_X, BB, AA, FFN_X)

_HALF = tuple(BLOCK).index("ln2")
ATT, FFN = tuple(BLOCK)[1:_HALF], tuple(BLOCK)[_HALF + 1 :]


@dataclass(frozen=True)
class Watched:
    """States ``(T, n_layer, 5, C)`` and logits ``(T, n_vocab)`` after every token."""

    states: np.ndarray
    logits: np.ndarray


def token_by_token(session: Session, tokens: Sequence[int]) -> Watched:
    """The prompt one token at a time."""
    assert isinstance(session, StateAccess)
    states, logits = [], []
    state: State | None = None
    for token in tokens:
        row, state = call(session, [token], state)
        states.append(np.array(session.export_state(state)))
        logits.append(row)
    return Watched(np.stack(states), np.stack(logits))


def in_one_call(session: Session, tokens: Sequence[int]) -> Watched:
    """Every beginning of the prompt in one call from the start."""
    assert isinstance(session, StateAccess)
    states, logits = [], []
    for n in range(1, len(tokens) + 1):
        row, state = call(session, tokens[:n], None)
        states.append(np.array(session.export_state(state)))
        logits.append(row)
    return Watched(np.stack(states), np.stack(logits))


def compare(watched: Watched, weights: Weights, arithmetic: Arithmetic, tokens: np.ndarray) -> list[Seen]:
    """Rows of the state in execution order, then the logits; ``weights`` are the scheme's.

    In one call, the sums that a row follows from are the backend's own of another call; they are the same where the
    backend is right.
    """
    truth = Stream(weights, tokens, Exact(np.float64))
    drawn = [Stream(weights, tokens, Emulated(arithmetic, seed)) for seed in range(DRAWS)]
    floor = FLOOR * UNIT_ROUNDOFF[arithmetic.activations]
    found: list[Seen] = []
    for group in layers(weights.config):
        right, *others = (dict(stream.layer(group)) for stream in (truth, *drawn))
        layer = group[0].layer
        if layer is not None:
            ops: list[Op] = [Exact(np.float64), *(Emulated(arithmetic, seed) for seed in range(DRAWS))]
            known = [_rows(run, weights, layer, op) for run, op in zip((right, *others), ops, strict=True)]
            follows = [_following(watched.states, weights, tokens, group, op) for op in ops]
            found += [
                _row(watched.states[:, layer], row, layer, known, follows, floor, rounding(arithmetic, "wkv"))
                for row in ROWS
            ]
        elif group[-1].point == "logits":
            found.append(_logits(watched.logits, right["logits"], [run["logits"] for run in others], floor))
    return found


def _rows(run: dict[str, np.ndarray], weights: Weights, layer: int, op: Op) -> np.ndarray:
    """The layer's state after every token, ``(T, 5, C)``, from its results."""
    at = f"blocks.{layer}."
    out: np.ndarray = np.repeat(initial_state(weights.config, op.dtype)[layer][None], len(run[at + "ln1"]), axis=0)
    out[:, ATT_X], out[:, FFN_X] = run[at + "ln1"], run[at + "ln2"]
    past = WkvState(*initial_state(weights.config, op.dtype)[layer, AA : PP + 1])
    for t in range(len(out)):
        past = _step(run[at + "att.k"], run[at + "att.v"], t, weights, at, past, op)
        out[t, AA : PP + 1] = past
    return out


def _following(
    states: np.ndarray, weights: Weights, tokens: np.ndarray, group: Sequence[Step], op: Op
) -> np.ndarray | None:
    """What the sums should be after every token, given the backend's own ln1 and sums before it: ``(T, 5, C)``."""
    layer = group[0].layer
    assert layer is not None
    at = f"blocks.{layer}."
    own = states[:, layer]
    if not finite([own]):
        return None
    run = Own({at + "ln1": own[:, ATT_X]}, group, weights, tokens, None, op)
    k, v = run.read(at + "att.k"), run.read(at + "att.v")
    before = np.concatenate([initial_state(weights.config)[layer][None], own[:-1]]).astype(op.dtype)
    out = np.array(before)
    for t in range(len(out)):
        out[t, AA : PP + 1] = _step(k, v, t, weights, at, WkvState(*before[t, AA : PP + 1]), op)
    return out


def _step(k: np.ndarray, v: np.ndarray, t: int, weights: Weights, at: str, past: WkvState, op: Op) -> WkvState:
    w, u = np.exp(vector(weights, at + "att.time_decay", op)), vector(weights, at + "att.time_first", op)
    with np.errstate(all="ignore"):
        return wkv(k[t : t + 1], v[t : t + 1], w, u, past, op.at(at + "att.wkv"))[1]


def _row(
    own: np.ndarray,
    row: int,
    layer: int,
    known: Sequence[np.ndarray],
    follows: Sequence[np.ndarray | None],
    floor: float,
    roundings: float,
) -> Seen:
    right, *drawn = known
    expected = right[:, row]
    seen = Seen(f"blocks.{layer}.state.{STATE_ROWS[row]}", layer, float(np.abs(expected).max()), None, None, None)
    bad = first_non_finite(own[:, row])
    if bad:
        return replace(seen, got=largest(own[:, row]), problem=bad[0], token=bad[1][0], channel=bad[1][1])
    mine, *others = (at_exponent(x, right[:, PP])[:, row] for x in (own, *drawn))
    bound = allowed([off(x, expected) for x in others], size(expected), floor)
    error = off(mine, expected).worst(bound, alone=False)
    token, channel = first_place(mine, expected, bound)
    seen = replace(seen, got=largest(mine), error=error[0], bound=error[1], token=token, channel=channel)
    exact = follows[0]
    if row not in (AA, BB) or exact is None:
        return seen
    mine, *others = (at_exponent(x, exact[:, PP])[:, row] for x in (own, *(x for x in follows[1:] if x is not None)))
    bound = allowed([off(x, exact[:, row]) for x in others], size(exact[:, row]), roundings)
    local = off(mine, exact[:, row]).worst(bound, alone=True)
    seen = replace(seen, local=local[0], local_bound=local[1])
    if seen.locally_bad:
        token, channel = first_place(mine, exact[:, row], bound)
    return replace(seen, token=token, channel=channel)


def _logits(got: np.ndarray, expected: np.ndarray, drawn: Sequence[np.ndarray], floor: float) -> Seen:
    seen = Seen("logits", None, float(np.abs(expected).max()), largest(got), None, None)
    bad = first_non_finite(got)
    if bad:
        return replace(seen, problem=bad[0], token=bad[1][0], channel=bad[1][1])
    bound = allowed([off(x, expected) for x in drawn], size(expected), floor)
    error = off(got, expected).worst(bound, alone=False)
    token, channel = first_place(got, expected, bound)
    return replace(seen, error=error[0], bound=error[1], token=token, channel=channel)


@dataclass(frozen=True)
class Changed:
    """A state that is another one when it is looked at again, after calls that were given other states."""

    position: int
    seen: Seen

    def __str__(self) -> str:
        return (
            f"the state after token {self.position} has changed since it was handed out: a later call has written to it"
        )


def changed(session: Session, tokens: Sequence[int]) -> Changed | None:
    """The first row of the first state that is not what it was when the call that made it returned.

    Each state is used twice, as the replay of the gate does.
    """
    assert isinstance(session, StateAccess)
    kept: list[tuple[State, np.ndarray]] = []
    state: State | None = None
    for token in tokens:
        _, state = session.forward([token], state)
        kept.append((state, np.array(session.export_state(state))))
    for position, (state, then) in enumerate(kept[:-1]):
        session.forward([tokens[position + 1]], state)
        now = np.asarray(session.export_state(state))
        for layer, row in product(range(len(then)), (ATT_X, PP, BB, AA, FFN_X)):
            if not np.array_equal(now[layer, row], then[layer, row], equal_nan=True):
                return Changed(position, _unlike(layer, row, position, now[layer, row], then[layer, row]))
    return None


def _unlike(layer: int, row: int, position: int, now: np.ndarray, then: np.ndarray) -> Seen:
    apart = np.abs(np.nan_to_num(now.astype(np.float64) - then, nan=np.inf))
    error, point = off(now[None], then[None]).rms, f"blocks.{layer}.state.{STATE_ROWS[row]}"
    seen = Seen(point, layer, largest(then), largest(now), error, 0.0, token=position)
    return replace(seen, channel=int(apart.argmax()))


def between(seen: Sequence[Seen], bad: Seen) -> tuple[int | None, str, list[str]]:
    """Layer, name and trace points of what lies between the last right row and a wrong one."""
    n_layer = 1 + max(one.layer for one in seen if one.layer is not None)
    if bad.point == "logits":
        last = n_layer - 1
        return last, f"blocks.{last}.ffn.*", [*(f"blocks.{last}.{name}" for name in FFN), *LAST]
    layer, row = bad.layer or 0, bad.point.rpartition(".")[2]
    at = f"blocks.{layer}."
    if row == "att_x":
        if layer == 0:
            return 0, "blocks.0.ln1", [*FIRST, "blocks.0.ln1"]
        before = f"blocks.{layer - 1}."
        return layer - 1, f"{before}ffn.*", [*(before + name for name in FFN), at + "ln1"]
    if row == "ffn_x":
        names = ["att.xr", "att.r", "att.wkv", "att.rwkv", "att.out", "att.residual", "ln2"]
        return layer, f"{at}att.*", [at + name for name in names]
    names = ["att.xk", "att.k", "att.wkv"] if row == "bb" else ["att.xv", "att.v", "att.wkv"]
    return layer, f"{at}att.*", [at + name for name in names]
