"""The forward pass over sequences side by side: every matrix is read once for all of them.

Products, norms and gates see ``B * T`` rows; token shift stays within a sequence; WKV works channel by channel, so B
sequences of C channels are one of B * C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.torch_eager.linear import Linear
from backends.torch_eager.model import Layer, LayerState, Model, State, wkv


def initial_states(model: Model, size: int) -> State:
    """Before the first token: ``att_x, ffn_x (B, C)``, ``sums (2, B * C)``, ``pp (1, B * C)``."""
    return tuple(
        LayerState(
            one.att_x.repeat(size, 1), one.ffn_x.repeat(size, 1), one.sums.repeat(1, size), one.pp.repeat(1, size)
        )
        for one in model.initial_state()
    )


def hidden_batch(model: Model, ids: Tensor, states: State) -> tuple[Tensor, State]:
    """Token ids ``(B, T)`` -> what the head takes after the last token, ``(B, C)``, and the new states."""
    x = model.ln0(F.embedding(ids, model.embedding))  # (B, T, C)
    new = []
    for layer, past in zip(model.layers, states):
        h = layer.ln1(x)
        out, sums, pp = _time_mix(h, layer, past)
        x = x + out
        g = layer.ln2(x)
        x = x + _channel_mix(g, layer, past.ffn_x)
        new.append(LayerState(h[:, -1].clone(), g[:, -1].clone(), sums, pp))
    return model.ln_out(x[:, -1]), tuple(new)


def _time_mix(h: Tensor, layer: Layer, past: LayerState) -> tuple[Tensor, Tensor, Tensor]:
    size = len(h)
    xk, xv, xr = torch.lerp(_shift(h, past.att_x), h, layer.att_mu.unsqueeze(1)).unbind()
    k, v = _channels(_product(layer.att_key, xk)), _channels(_product(layer.att_value, xv))
    r = _product(layer.att_receptance, xr).sigmoid_()
    y, sums, pp = wkv(k.float(), v.float(), layer.w.repeat(size), layer.u.repeat(size), past.sums, past.pp)
    y = y.view(h.shape[1], size, -1).transpose(0, 1).to(r.dtype)
    return _product(layer.att_output, r * y), sums, pp


def _channel_mix(h: Tensor, layer: Layer, ffn_x: Tensor) -> Tensor:
    xk, xr = torch.lerp(_shift(h, ffn_x), h, layer.ffn_mu.unsqueeze(1)).unbind()
    k2 = _product(layer.ffn_key, xk).relu_().square_()
    return _product(layer.ffn_receptance, xr).sigmoid_() * _product(layer.ffn_value, k2)


def _product(linear: Linear, x: Tensor) -> Tensor:
    """``x (B, T, K)`` by one matrix."""
    return linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _channels(x: Tensor) -> Tensor:
    """``(B, T, C)`` -> ``(T, B * C)``."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def _shift(h: Tensor, past: Tensor) -> Tensor:
    """``h (B, T, C)`` of the token before; ``past (B, C)`` comes before the first."""
    return torch.cat([past.unsqueeze(1), h[:, :-1]], dim=1)
