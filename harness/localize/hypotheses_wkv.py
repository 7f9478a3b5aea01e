"""Hypotheses about the WKV recurrence, what it leaves in the state, and the state's other rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from harness.localize.hypotheses import Hypothesis, at
from reference.forward import AA, ATT_X, BB, FFN_X, PP, PP_START, WkvState
from reference.numerics import ROUND
from reference.operations import Here

#: Output of a token from old, new (weights of the past and of the token), aa, bb, v.
Output = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Vector = Callable[[Here], np.ndarray]

#: What a sum is multiplied by when a token is taken in.
DECAY, MOVE, NONE = "decay", "move", "none"


def _right_output(old: np.ndarray, new: np.ndarray, aa: np.ndarray, bb: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray((old * aa + new * v) / (old * bb + new))


def _scan(
    h: Here,
    *,
    w: Vector = lambda h: np.exp(h.vector("att.time_decay")),
    u: Vector = lambda h: h.vector("att.time_first"),
    k: Vector = lambda h: h.read("att.k"),
    v: Vector = lambda h: h.read("att.v"),
    exp: Callable[[np.ndarray], np.ndarray] = np.exp,
    output: Output = _right_output,
    factors: tuple[str, str] = (DECAY, DECAY),
    bonus_kept: bool = False,
    updated_first: bool = False,
    decay_last: bool = False,
    carried: Callable[[np.ndarray], np.ndarray] = lambda pp: pp,
    keep: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda aa, bb: (aa, bb),
    block: tuple[int, float | None] = (0, 1.0),
    at_new_maximum: bool = True,
) -> tuple[np.ndarray, WkvState]:
    """The recurrence token by token, with one thing different; every operation rounded as the reference does.

    factors        that aa, bb are multiplied by: the decay; what moves them to the new pp alone; none
    bonus_kept     the state takes in e^(u + k)
    updated_first  the output reads the state that already holds the token
    decay_last     a token decays as it is taken in
    carried, keep  what is handed on of pp, of aa and bb
    block          tokens of a block, and how often the first of each decays the past; ``None``: it has none
    at_new_maximum  whether the past decays where a new key is the largest exponent
    """
    op = h.op.at(h.at + "att.wkv")
    r = op.wkv
    keys, values, ww, uu = k(h), v(h), w(h), u(h)
    aa, bb, pp = (np.array(row) for row in h.past[AA : PP + 1])
    out = np.empty_like(values)
    for t in range(len(keys)):
        uk, kept = r(uu + keys[t]), r(uu + keys[t]) if bonus_kept else keys[t]
        past = aa, bb, pp
        late = ww if decay_last else 0
        fades, begins = ww, block[0] > 0 and t > 0 and t % block[0] == 0
        if begins and block[1] is None:
            past, aa, bb = (aa * 0, bb * 0, pp), aa * 0, bb * 0
        elif begins:
            fades = ww * op.dtype.type(block[1])
        if not at_new_maximum:
            fades = np.where(kept > pp - ww, 0, fades).astype(op.dtype)
        after = np.maximum(r(pp - fades), r(kept - late))
        decay, gain = r(exp(r(pp - fades - after))), r(exp(r(kept - late - after)))
        by = {DECAY: decay, MOVE: r(exp(r(pp - after))), NONE: np.ones_like(decay)}
        aa, bb, pp = r(r(by[factors[0]] * aa) + r(gain * values[t])), r(r(by[factors[1]] * bb) + gain), after
        seen_aa, seen_bb, seen_pp = (aa, bb, pp) if updated_first else past
        top = np.maximum(seen_pp, uk)
        out[t] = r(output(r(exp(r(seen_pp - top))), r(exp(r(uk - top))), seen_aa, seen_bb, values[t]))
        aa, bb = keep(aa, bb)
        pp = carried(pp)
    return np.asarray(op.act(out)), WkvState(aa, bb, pp)


def _late(x: np.ndarray, first: bool = False) -> np.ndarray:
    return np.concatenate([x[:1] * first, x[:-1]])


def _in(x: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(ROUND[kind](x.astype(np.float32)).astype(x.dtype))


def _guarded(guard: float) -> Output:
    return lambda old, new, aa, bb, v: (old * aa + new * v) / (old * bb + new + v.dtype.type(guard))


def _reused(h: Here) -> tuple[np.ndarray, WkvState]:
    """The state updated with the exponentials of the output: bonus kept, no decay."""
    return _scan(h, w=lambda h: np.zeros_like(h.past[AA]), bonus_kept=True)


def _zero(h: Here) -> np.ndarray:
    return np.zeros_like(h.past[AA])


def _exp_of(vector: str, factor: float = 1.0) -> Vector:
    return lambda h: np.exp(h.op.dtype.type(factor) * h.vector(vector))


_DECAY, _FIRST = "att.time_decay", "att.time_first"

#: name, what the backend does, what differs.
_WRONG: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("u dropped", "time_first (u) is left out", {"u": _zero}),
    ("u doubled", "time_first (u) is added twice", {"u": lambda h: 2 * h.vector(_FIRST)}),
    ("u negated", "time_first (u) is subtracted", {"u": lambda h: -h.vector(_FIRST)}),
    ("u exponentiated", "time_first (u) is exponentiated before it is added to k", {"u": _exp_of(_FIRST)}),
    ("u kept in the state", "time_first (u) is added to what the state takes in", {"bonus_kept": True}),
    (
        "u in the state only",
        "time_first (u) is added to what the state takes in, not to the output",
        {"u": _zero, "k": lambda h: h.read("att.k") + h.vector(_FIRST)},
    ),
    ("decay sign", "the decay has the wrong sign: the past grows by e^w", {"w": lambda h: -np.exp(h.vector(_DECAY))}),
    ("decay raw", "time_decay is used as it is stored, not exponentiated", {"w": lambda h: h.vector(_DECAY)}),
    ("decay raw, negated", "-time_decay is used, not exponentiated", {"w": lambda h: -h.vector(_DECAY)}),
    ("decay of -time_decay", "e^(-time_decay) is the decay's exponent", {"w": _exp_of(_DECAY, -1)}),
    (
        "decay exponentiated twice",
        "e^(-e^time_decay), the factor itself, is used as the decay's exponent",
        {"w": lambda h: np.exp(-np.exp(h.vector(_DECAY)))},
    ),
    ("no decay", "the past does not decay", {"w": _zero}),
    ("decay twice", "the decay is applied twice a token", {"w": lambda h: 2 * np.exp(h.vector(_DECAY))}),
    (
        "decay and first exchanged",
        "time_decay and time_first are exchanged",
        {"w": _exp_of(_FIRST), "u": lambda h: h.vector(_DECAY)},
    ),
    ("aa not decayed", "aa does not decay", {"factors": (MOVE, DECAY)}),
    ("bb not decayed", "bb does not decay", {"factors": (DECAY, MOVE)}),
    ("aa not multiplied", "aa is not multiplied by e^(pp - w - new pp)", {"factors": (NONE, DECAY)}),
    ("bb not multiplied", "bb is not multiplied by e^(pp - w - new pp)", {"factors": (DECAY, NONE)}),
    ("sums not multiplied", "neither aa nor bb is multiplied by e^(pp - w - new pp)", {"factors": (NONE, NONE)}),
    ("decay after", "a token decays once as it enters the state", {"decay_last": True}),
    ("state first", "the output reads the state that already holds the token", {"updated_first": True}),
    (
        "no bonus term",
        "the output is aa / bb of the state that already holds the token, without time_first",
        {"updated_first": True, "output": lambda old, new, aa, bb, v: aa / bb},
    ),
    ("past only", "the current token is left out of the output", {"output": lambda old, new, aa, bb, v: aa / bb}),
    (
        "no denominator",
        "the output is not divided by its denominator",
        {"output": lambda old, new, aa, bb, v: old * aa + new * v},
    ),
    (
        "upside down",
        "numerator and denominator are exchanged",
        {"output": lambda old, new, aa, bb, v: (old * bb + new) / (old * aa + new * v)},
    ),
    (
        "token not in bb",
        "the current token is left out of the denominator",
        {"output": lambda old, new, aa, bb, v: (old * aa + new * v) / (old * bb)},
    ),
    (
        "token not in aa",
        "the current token is left out of the numerator",
        {"output": lambda old, new, aa, bb, v: (old * aa) / (old * bb + new)},
    ),
    (
        "weights exchanged",
        "the weights of the past and of the current token are exchanged",
        {"output": lambda old, new, aa, bb, v: (new * aa + old * v) / (new * bb + old)},
    ),
    (
        "unscaled past",
        "aa and bb are not multiplied by e^(pp - max)",
        {"output": lambda old, new, aa, bb, v: (aa + new * v) / (bb + new)},
    ),
    (
        "unscaled token",
        "the current token is not multiplied by e^(u + k - max)",
        {"output": lambda old, new, aa, bb, v: (old * aa + v) / (old * bb + 1)},
    ),
    ("pp not carried", "pp is not handed on: it stays at its start", {"carried": lambda pp: pp * 0 + PP_START}),
    ("pp reset", "pp is set to 0 after every token, aa and bb are not", {"carried": lambda pp: pp * 0}),
    ("state reset", "the sums start afresh at every token", {"keep": lambda aa, bb: (aa * 0, bb * 0)}),
    ("aa not kept", "aa is not handed on", {"keep": lambda aa, bb: (aa * 0, bb)}),
    ("bb not kept", "bb is not handed on", {"keep": lambda aa, bb: (aa, bb * 0)}),
    ("aa and bb exchanged", "aa and bb change places in the state", {"keep": lambda aa, bb: (bb, aa)}),
    ("aa in bb's place", "bb is overwritten by aa (one buffer for both)", {"keep": lambda aa, bb: (aa, aa)}),
    ("k and v exchanged", "k and v are exchanged", {"k": lambda h: h.read("att.v"), "v": lambda h: h.read("att.k")}),
    ("k negated", "k has the wrong sign", {"k": lambda h: -h.read("att.k")}),
    ("v is k", "k is summed in place of v", {"v": lambda h: h.read("att.k")}),
    ("k ignored", "k is not used: every token has the same weight", {"k": lambda h: 0 * h.read("att.k")}),
    ("exp2", "2^x is computed in place of e^x", {"exp": np.exp2}),
    ("k late", "the key of the token before is taken", {"k": lambda h: _late(h.read("att.k"))}),
    ("v late", "the value of the token before is taken", {"v": lambda h: _late(h.read("att.v"))}),
    ("v late, but the first", "the value of the token before is taken", {"v": lambda h: _late(h.read("att.v"), True)}),
    ("k clamped", "keys are limited to 60", {"k": lambda h: np.minimum(h.read("att.k"), 60)}),
    ("k clamped at 30", "keys are limited to 30", {"k": lambda h: np.minimum(h.read("att.k"), 30)}),
    ("decay of |time_decay|", "|time_decay| is used, not exponentiated", {"w": lambda h: np.abs(h.vector(_DECAY))}),
    ("decay in fp16", "e^time_decay is kept in fp16", {"w": lambda h: _in(np.exp(h.vector(_DECAY)), "fp16")}),
    ("decay in bf16", "e^time_decay is kept in bf16", {"w": lambda h: _in(np.exp(h.vector(_DECAY)), "bf16")}),
    ("maximum", "the past does not decay where a new key is the largest exponent", {"at_new_maximum": False}),
    *(
        (f"{name} in blocks of {n}", f"in blocks of {n} tokens {words}", {"block": (n, times)})
        for n in (8, 16, 32, 64)
        for name, words, times in (
            ("sums dropped", "each starts with empty sums", None),
            ("decay missing", "the first does not decay the past", 0.0),
            ("decay twice", "the first decays the past twice", 2.0),
        )
    ),
    *(
        (f"guard {guard:g}", f"{guard:g} is added to the denominator", {"output": _guarded(guard)})
        for guard in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    ),
    ("gated v", "the receptance multiplies v before the sums", {"v": lambda h: h.read("att.v") * h.read("att.r")}),
)


def recurrences() -> list[Hypothesis]:
    """Of ``att.wkv``."""
    found = [at("att.wkv", name, sentence, _changed(changes)) for name, sentence, changes in _WRONG]
    reused = "the state is updated with the exponentials of the output: bonus kept, no decay"
    found.append(at("att.wkv", "output's exponentials", reused, _reused))
    found.append(
        at("att.wkv", "v itself", "v is passed on, nothing is summed", lambda h: (h.read("att.v"), _scan(h)[1]))
    )
    return found


def _changed(changes: dict[str, Any]) -> Callable[[Here], tuple[np.ndarray, WkvState]]:
    return lambda h: _scan(h, **changes)


def _last(name: str) -> Callable[[Here], np.ndarray]:
    return lambda h: h.read(name)[-1]


def _row(row: int) -> Callable[[Here], np.ndarray]:
    return lambda h: h.past[row]


def kept_rows() -> list[Hypothesis]:
    """Of what a prompt leaves in the state while its own logits are right."""

    def rows(name: str, sentence: str, **made: Callable[[Here], np.ndarray]) -> Hypothesis:
        numbers = {"ffn_x": FFN_X, "att_x": ATT_X, "aa": AA, "bb": BB, "pp": PP}
        return Hypothesis(f"state: {name}", sentence, {}, {numbers[key]: make for key, make in made.items()})

    return [
        rows("att_x unnormalised", "att_x keeps the stream, not ln1 of it", att_x=_last("x")),
        rows("ffn_x unnormalised", "ffn_x keeps the stream, not ln2 of it", ffn_x=_last("att.residual")),
        rows(
            "both unnormalised",
            "att_x and ffn_x keep the stream, not its LayerNorm",
            att_x=_last("x"),
            ffn_x=_last("att.residual"),
        ),
        rows("att_x, ffn_x exchanged", "att_x and ffn_x are exchanged", att_x=_last("ln2"), ffn_x=_last("ln1")),
        rows("att_x mixed", "att_x keeps the mixed input of the keys", att_x=_last("att.xk")),
        rows("ffn_x mixed", "ffn_x keeps the mixed input of the keys", ffn_x=_last("ffn.xk")),
        rows("att_x of the first", "att_x keeps the first token of the prompt", att_x=lambda h: h.read("ln1")[0]),
        rows("ffn_x of the first", "ffn_x keeps the first token of the prompt", ffn_x=lambda h: h.read("ln2")[0]),
        rows("att_x stale", "att_x is not updated", att_x=_row(ATT_X)),
        rows("ffn_x stale", "ffn_x is not updated", ffn_x=_row(FFN_X)),
        rows("att_x of the last but one", "att_x lags one token behind", att_x=lambda h: h.read("ln1")[-2:][0]),
        rows("ffn_x of the last but one", "ffn_x lags one token behind", ffn_x=lambda h: h.read("ln2")[-2:][0]),
        rows("sums stale", "aa, bb and pp are not updated", aa=_row(AA), bb=_row(BB), pp=_row(PP)),
        rows("pp stale", "pp is not updated, aa and bb are", pp=_row(PP)),
    ]
