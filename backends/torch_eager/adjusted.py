"""The forward pass with some results in float32 and a residual stream that is halved on its way.

:mod:`backends.torch_eager.model` operation for operation, slower and freer: a fix that is tried. What is computed is
:class:`reference.mixed.Mixed`: a result is rounded to the scheme's type or kept in float32; whatever reads or makes
a float32 result computes in float32; a matrix product there has a float32 copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.api import Unsupported
from backends.torch_eager.linear import Linear, make_linear
from backends.torch_eager.model import LayerState, Placing, State, Tap, initial_state, last, shift, wkv
from reference.forward import LN_EPS
from reference.operations import steps
from reference.weights import Weights

#: Matrix product -> the trace point it reads and the weight it reads, both within the block.
_PRODUCTS = {
    "att.k": ("att.xk", "att.key.weight"),
    "att.v": ("att.xv", "att.value.weight"),
    "att.r": ("att.xr", "att.receptance.weight"),
    "att.out": ("att.rwkv", "att.output.weight"),
    "ffn.k": ("ffn.xk", "ffn.key.weight"),
    "ffn.v": ("ffn.k2", "ffn.value.weight"),
    "ffn.r": ("ffn.xr", "ffn.receptance.weight"),
}

#: Products whose result is added to the stream, so that their weights are divided where that is.
_ADDED = ("att.out", "ffn.v")


class AdjustedModel:
    """RWKV-4 with the interface of :class:`backends.torch_eager.model.Model`."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device, change: Mapping[str, Any]) -> None:
        patterns, self._rescale_every = _checked(change)
        self.config = weights.config
        self.device = device
        self._narrow = dtype
        points = [step.point for step in steps(self.config)]
        self._types = {
            point: torch.float32 if any(fnmatchcase(point, pattern) for pattern in patterns) else dtype
            for point in points
        }
        unused = [p for p in patterns if not any(fnmatchcase(point, p) for point in points)]
        if unused:
            raise Unsupported(f"no trace point of this model matches {unused[0]!r}; see DESIGN's list of them")
        norms = [self._types[point] for point in points if point.endswith((".ln1", ".ln2"))]
        self.dtype = torch.float32 if torch.float32 in norms else dtype  # of the state's last inputs
        place = Placing(weights, device)
        self._vectors = {name: place.tensor(name) for name in weights if len(weights[name].shape) == 1}
        self._emb = place.tensor("emb.weight")
        self._products = {
            f"blocks.{i}.{name}": self._product(place, i, name)
            for i in range(self.config.n_layer)
            for name in _PRODUCTS
        }
        self.head = self._typed(place.tensor("head.weight"), "ln_out", "logits")

    def initial_state(self) -> State:
        """State before the first token."""
        return initial_state(self.config, self.dtype, self.device)

    def hidden(self, ids: Tensor, state: State, tap: Tap) -> tuple[Tensor, State]:
        """Token ids ``(T,)`` -> what the head takes, ``(T, C)``, and the new state."""
        x = F.embedding(ids, self._emb).to(self._types["emb"])
        tap("", "emb", x)
        x = self._norm("blocks.0.ln0", x, 1.0)
        tap("", "blocks.0.ln0", x)
        new, unit = [], 1.0
        for i, past in enumerate(state):
            at, before, unit = f"blocks.{i}.", unit, self._unit(i)
            x = x * (before / unit)
            h = self._norm(at + "ln1", x, unit)
            tap(at, "ln1", h)
            out, sums, pp = self._time_mix(h, at, past, unit, tap)
            x = self._made(at + "att.residual", torch.add, x, out)
            tap(at, "att.residual", _unscaled(x, unit))
            g = self._norm(at + "ln2", x, unit)
            tap(at, "ln2", g)
            x = self._made(at + "ffn.residual", torch.add, x, self._channel_mix(g, at, past.ffn_x, unit, tap))
            tap(at, "ffn.residual", _unscaled(x, unit))
            new.append(LayerState(last(h), last(g), sums, pp))
        x = self._norm("ln_out", x, unit)
        tap("", "ln_out", x)
        return x, tuple(new)

    def _time_mix(self, h: Tensor, at: str, past: LayerState, unit: float, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
        xk, xv, xr = (self._mixed(at, f"att.x{name}", h, past.att_x, tap) for name in "kvr")
        k, v = (self._products[at + "att." + name](x) for name, x in (("k", xk), ("v", xv)))
        r = self._made(at + "att.r", torch.sigmoid, self._products[at + "att.r"](xr))
        for name, x in (("k", k), ("v", v), ("r", r)):
            tap(at, f"att.{name}", x)
        w, u = (self._vectors[f"{at}att.{name}"].float() for name in ("time_decay", "time_first"))
        y, sums, pp = wkv(k.float(), v.float(), w.exp(), u, past.sums, past.pp)
        y = y.to(self._types[at + "att.wkv"])
        tap(at, "att.wkv", y)
        y = self._made(at + "att.rwkv", torch.mul, r, y)
        tap(at, "att.rwkv", y)
        out = self._products[at + "att.out"](y)
        tap(at, "att.out", _unscaled(out, unit))
        return out, sums, pp

    def _channel_mix(self, h: Tensor, at: str, ffn_x: Tensor, unit: float, tap: Tap) -> Tensor:
        xk, xr = (self._mixed(at, f"ffn.x{name}", h, ffn_x, tap) for name in "kr")
        k = self._products[at + "ffn.k"](xk)
        tap(at, "ffn.k", k)
        k2 = self._made(at + "ffn.k2", lambda x: x.relu().square(), k)
        tap(at, "ffn.k2", k2)
        v = self._products[at + "ffn.v"](k2)
        tap(at, "ffn.v", _unscaled(v, unit))
        r = self._made(at + "ffn.r", torch.sigmoid, self._products[at + "ffn.r"](xr))
        tap(at, "ffn.r", r)
        out = self._made(at + "ffn.out", torch.mul, r, v)
        tap(at, "ffn.out", _unscaled(out, unit))
        return out

    def _made(self, point: str, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``compute(*inputs)`` in float32 where the result or an input is, as the point's type."""
        kept = self._types[point]
        wide = kept == torch.float32 or any(x.dtype == torch.float32 for x in inputs)
        return compute(*((x.float() for x in inputs) if wide else inputs)).to(kept)

    def _norm(self, name: str, x: Tensor, unit: float) -> Tensor:
        """LayerNorm of a stream divided by ``unit``, to which eps is small accordingly."""
        eps = LN_EPS / unit**2
        weight, bias = self._vectors[f"{name}.weight"], self._vectors[f"{name}.bias"]
        return self._made(name, lambda x, w, b: F.layer_norm(x, w.shape, w, b, eps), x, weight, bias)

    def _mixed(self, at: str, name: str, h: Tensor, past: Tensor, tap: Tap) -> Tensor:
        """Token shift: ``att.xk`` with ``att.time_mix_k``."""
        mu = self._vectors[at + name.replace(".x", ".time_mix_")]
        x = self._made(at + name, torch.lerp, shift(h, past.to(h.dtype)), h, mu.expand_as(h))
        tap(at, name, x)
        return x

    def _product(self, place: Placing, layer: int, name: str) -> Linear:
        at, (source, matrix) = f"blocks.{layer}.", _PRODUCTS[name]
        weight = place.tensor(at + matrix)
        if name in _ADDED:
            weight = weight / self._unit(layer)  # a power of two: exact but for subnormal weights
        return self._typed(weight, at + source, at + name)

    def _typed(self, weight: Tensor, source: str, point: str) -> Linear:
        """The product that reads one trace point and makes another, each of its type."""
        kept = self._types[point]
        if torch.float32 not in (kept, self._types[source]):
            return make_linear(weight)
        wide = make_linear(weight.float())
        return lambda x: wide(x.float()).to(kept)

    def _unit(self, layer: int) -> float:
        return float(2 ** (layer // self._rescale_every)) if self._rescale_every else 1.0


def _checked(change: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    unknown = sorted(set(change) - {"fp32", "rescale_every"})
    if unknown:
        raise Unsupported(f"torch cannot change {', '.join(unknown)}; it can change fp32 and rescale_every")
    return tuple(str(pattern) for pattern in change.get("fp32", ())), int(change.get("rescale_every", 0))


def _unscaled(x: Tensor, unit: float) -> Tensor:
    return x if unit == 1 else x.float() * unit
