"""Operations computed otherwise than the reference does, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.forward import AA, ATT_X, FFN_X, LN_EPS, PP, WkvState, vector
from reference.operations import Here
from reference.weights import Tensor
from suites.selftest.planted.fault import Patch
from suites.selftest.planted.wrong_wkv import Now, looped

#: Layers of the largest model that is drawn.
_LAYERS = 16


def _everywhere(**replaced: Callable[[Here], Any]) -> Patch:
    """Keyword ``att_xk`` stands for the trace point ``att.xk`` of every layer."""
    named = {name.replace("_", ".", 1) if name[:4] in ("att_", "ffn_") else name: op for name, op in replaced.items()}
    return Patch(replaced={f"blocks.{i}.{name}": op for i in range(_LAYERS) for name, op in named.items()})


def _one_pass_norm(source: str, name: str) -> Callable[[Here], np.ndarray]:
    """Mean and mean of squares in one pass, in float64 as a careful kernel would."""

    def norm(h: Here) -> np.ndarray:
        op = h.op.at(h.at + name)
        x = h.read(source).astype(np.float64)
        mean = x.mean(axis=-1, keepdims=True)
        scale = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) - np.square(mean) + LN_EPS)
        weight, bias = (vector(h.weights, f"{h.at}{name}.{part}", op) for part in ("weight", "bias"))
        return op.act((((x - mean) * scale).astype(op.dtype) * weight + bias).astype(op.dtype))

    return norm


def _lerp(name: str) -> Callable[[Here], np.ndarray]:
    """previous + mu (current - previous), rounded once, as a fused kernel does."""
    source, row = ("ln1", ATT_X) if name.startswith("att") else ("ln2", FFN_X)

    def mix(h: Here) -> np.ndarray:
        before = h.shifted(source, row)
        mu = h.vector(name.replace(".x", ".time_mix_"))
        return h.op.at(h.at + name).act(before + mu * (h.read(source) - before))

    return mix


def _half_tanh(name: str, source: str, matrix: str) -> Callable[[Here], np.ndarray]:
    """The logistic function as (1 + tanh(x / 2)) / 2."""

    def gate(h: Here) -> np.ndarray:
        op = h.op.at(h.at + name)
        return op.act((1 + np.tanh(op.linear(h.read(source), h.weights[h.at + matrix]) / 2)) / 2)

    return gate


def _base_two(past: WkvState, now: Now) -> np.ndarray:
    """Exponentials as powers of two."""
    log2e = now.k.dtype.type(np.log2(np.e))
    uk = now.u + now.k
    top = np.maximum(past.pp, uk)
    old, new = np.exp2((past.pp - top) * log2e), np.exp2((uk - top) * log2e)
    return np.asarray((old * past.aa + new * now.v) / (old * past.bb + new))


def _exponent_above(h: Here) -> tuple[np.ndarray, WkvState]:
    """The sums are kept at an exponent one larger than need be: the same state, written otherwise."""
    y, after = looped()(h._replace(past=_moved(h.past, -1.0)))
    return y, WkvState(after.aa / np.e, after.bb / np.e, after.pp + 1)


def _moved(past: np.ndarray, by: float) -> np.ndarray:
    moved = past.copy()
    moved[PP] = past[PP] + by
    moved[AA : AA + 2] = past[AA : AA + 2] * past.dtype.type(np.exp(-by))
    return moved


def _backwards(name: str, source: str, matrix: str) -> Callable[[Here], np.ndarray]:
    """A product whose inputs are taken from the last to the first."""

    def product(h: Here) -> np.ndarray:
        op = h.op.at(h.at + name)
        order = np.arange(h.read(source).shape[1])[::-1]
        w = h.weights[h.at + matrix].array(np.float32)
        return op.linear(np.ascontiguousarray(h.read(source)[:, order]), Tensor.of(np.ascontiguousarray(w[:, order])))

    return product


#: Name -> patch that changes nothing but rounding.
EQUIVALENTS: dict[str, Patch] = {
    "the recurrence token by token": _everywhere(att_wkv=looped()),
    "powers of two": _everywhere(att_wkv=looped(read=_base_two)),
    "another exponent of the sums": _everywhere(att_wkv=_exponent_above),
    "one-pass LayerNorm": _everywhere(ln1=_one_pass_norm("x", "ln1"), ln2=_one_pass_norm("att.residual", "ln2")),
    "fused token shift": _everywhere(
        **{n.replace(".", "_"): _lerp(n) for n in ("att.xk", "att.xv", "att.xr", "ffn.xk")}
    ),
    "gates by tanh": _everywhere(
        att_r=_half_tanh("att.r", "att.xr", "att.receptance.weight"),
        ffn_r=_half_tanh("ffn.r", "ffn.xr", "ffn.receptance.weight"),
    ),
    "sums from the other end": _everywhere(ffn_v=_backwards("ffn.v", "ffn.k2", "ffn.value.weight")),
}
