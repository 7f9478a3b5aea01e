"""The forward pass of RWKV-4 in torch: reference/forward.py, operation for operation, T tokens at once.

Symbols and trace points are the reference's. Differences: the two to four token shifts of a block are
one ``lerp``; the state is a tuple of small tensors per layer, replaced and never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.torch_eager.linear import Linear, make_linear
from reference.config import Config
from reference.forward import LN_EPS, PP_START
from reference.weights import Tensor as StoredTensor
from reference.weights import Weights

#: Called with a prefix, a trace point's name and its value ``(T, width)``.
Tap = Callable[[str, str, Tensor], None]


class LayerState(NamedTuple):
    """State of one layer: last inputs ``(1, C)`` as activations; ``aa, bb (2, C)`` and ``pp (1, C)`` float32."""

    att_x: Tensor
    ffn_x: Tensor
    sums: Tensor
    pp: Tensor


State = tuple[LayerState, ...]


@dataclass(frozen=True)
class Norm:
    """LayerNorm; torch takes its statistics in float32 for every input type."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, LN_EPS)


@dataclass(frozen=True)
class Layer:
    """Weights of one block. ``mu_*`` are stacked along a first axis; decay ``w`` and bonus ``u`` float32 ``(C,)``."""

    prefix: str
    ln1: Norm
    ln2: Norm
    att_mu: Tensor  # (3, 1, C): k, v, r
    w: Tensor
    u: Tensor
    att_key: Linear
    att_value: Linear
    att_receptance: Linear
    att_output: Linear
    ffn_mu: Tensor  # (2, 1, C): k, r
    ffn_key: Linear
    ffn_receptance: Linear
    ffn_value: Linear


class Model:
    """RWKV-4 with its weights on one device, all of one type."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self.config = weights.config
        self.dtype = dtype
        self.device = device
        place = Placing(weights, device)
        self.embedding = place.tensor("emb.weight")
        self.ln0 = place.norm("blocks.0.ln0")
        self.layers = [place.layer(f"blocks.{i}.") for i in range(self.config.n_layer)]
        self.ln_out = place.norm("ln_out")
        self.head = place.linear("head.weight")

    def initial_state(self) -> State:
        """State before the first token."""
        return initial_state(self.config, self.dtype, self.device)

    def hidden(self, ids: Tensor, state: State, tap: Tap) -> tuple[Tensor, State]:
        """Token ids ``(T,)`` -> what the head takes, ``(T, C)``, and the new state."""
        x = F.embedding(ids, self.embedding)
        tap("", "emb", x)
        x = self.ln0(x)
        tap("blocks.0.", "ln0", x)
        new = []
        for layer, past in zip(self.layers, state, strict=True):
            h = layer.ln1(x)
            tap(layer.prefix, "ln1", h)
            out, sums, pp = time_mix(h, layer, past, tap)
            x = x + out
            tap(layer.prefix, "att.residual", x)
            g = layer.ln2(x)
            tap(layer.prefix, "ln2", g)
            x = x + channel_mix(g, layer, past.ffn_x, tap)
            tap(layer.prefix, "ffn.residual", x)
            new.append(LayerState(last(h), last(g), sums, pp))
        x = self.ln_out(x)
        tap("", "ln_out", x)
        return x, tuple(new)


def initial_state(config: Config, dtype: torch.dtype, device: torch.device) -> State:
    """State before the first token."""
    x = torch.zeros(1, config.n_embd, dtype=dtype, device=device)
    sums = torch.zeros(2, config.n_embd, device=device)
    pp = torch.full((1, config.n_embd), PP_START, device=device)
    return tuple(LayerState(x, x, sums, pp) for _ in range(config.n_layer))


def time_mix(h: Tensor, layer: Layer, past: LayerState, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
    """``h (T, C)`` = ln1(x) -> output ``(T, C)``, new ``sums (2, C)``, new ``pp (1, C)``."""
    xk, xv, xr = torch.lerp(shift(h, past.att_x), h, layer.att_mu).unbind()
    tap(layer.prefix, "att.xk", xk)
    tap(layer.prefix, "att.xv", xv)
    tap(layer.prefix, "att.xr", xr)
    k = layer.att_key(xk)
    v = layer.att_value(xv)
    r = layer.att_receptance(xr).sigmoid_()
    tap(layer.prefix, "att.k", k)
    tap(layer.prefix, "att.v", v)
    tap(layer.prefix, "att.r", r)
    y, sums, pp = wkv(k.float(), v.float(), layer.w, layer.u, past.sums, past.pp)
    y = y.to(r.dtype)
    tap(layer.prefix, "att.wkv", y)
    y = r * y
    tap(layer.prefix, "att.rwkv", y)
    out = layer.att_output(y)
    tap(layer.prefix, "att.out", out)
    return out, sums, pp


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor, sums: Tensor, pp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over float32 ``k, v (T, C)`` -> ``(T, C)``, new sums and pp; see reference.forward.wkv.

    Everything but the two recurrences themselves is taken over all T tokens at once.
    """
    pps = _exponents(k, w, pp)  # (T + 1, C)
    before, after = pps[:-1], pps[1:]
    uk = k + u
    top = torch.maximum(before, uk)
    exponents = torch.stack([before - w - after, k - after, before - top, uk - top])
    decay, gain, old, new = exponents.exp_().unbind()  # each (T, C)

    all_sums = torch.cat([sums[None], torch.stack([gain * v, gain], dim=1)])  # (T + 1, 2, C)
    for (earlier, now), factor in zip(pairwise(all_sums.unbind()), decay.unbind(), strict=True):
        now.addcmul_(factor, earlier)

    aa, bb = all_sums[:-1].unbind(1)  # before token t
    y = torch.addcmul(new * v, old, aa) / torch.addcmul(new, old, bb)
    return y, all_sums[-1].clone(), last(pps)


def _exponents(k: Tensor, w: Tensor, pp: Tensor) -> Tensor:
    """``pp_t = max(pp_{t-1} - w, k_t)`` for all t, the first row being the ``pp`` given: ``(T + 1, C)``."""
    pps = torch.cat([pp, k])
    for earlier, now in pairwise(pps.unbind()):
        torch.maximum(earlier - w, now, out=now)
    return pps


def channel_mix(h: Tensor, layer: Layer, ffn_x: Tensor, tap: Tap) -> Tensor:
    """``h (T, C)`` = ln2(x) -> ``(T, C)``."""
    xk, xr = torch.lerp(shift(h, ffn_x), h, layer.ffn_mu).unbind()
    tap(layer.prefix, "ffn.xk", xk)
    tap(layer.prefix, "ffn.xr", xr)
    k = layer.ffn_key(xk)
    tap(layer.prefix, "ffn.k", k)
    k2 = k.relu_().square_()
    tap(layer.prefix, "ffn.k2", k2)
    v = layer.ffn_value(k2)
    tap(layer.prefix, "ffn.v", v)
    r = layer.ffn_receptance(xr).sigmoid_()
    tap(layer.prefix, "ffn.r", r)
    out = r * v
    tap(layer.prefix, "ffn.out", out)
    return out


def no_tap(prefix: str, name: str, value: Tensor) -> None:
    """A tap that looks at nothing."""


def shift(h: Tensor, past: Tensor) -> Tensor:
    """``h`` of the token before, ``(T, C)``; ``past (1, C)`` comes before the first."""
    return past if len(h) == 1 else torch.cat([past, h[:-1]])


def last(x: Tensor) -> Tensor:
    """The last row ``(1, C)``, on its own: a view would keep all of ``x`` alive in the state."""
    return x[-1:].clone()


class Placing:
    """Puts stored tensors on the device, one at a time."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights = weights
        self._device = device

    def tensor(self, name: str) -> Tensor:
        return _to_torch(self._weights[name]).to(self._device, copy=True)

    def float32(self, name: str) -> Tensor:
        return self.tensor(name).float()

    def linear(self, name: str) -> Linear:
        return make_linear(self.tensor(name))

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def mixes(self, at: str, names: str) -> Tensor:
        return torch.stack([self.tensor(f"{at}time_mix_{name}") for name in names]).unsqueeze(1)

    def layer(self, at: str) -> Layer:
        return Layer(
            prefix=at,
            ln1=self.norm(at + "ln1"),
            ln2=self.norm(at + "ln2"),
            att_mu=self.mixes(at + "att.", "kvr"),
            w=self.float32(at + "att.time_decay").exp(),
            u=self.float32(at + "att.time_first"),
            att_key=self.linear(at + "att.key.weight"),
            att_value=self.linear(at + "att.value.weight"),
            att_receptance=self.linear(at + "att.receptance.weight"),
            att_output=self.linear(at + "att.output.weight"),
            ffn_mu=self.mixes(at + "ffn.", "kr"),
            ffn_key=self.linear(at + "ffn.key.weight"),
            ffn_receptance=self.linear(at + "ffn.receptance.weight"),
            ffn_value=self.linear(at + "ffn.value.weight"),
        )


def _to_torch(stored: StoredTensor) -> Tensor:
    """A stored tensor in its own type; may share memory with what the checkpoint reads from."""
    raw = stored.read()
    if not raw.flags.writeable:  # torch warns of memory it could write to, such as a read-only map
        raw = raw.copy()
    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if stored.stored == "bf16" else tensor
