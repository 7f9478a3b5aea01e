"""The forward pass of RWKV-4 in MLX: reference/forward.py, operation for operation, T tokens at once.

Results are of the compute type, WKV and its state float32. Nothing is computed before somebody evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from backends.mlx_rwkv.schemes import Kept
from backends.mlx_rwkv.weights import Array, Placing, Product
from backends.mlx_rwkv.wkv import Sums, wkv
from reference.config import Config
from reference.forward import LN_EPS, PP_START
from reference.weights import Weights

#: Called with a trace point's name and its value ``(T, width)``.
Tap = Callable[[str, Array], None]


class LayerState(NamedTuple):
    """State of one layer: last inputs ``(1, C)`` in the compute type; ``aa, bb, pp``, each float32 ``(1, C)``."""

    att_x: Array
    ffn_x: Array
    sums: Sums


State = tuple[LayerState, ...]


@dataclass(frozen=True)
class Norm:
    """LayerNorm; MLX takes its statistics in float32 for every input type."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        return mx.fast.layer_norm(x, self.weight, self.bias, LN_EPS)


@dataclass(frozen=True)
class Layer:
    """Weights of one block; decay ``w`` and bonus ``u`` float32 ``(C,)``, ``mu`` stacked ``(n, 1, C)``."""

    at: str
    ln1: Norm
    ln2: Norm
    att_mu: Array
    w: Array
    u: Array
    att_key: Product
    att_value: Product
    att_receptance: Product
    att_output: Product
    ffn_mu: Array
    ffn_key: Product
    ffn_receptance: Product
    ffn_value: Product


class Model:
    """RWKV-4 with its weights on the device of the stream it is made and called on."""

    def __init__(self, checkpoint: Weights, kept: Kept, device: str) -> None:
        self.config: Config = checkpoint.config
        place = Placing(checkpoint, kept, device)
        self.dtype = place.dtype
        self._emb = place.embedding("emb.weight")
        self._ln0 = _norm(place, "blocks.0.ln0")
        self._layers = [_layer(place, f"blocks.{i}.") for i in range(self.config.n_layer)]
        self._ln_out = _norm(place, "ln_out")
        self.head = place.linear("head.weight")

    def initial_state(self) -> State:
        """State before the first token."""
        x = mx.zeros((1, self.config.n_embd), dtype=self.dtype)
        zero = mx.zeros((1, self.config.n_embd))
        return tuple(LayerState(x, x, (zero, zero, zero + PP_START)) for _ in self._layers)

    def hidden(self, ids: Array, state: State, tap: Tap) -> tuple[Array, State]:
        """Token ids ``(T,)`` -> what the head takes, ``(T, C)``, and the new state."""
        x = self._emb(ids)
        tap("emb", x)
        x = self._ln0(x)
        tap("blocks.0.ln0", x)
        new = []
        for layer, past in zip(self._layers, state, strict=True):
            h = layer.ln1(x)
            tap(layer.at + "ln1", h)
            out, sums = time_mix(h, layer, past, tap)
            x = x + out
            tap(layer.at + "att.residual", x)
            g = layer.ln2(x)
            tap(layer.at + "ln2", g)
            x = x + channel_mix(g, layer, past.ffn_x, tap)
            tap(layer.at + "ffn.residual", x)
            new.append(LayerState(h[-1:], g[-1:], sums))
        x = self._ln_out(x)
        tap("ln_out", x)
        return x, tuple(new)


def time_mix(h: Array, layer: Layer, past: LayerState, tap: Tap) -> tuple[Array, Sums]:
    """``h (T, C)`` = ln1(x) -> output ``(T, C)``, new sums."""
    at = layer.at + "att."
    xk, xv, xr = mixed(h, past.att_x, layer.att_mu)
    tap(at + "xk", xk)
    tap(at + "xv", xv)
    tap(at + "xr", xr)
    k, v = layer.att_key(xk), layer.att_value(xv)
    r = mx.sigmoid(layer.att_receptance(xr))
    tap(at + "k", k)
    tap(at + "v", v)
    tap(at + "r", r)
    y, sums = wkv(k.astype(mx.float32), v.astype(mx.float32), layer.w, layer.u, past.sums)
    y = y.astype(r.dtype)
    tap(at + "wkv", y)
    y = r * y
    tap(at + "rwkv", y)
    out = layer.att_output(y)
    tap(at + "out", out)
    return out, sums


def channel_mix(h: Array, layer: Layer, ffn_x: Array, tap: Tap) -> Array:
    """``h (T, C)`` = ln2(x) -> ``(T, C)``."""
    at = layer.at + "ffn."
    xk, xr = mixed(h, ffn_x, layer.ffn_mu)
    tap(at + "xk", xk)
    tap(at + "xr", xr)
    k = layer.ffn_key(xk)
    tap(at + "k", k)
    k2 = mx.square(mx.maximum(k, 0))
    tap(at + "k2", k2)
    v = layer.ffn_value(k2)
    tap(at + "v", v)
    r = mx.sigmoid(layer.ffn_receptance(xr))
    tap(at + "r", r)
    out = r * v
    tap(at + "out", out)
    return out


def mixed(h: Array, past: Array, mu: Array) -> Any:
    """Token shift for several ``mu (n, 1, C)`` at once: n arrays ``(T, C)``; ``past (1, C)`` comes before the first."""
    before = past if len(h) == 1 else mx.concatenate([past, h[:-1]])
    return before + (h - before) * mu


def no_tap(name: str, value: Array) -> None:
    """A tap that looks at nothing."""


def _norm(place: Placing, name: str) -> Norm:
    return Norm(place.vector(f"{name}.weight"), place.vector(f"{name}.bias"))


def _layer(place: Placing, at: str) -> Layer:
    return Layer(
        at=at,
        ln1=_norm(place, at + "ln1"),
        ln2=_norm(place, at + "ln2"),
        att_mu=place.mixes(at + "att.", "kvr"),
        w=mx.exp(place.float32(at + "att.time_decay")),
        u=place.float32(at + "att.time_first"),
        att_key=place.linear(at + "att.key.weight"),
        att_value=place.linear(at + "att.value.weight"),
        att_receptance=place.linear(at + "att.receptance.weight"),
        att_output=place.linear(at + "att.output.weight"),
        ffn_mu=place.mixes(at + "ffn.", "kr"),
        ffn_key=place.linear(at + "ffn.key.weight"),
        ffn_receptance=place.linear(at + "ffn.receptance.weight"),
        ffn_value=place.linear(at + "ffn.value.weight"),
    )
