"""Hypotheses about LayerNorm, token shift and additions to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from harness.localize.hypotheses import Hypothesis, at, each
from harness.localize.part import Unknown
from reference.forward import ATT_X, FFN_X, LN_EPS, mix
from reference.operations import Here


def _norm(
    h: Here,
    source: str,
    name: str,
    eps: float = LN_EPS,
    *,
    mean: bool = True,
    outside: bool = False,
    weight: bool = True,
    bias: bool = True,
    unbiased: bool = False,
    axis: int | tuple[int, ...] = -1,
    other: str = "",
) -> np.ndarray:
    """LayerNorm ``name`` of ``source`` with one thing different."""
    x = h.read(source)
    op = h.op.at(h.at + name)
    named = h.at + (other or name)
    centred = x - x.mean(axis=axis, keepdims=True)
    x = centred if mean else x
    variance = np.square(x).mean(axis=axis, keepdims=True)
    if unbiased:
        variance = variance * op.dtype.type(x.shape[-1] / max(1, x.shape[-1] - 1))
    scale = np.sqrt(variance) + op.dtype.type(eps) if outside else np.sqrt(variance + op.dtype.type(eps))
    x = x / scale
    if weight:
        x = x * h.weights[named + ".weight"].array(op.dtype)
    if bias:
        x = x + h.weights[named + ".bias"].array(op.dtype)
    return np.asarray(op.act(x))


def _bias_first(h: Here, source: str, name: str) -> np.ndarray:
    w, b = (h.weights[f"{h.at}{name}.{part}"].array(h.op.dtype) for part in ("weight", "bias"))
    return np.asarray(h.op.at(h.at + name).act((_norm(h, source, name, weight=False, bias=False) + b) * w))


def _again(h: Here, source: str, name: str) -> np.ndarray:
    once = _norm(h, source, name)
    return _norm(h._replace(read=lambda _: once), source, name)


def _in_fp16(h: Here, source: str, name: str) -> np.ndarray:
    x = h.read(source)
    half = x.astype(np.float16)
    mean = half.mean(axis=-1, keepdims=True, dtype=np.float16)
    variance = np.square(half - mean).mean(axis=-1, keepdims=True, dtype=np.float16)
    y = (x - mean) / np.sqrt(variance.astype(x.dtype) + LN_EPS)
    w, b = (h.weights[f"{h.at}{name}.{part}"].array(h.op.dtype) for part in ("weight", "bias"))
    return np.asarray(h.op.at(h.at + name).act(y * w + b))


def _padded(multiple: int) -> Callable[[Here, str, str], np.ndarray]:
    """Zeros up to a multiple of some width are averaged over too."""

    def compute(h: Here, source: str, name: str) -> np.ndarray:
        x = h.read(source)
        n = -(-x.shape[-1] // multiple) * multiple
        if n == x.shape[-1]:
            raise Unknown(f"padding to {multiple}, of which the width is a multiple")
        filled = np.pad(x, [(0, 0), (0, n - x.shape[-1])])
        mean = filled.mean(axis=-1, keepdims=True)
        y = (x - mean) / np.sqrt(np.square(filled - mean).mean(axis=-1, keepdims=True) + h.op.dtype.type(LN_EPS))
        w, b = (h.weights[f"{h.at}{name}.{part}"].array(h.op.dtype) for part in ("weight", "bias"))
        return np.asarray(h.op.at(h.at + name).act(y * w + b))

    return compute


#: LayerNorm -> what it reads.
_NORMS = {"blocks.0.ln0": "emb", "ln1": "x", "ln2": "att.residual", "ln_out": "x"}

_EPS = {"1e-6": 1e-6, "1e-12": 1e-12, "1e-3": 1e-3, "1e-4": 1e-4, "1e-8": 1e-8}


def norms() -> list[Hypothesis]:
    """Of every LayerNorm."""
    found = []
    for name, source in _NORMS.items():
        found += [at(name, what, said, _made(source, name, compute)) for what, said, compute in _norm_defects(name)]
    found.append(
        at("blocks.0.ln0", "ln1 instead", "ln1's weight and bias are applied in place of ln0's", _other("emb", "ln1"))
    )
    found.append(at("ln1", "ln2 instead", "ln2's weight and bias are applied in place of ln1's", _named("x", "ln2")))
    found.append(
        at("ln2", "ln1 instead", "ln1's weight and bias are applied in place of ln2's", _named("att.residual", "ln1"))
    )
    found.append(
        at("ln2", "of the block's input", "ln2 is taken of the block's input, without attention", _read("x", "ln2"))
    )
    return found


_Source = Callable[[Here, str, str], np.ndarray]


def _norm_defects(name: str) -> list[tuple[str, str, _Source]]:
    short = name.split(".")[-1]
    eps = [
        (f"eps {text}", f"{short} has eps {text} where RWKV-4 has 1e-5", _option(eps=value))
        for text, value in _EPS.items()
    ]
    return [
        *eps,
        ("eps outside", f"{short} adds eps to the standard deviation, not to the variance", _option(outside=True)),
        ("eps missing", f"{short} has no eps", _option(eps=0.0)),
        ("skipped", f"{short} is skipped", lambda h, source, _: h.read(source)),
        ("without bias", f"{short} does not add its bias", _option(bias=False)),
        ("without weight", f"{short} does not multiply by its weight", _option(weight=False)),
        ("bare", f"{short} applies neither weight nor bias", _option(weight=False, bias=False)),
        ("unbiased variance", f"{short} divides the variance by n - 1, not n", _option(unbiased=True)),
        ("mean kept", f"{short} does not subtract the mean (RMSNorm)", _option(mean=False)),
        ("over tokens too", f"{short} takes mean and variance over all tokens, not each", _option(axis=(0, 1))),
        ("applied twice", f"{short} is applied twice", lambda h, source, name: _again(h, source, name)),
        ("in fp16", f"{short} has its mean and variance summed in fp16", _in_fp16),
        *(
            (f"padded to {n}", f"{short} has the statistics of a width padded to a multiple of {n}", _padded(n))
            for n in (48, 64, 96, 128, 256)
        ),
        ("bias first", f"{short} adds its bias before it multiplies by its weight", _bias_first),
    ]


def _option(**options: object) -> _Source:
    return lambda h, source, name: _norm(h, source, name, **options)  # type: ignore[arg-type]


def _made(source: str, name: str, compute: _Source) -> Callable[[Here], np.ndarray]:
    return lambda h: compute(h, source, name)


def _named(source: str, other: str) -> Callable[[Here], np.ndarray]:
    return lambda h: _norm(h, source, other)


def _other(source: str, other: str) -> Callable[[Here], np.ndarray]:
    return lambda h: _norm(h, source, "blocks.0.ln0", other=f"blocks.0.{other}")


def _read(source: str, name: str) -> Callable[[Here], np.ndarray]:
    return lambda h: _norm(h, source, name)


class Shift(NamedTuple):
    """What a token shift mixes: results, the state's row of the token before, its vector."""

    source: str
    row: int
    vector: str


SHIFTS: Mapping[str, Shift] = {
    **{f"att.x{c}": Shift("ln1", ATT_X, f"att.time_mix_{c}") for c in "kvr"},
    **{f"ffn.x{c}": Shift("ln2", FFN_X, f"ffn.time_mix_{c}") for c in "kr"},
}


def _halves(h: Here, point: str, now: np.ndarray, before: np.ndarray, vector: str = "") -> np.ndarray:
    mu = h.vector(vector or SHIFTS[point].vector)
    return mix(now, before, mu, h.op.at(h.at + point))


def _earlier(x: np.ndarray, past: np.ndarray, by: int = 1) -> np.ndarray:
    """Rows ``by`` tokens earlier; ``past`` for those before the prompt."""
    return np.concatenate([np.repeat(past[None], min(by, len(x)), axis=0), x[:-by]])[: len(x)]


def _swapped(h: Here, point: str) -> np.ndarray:
    now = h.read(SHIFTS[point].source)
    return _halves(h, point, h.shifted(SHIFTS[point].source, SHIFTS[point].row), now)


def _by_two(h: Here, point: str) -> np.ndarray:
    now = h.read(SHIFTS[point].source)
    return _halves(h, point, now, _earlier(now, h.past[SHIFTS[point].row], 2))


def _next(h: Here, point: str) -> np.ndarray:
    now = h.read(SHIFTS[point].source)
    return _halves(h, point, now, np.concatenate([now[1:], now[-1:]]))


def _around(h: Here, point: str) -> np.ndarray:
    now = h.read(SHIFTS[point].source)
    return _halves(h, point, now, np.roll(now, 1, axis=0))


def _nothing_before(h: Here, point: str) -> np.ndarray:
    now = h.read(SHIFTS[point].source)
    return _halves(h, point, now, np.zeros_like(now))


def _first_itself(h: Here, point: str) -> np.ndarray:
    now = h.read(SHIFTS[point].source)
    return _halves(h, point, now, _earlier(now, now[0]))


def _unnormed(h: Here, point: str) -> np.ndarray:
    raw = h.read("x" if SHIFTS[point].source == "ln1" else "att.residual")
    return _halves(h, point, h.read(SHIFTS[point].source), _earlier(raw, h.past[SHIFTS[point].row]))


def _of_raw(h: Here, point: str) -> np.ndarray:
    raw = h.read("x" if SHIFTS[point].source == "ln1" else "att.residual")
    return _halves(h, point, raw, _earlier(raw, h.past[SHIFTS[point].row]))


def _unweighted(h: Here, point: str) -> np.ndarray:
    shift = SHIFTS[point]
    now, before, mu = h.read(shift.source), h.shifted(shift.source, shift.row), h.vector(shift.vector)
    return np.asarray(h.op.at(h.at + point).act(now * mu + before))


def _only_now(h: Here, point: str) -> np.ndarray:
    return np.asarray(h.op.at(h.at + point).act(h.read(SHIFTS[point].source) * h.vector(SHIFTS[point].vector)))


_MIXING = (
    ("shares swapped", "time_mix weighs the token before, and 1 - time_mix the current one", _swapped),
    ("no shift", "no token shift: the current token alone", lambda h, p: h.read(SHIFTS[p].source)),
    (
        "previous only",
        "the token before alone, the current one not mixed in",
        lambda h, p: h.shifted(SHIFTS[p].source, SHIFTS[p].row),
    ),
    ("shift by two", "the token shift goes back two tokens", _by_two),
    ("shift forward", "the token shift takes the next token, not the one before", _next),
    ("wrapped shift", "the last token of the prompt stands before the first", _around),
    ("before is zero", "the token before is taken as zero (token shift not carried)", _nothing_before),
    ("first mixed with itself", "the first token is mixed with itself, not with the state", _first_itself),
    ("before unnormalised", "the token before is taken from the stream, before its LayerNorm", _unnormed),
    ("stream, not norm", "the stream is mixed, not its LayerNorm", _of_raw),
    ("1 - time_mix missing", "the token before is added whole, not times 1 - time_mix", _unweighted),
)


def mixing() -> list[Hypothesis]:
    """Of every token shift, alone and in all of a half."""
    found = []
    for half in ("att", "ffn"):
        points = [point for point in SHIFTS if point.startswith(half)]
        for name, sentence, defect in _MIXING:
            found += each(points, name, sentence, defect)
        for point in points:
            found += [_vector_of(point, other) for other in SHIFTS if other != point]
        found += [_exchanged(a, b) for i, a in enumerate(points) for b in points[i + 1 :]]
    return found


def _with_vector(point: str, vector: str) -> Callable[[Here], np.ndarray]:
    shift = SHIFTS[point]
    return lambda h: _halves(h, point, h.read(shift.source), h.shifted(shift.source, shift.row), vector)


def _vector_of(point: str, other: str) -> Hypothesis:
    vector = SHIFTS[other].vector
    sentence = f"{vector} is used in place of {SHIFTS[point].vector}"
    return at(point, vector, sentence, _with_vector(point, vector))


def _exchanged(a: str, b: str) -> Hypothesis:
    va, vb = SHIFTS[a].vector, SHIFTS[b].vector
    sentence = f"{va} and {vb.split('.')[1]} are exchanged"
    return Hypothesis(f"{va}, {vb}: exchanged", sentence, {a: _with_vector(a, vb), b: _with_vector(b, va)})


#: Addition to the stream -> what enters, what is added, its LayerNorm.
_SUMS = {"att.residual": ("x", "att.out", "ln1"), "ffn.residual": ("att.residual", "ffn.out", "ln2")}


def residuals() -> list[Hypothesis]:
    """Of both additions to the stream."""
    found = []
    for point, (stream, out, norm) in _SUMS.items():
        found += [
            at(point, "output not added", f"{out} is not added to the stream", _sum(point, stream)),
            at(point, "stream dropped", f"{out} replaces the stream instead of being added to it", _sum(point, out)),
            at(point, "after the norm", f"{out} is added to {norm}, not to the stream", _sum(point, norm, out)),
            at(point, "added twice", f"{out} is added twice", _sum(point, stream, out, out)),
            at(point, "stream doubled", "the stream is added twice", _sum(point, stream, stream, out)),
            at(point, "subtracted", f"{out} is subtracted", _sum(point, stream, out, sign=-1)),
        ]
    attention = "ffn.out is added to the block's input: what attention has added is lost"
    found.append(at("ffn.residual", "attention lost", attention, _sum("ffn.residual", "x", "ffn.out")))
    found.append(
        at("ffn.residual", "attention twice", "att.out is added again", _sum("ffn.residual", "x", "att.out", "att.out"))
    )
    return found


def _sum(point: str, *names: str, sign: int = 1) -> Callable[[Here], np.ndarray]:
    def compute(h: Here) -> np.ndarray:
        total = h.read(names[0])
        for name in names[1:]:
            total = total + h.op.dtype.type(sign) * h.read(name)
        return np.asarray(h.op.at(h.at + point).residual(total))

    return compute
