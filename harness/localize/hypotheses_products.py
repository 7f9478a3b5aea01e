"""Hypotheses about matrix products, gates and what is computed element by element, and about embedding and head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np

from harness.localize.hypotheses import Hypothesis, at
from reference.forward import sigmoid
from reference.operations import BLOCK, Here, recurrence
from reference.weights import Tensor

#: Product -> what it reads, its matrix. Those of GATES are followed by the logistic function.
PRODUCTS: Mapping[str, tuple[str, str]] = {
    "att.k": ("att.xk", "att.key.weight"),
    "att.v": ("att.xv", "att.value.weight"),
    "att.r": ("att.xr", "att.receptance.weight"),
    "att.out": ("att.rwkv", "att.output.weight"),
    "ffn.k": ("ffn.xk", "ffn.key.weight"),
    "ffn.v": ("ffn.k2", "ffn.value.weight"),
    "ffn.r": ("ffn.xr", "ffn.receptance.weight"),
    "logits": ("ln_out", "head.weight"),
}
GATES = ("att.r", "ffn.r")

_SQUARE = ("att.k", "att.v", "att.r", "att.out", "ffn.r")


def product(h: Here, point: str, x: np.ndarray, weight: Tensor) -> np.ndarray:
    """The operation ``point`` with another input or matrix."""
    op = h.op.at(h.at + point)
    y = op.linear(x, weight)
    return np.asarray(op.act(sigmoid(y))) if point in GATES else y


def _transposed(weight: Tensor) -> Tensor:
    return Tensor.of(np.ascontiguousarray(weight.array().T))


def _of(point: str, source: str, matrix: str, turned: bool = False) -> Callable[[Here], np.ndarray]:
    def compute(h: Here) -> np.ndarray:
        weight = h.weights[h.at + matrix]
        return product(h, point, h.read(source), _transposed(weight) if turned else weight)

    return compute


#: Product -> what else of the same width it might read, and in which words.
_SOURCES = {
    "att.k": ("att.xv", "att.xr", "ln1"),
    "att.v": ("att.xk", "att.xr", "ln1"),
    "att.r": ("att.xk", "att.xv", "ln1"),
    "att.out": ("att.wkv", "att.r", "att.v"),
    "ffn.k": ("ffn.xr", "ln2"),
    "ffn.v": ("ffn.k",),
    "ffn.r": ("ffn.xk", "ln2"),
    "logits": ("x",),
}


def _short(matrix: str) -> str:
    return matrix.removesuffix(".weight")


def _shape_kind(point: str) -> str:
    return "square" if point in _SQUARE else point


def products() -> list[Hypothesis]:
    """Of every matrix product: another input, another matrix, a transposed one."""
    found = []
    for point, (source, matrix) in PRODUCTS.items():
        for other in _SOURCES[point]:
            found.append(
                at(
                    point,
                    f"reads {other}",
                    f"{_short(matrix)} is applied to {other}, not {source}",
                    _read(point, other),
                )
            )
        for other_point, (other_source, other) in PRODUCTS.items():
            if other == matrix or _shape_kind(point) != _shape_kind(other_point):
                continue
            sentence = f"{_short(other)} is used in place of {_short(matrix)}"
            found.append(at(point, _short(other), sentence, _of(point, source, other)))
            if point[:3] == other_point[:3] and other_point != "att.out" and point != "att.out":
                sentence = f"{_short(other)} is applied to {other_source}: {other_point} is computed twice"
                found.append(at(point, f"is {other_point}", sentence, _of(point, other_source, other)))
        if point in _SQUARE:
            found.append(at(point, "transposed", f"{_short(matrix)} is transposed", _of(point, source, matrix, True)))
    found.append(
        at(
            "ffn.k",
            "ffn.value",
            "ffn.value, transposed, is used as key",
            _of("ffn.k", "ffn.xk", "ffn.value.weight", True),
        )
    )
    found.append(
        at("ffn.v", "ffn.key", "ffn.key, transposed, is used as value", _of("ffn.v", "ffn.k2", "ffn.key.weight", True))
    )
    found.append(at("logits", "tied", "emb is used as head (tied weights)", _of("logits", "ln_out", "emb.weight")))
    return [*found, *_exchanged(), _all_transposed()]


def _read(point: str, source: str) -> Callable[[Here], np.ndarray]:
    return _of(point, source, PRODUCTS[point][1])


def _exchanged() -> list[Hypothesis]:
    """Two matrices of the same shape, each in the other's place."""
    found = []
    for a, b in combinations(_SQUARE, 2):
        (sa, ma), (sb, mb) = PRODUCTS[a], PRODUCTS[b]
        sentence = f"{_short(ma)} and {_short(mb)} are exchanged"
        found.append(Hypothesis(f"{a}, {b}: matrices", sentence, {a: _of(a, sa, mb), b: _of(b, sb, ma)}))
    return found


def _all_transposed() -> Hypothesis:
    computes = {point: _of(point, *PRODUCTS[point], True) for point in _SQUARE}
    return Hypothesis("square matrices transposed", "all square matrices are transposed", computes)


def _logit(h: Here, point: str) -> np.ndarray:
    source, matrix = PRODUCTS[point]
    return h.op.at(h.at + point).linear(h.read(source), h.weights[h.at + matrix])


_GATED: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("sigmoid skipped", "the logistic function is skipped", lambda x: x),
    ("sigmoid twice", "the logistic function is applied twice", lambda x: sigmoid(sigmoid(x))),
    ("negated", "the gate has the wrong sign: 1 - r", lambda x: sigmoid(-x)),
    ("tanh", "tanh is applied in place of the logistic function", np.tanh),
    ("relu", "relu is applied in place of the logistic function", lambda x: np.maximum(x, 0)),
    ("silu", "x sigmoid(x) is applied in place of sigmoid(x)", lambda x: x * sigmoid(x)),
    ("exp", "e^x is applied in place of the logistic function", np.exp),
    ("hard sigmoid", "a hard sigmoid (x/6 + 1/2, clipped) is applied", lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    ("steep hard sigmoid", "a hard sigmoid (x/5 + 1/2, clipped) is applied", lambda x: np.clip(x / 5 + 0.5, 0, 1)),
    ("softsign", "a rational sigmoid (x / (1 + |x|), shifted) is applied", lambda x: 0.5 + 0.5 * x / (1 + np.abs(x))),
    ("softmax", "softmax over channels is applied in place of the logistic function", lambda x: _softmax(x)),
    ("base 2", "1 / (1 + 2^-x) is computed in place of 1 / (1 + e^-x)", lambda x: 1 / (1 + np.exp2(-x))),
    ("gate open", "the gate is always 1", np.ones_like),
)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def gates() -> list[Hypothesis]:
    """Of both receptances."""

    def made(point: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Here], np.ndarray]:
        return lambda h: np.asarray(h.op.at(h.at + point).act(function(_logit(h, point))))

    found = []
    for name, sentence, function in _GATED:
        computes = {point: made(point, function) for point in GATES}
        found += [at(point, name, sentence, compute) for point, compute in computes.items()]
        found.append(Hypothesis(f"{', '.join(GATES)}: {name}", sentence, computes))
    return found


def _act(point: str, function: Callable[[Here], np.ndarray]) -> Callable[[Here], np.ndarray]:
    return lambda h: np.asarray(h.op.at(h.at + point).act(function(h)))


#: Product with the gate -> gate, what is gated, the gate of the other half.
_TIMES = {"att.rwkv": ("att.r", "att.wkv"), "ffn.out": ("ffn.r", "ffn.v")}


def elementwise() -> list[Hypothesis]:
    """Of the products with a gate, and of squared ReLU."""
    found = []
    for point, (gate, value) in _TIMES.items():
        for name, sentence, function in _times(gate, value):
            found.append(at(point, name, sentence, _act(point, function)))
    other = "the receptance of the other half (att.r) is multiplied in"
    found.append(at("ffn.out", "gate of att", other, _act("ffn.out", lambda h: h.read("att.r") * h.read("ffn.v"))))
    k2: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
        ("relu without square", "relu is not squared", lambda k: np.maximum(k, 0)),
        ("square without relu", "k is squared without relu before", np.square),
        ("neither", "neither relu nor square is applied", lambda k: k),
        ("wrong side", "relu keeps the negative side", lambda k: np.square(np.minimum(k, 0))),
        ("signed square", "k |k| is computed: the square keeps its sign", lambda k: k * np.abs(k)),
        ("square of silu", "silu is squared, not relu", lambda k: np.square(k * sigmoid(k))),
        ("silu", "silu is computed, not squared relu", lambda k: k * sigmoid(k)),
        ("gelu", "gelu is computed, not squared relu", _gelu),
        ("quick gelu", "k sigmoid(1.702 k) is computed, not squared relu", lambda k: k * sigmoid(1.702 * k)),
        ("exact gelu", "gelu (by erf) is computed, not squared relu", _exact_gelu),
        ("leaky", "relu lets a hundredth of the negative side through", lambda k: np.square(np.maximum(k, 0.01 * k))),
        ("tenth", "relu lets a tenth of the negative side through", lambda k: np.square(np.maximum(k, 0.1 * k))),
        ("squared gelu", "gelu is squared, not relu", lambda k: np.square(_gelu(k))),
        ("cube", "relu is cubed, not squared", lambda k: np.maximum(k, 0) ** 3),
        ("square root", "the square root of relu is computed", lambda k: np.sqrt(np.maximum(k, 0))),
        ("fourth power", "squared relu is squared again", lambda k: np.maximum(k, 0) ** 4),
        ("relu6", "relu is clipped at 6 before it is squared", lambda k: np.square(np.clip(k, 0, 6))),
        ("halved", "half the square is computed", lambda k: np.square(np.maximum(k, 0)) / 2),
    )
    found += [at("ffn.k2", name, said, _act("ffn.k2", _on("ffn.k", function))) for name, said, function in k2]
    return [*found, *_gate_late()]


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _exact_gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(x.dtype)))


def _on(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Here], np.ndarray]:
    return lambda h: function(h.read(name))


def _times(gate: str, value: str) -> list[tuple[str, str, Callable[[Here], np.ndarray]]]:
    return [
        ("gate missing", f"the receptance is not applied: {value} is passed on", lambda h: h.read(value)),
        ("gate alone", "the receptance alone is passed on", lambda h: h.read(gate)),
        ("gate added", "the receptance is added, not multiplied", lambda h: h.read(gate) + h.read(value)),
        ("gate inverted", "1 - r is multiplied in place of r", lambda h: (1 - h.read(gate)) * h.read(value)),
        ("gate twice", "the receptance is multiplied in twice", lambda h: h.read(gate) ** 2 * h.read(value)),
        (
            "sigmoid again",
            "sigmoid is applied to the receptance again",
            lambda h: sigmoid(h.read(gate)) * h.read(value),
        ),
        (
            "gate before sigmoid",
            "the receptance is multiplied in without its sigmoid",
            lambda h: _logit(h, gate) * h.read(value),
        ),
        ("divided by the gate", "the product is a quotient", lambda h: h.read(value) / h.read(gate)),
        (
            "gate rotated by halves",
            "the halves of the receptance's channels are exchanged",
            lambda h: np.roll(h.read(gate), h.read(gate).shape[-1] // 2, axis=-1) * h.read(value),
        ),
        (
            "gate of the token before",
            "the receptance of the token before is multiplied in",
            lambda h: np.concatenate([h.read(gate)[:1] * 0, h.read(gate)[:-1]]) * h.read(value),
        ),
    ]


def _gate_late() -> list[Hypothesis]:
    """The receptance at another place of its half."""

    def out_gated(h: Here) -> np.ndarray:
        op = h.op.at(h.at + "att.out")
        return np.asarray(op.act(h.read("att.r") * op.linear(h.read("att.wkv"), h.weights[h.at + "att.output.weight"])))

    def value_gated(h: Here) -> np.ndarray:
        y, after = recurrence(h)
        return h.read("att.r") * y, after  # type: ignore[return-value]

    late = "the receptance is applied after the output matrix, not before"
    early = "the receptance is applied in the recurrence's output already, and again after"
    value = _act("att.v", lambda h: h.read("att.r") * BLOCK["att.v"].compute(h))
    return [
        at("att.v", "gated", "the receptance is multiplied into the value, before the recurrence", value),
        Hypothesis("att.out: gate after output", late, {"att.rwkv": lambda h: h.read("att.wkv"), "att.out": out_gated}),
        at("att.out", "gated again", "the receptance is applied before and after the output matrix", _gated_again),
        at("att.wkv", "gated", early, value_gated),
    ]


def _gated_again(h: Here) -> np.ndarray:
    return np.asarray(h.read("att.r") * BLOCK["att.out"].compute(h))
