"""A small byte-level RWKV-4 in PyTorch, for training the embedded reference model.

Parameters live in one flat dictionary under the names of BlinkDL's checkpoints.
Activations are time-major, ``(time, batch, channel)``, so that one step of the
recurrence reads contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VOCAB = 256
N_LAYER = 9
N_EMBD = 128
N_FFN = 4 * N_EMBD
LN_EPS = 1e-5
MINUS_INFINITY = -1e30

Params = Mapping[str, Tensor]


@dataclass
class State:
    """The recurrent state of one layer, each field of shape ``(batch, channel)``."""

    att_x: Tensor
    ffn_x: Tensor
    num: Tensor
    den: Tensor
    top: Tensor

    @classmethod
    def zeros(cls, batch: int, channels: int = N_EMBD) -> State:
        """Return the state before the first token."""
        z = torch.zeros(batch, channels)
        return cls(z, z, z, z, torch.full_like(z, MINUS_INFINITY))

    def drop(self, keep: Tensor) -> State:
        """Return to the initial state the batch rows where ``keep`` is false."""
        first = State.zeros(*self.num.shape)
        pairs = zip(vars(self).values(), vars(first).values(), strict=True)
        return State(*(torch.where(keep[:, None], x, y) for x, y in pairs))


class Wkv(torch.autograd.Function):
    """The WKV recurrence of RWKV-4 with a hand-written backward pass.

    With ``d = exp(time_decay)``, the scaled sums follow
    ``S[t] = exp(M[t-1] - d - M[t]) * S[t-1] + exp(k[t] - M[t]) * (v[t], 1)``, where
    ``M`` is any stabiliser: it cancels in the output and is a constant for the
    gradient. The choice ``M[t] = max(M[t-1] - d, k[t])`` is the cumulative maximum of
    ``k[t] + t * d`` less ``t * d``, so each step of each loop is one elementwise operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        decay: Tensor,
        first: Tensor,
        k: Tensor,
        v: Tensor,
        num: Tensor,
        den: Tensor,
        top: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output and the sums and stabiliser after the last step."""
        length = k.shape[0]
        ramp = torch.arange(1, length + 1, dtype=k.dtype)[:, None, None] * decay
        tops = torch.cat((top[None], k + ramp))
        rows = tops.unbind(0)
        for t in range(length):
            torch.maximum(rows[t], rows[t + 1], out=rows[t + 1])
        tops[1:] -= ramp
        before, after = tops[:-1], tops[1:]
        shrink = (before - decay - after).exp_()
        gain = (k - after).exp_()

        sums = torch.empty(length + 1, 2, *num.shape, dtype=k.dtype)
        sums[0, 0], sums[0, 1] = num, den
        torch.mul(gain, v, out=sums[1:, 0])
        sums[1:, 1] = gain
        rows, steps = sums.unbind(0), shrink.unbind(0)
        for t in range(length):
            torch.addcmul(rows[t + 1], rows[t], steps[t], out=rows[t + 1])

        now = k + first
        scale = torch.maximum(before, now)
        past, now = (before - scale).exp_(), (now - scale).exp_()
        bottom = past * sums[:-1, 1] + now
        out = (past * sums[:-1, 0] + now * v) / bottom
        ctx.save_for_backward(v, shrink, gain, sums, past, now, bottom, out)
        return out, rows[-1][0].clone(), rows[-1][1].clone(), tops[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; the final state is treated as a constant."""
        v, shrink, gain, sums, past, now, bottom, out = ctx.saved_tensors
        g_num = grads[0] / bottom
        g_den = -g_num * out

        # adj[t] is the gradient for sums[t + 1]; nothing after the last step uses it.
        adj = torch.empty_like(sums[1:])
        adj[-1] = 0
        torch.mul(past[1:], g_num[1:], out=adj[:-1, 0])
        torch.mul(past[1:], g_den[1:], out=adj[:-1, 1])
        rows, steps = adj.unbind(0), shrink.unbind(0)
        for t in range(len(rows) - 1, 0, -1):
            torch.addcmul(rows[t - 1], rows[t], steps[t], out=rows[t - 1])

        direct = now * (g_num * v + g_den)
        g_v = now * g_num + gain * adj[:, 0]
        g_k = direct + gain * (adj[:, 0] * v + adj[:, 1])
        g_decay = -(shrink * (adj * sums[:-1]).sum(1)).sum((0, 1))
        return g_decay, direct.sum((0, 1)), g_k, g_v, None, None, None


wkv: Callable[..., tuple[Tensor, ...]] = Wkv.apply


def init_params() -> dict[str, Tensor]:
    """Return fresh parameters by BlinkDL's initialisation of RWKV-4."""
    p: dict[str, Tensor] = {"emb.weight": torch.empty(VOCAB, N_EMBD).uniform_(-1e-4, 1e-4)}
    ramp = torch.arange(N_EMBD, dtype=torch.float32)
    zigzag = ((ramp + 1) % 3 - 1) * 0.5

    def layer_norm(name: str) -> None:
        p[f"{name}.weight"] = torch.ones(N_EMBD)
        p[f"{name}.bias"] = torch.zeros(N_EMBD)

    def orthogonal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        gain = scale * math.sqrt(max(1.0, rows / columns))
        return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain)

    layer_norm("blocks.0.ln0")
    for i in range(N_LAYER):
        depth = i / (N_LAYER - 1)
        rest = 1.0 - i / N_LAYER
        mix = ((ramp / N_EMBD) ** rest).view(1, 1, -1)
        half = ((ramp / N_EMBD) ** (0.5 * rest)).view(1, 1, -1)
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        layer_norm(f"blocks.{i}.ln1")
        layer_norm(f"blocks.{i}.ln2")
        p[f"{att}.time_decay"] = -5 + 8 * (ramp / (N_EMBD - 1)) ** (0.7 + 1.3 * depth)
        p[f"{att}.time_first"] = math.log(0.3) + zigzag
        p[f"{att}.time_mix_k"] = mix.clone()
        p[f"{att}.time_mix_v"] = mix + 0.3 * depth
        p[f"{att}.time_mix_r"] = half.clone()
        p[f"{att}.key.weight"] = torch.zeros(N_EMBD, N_EMBD)
        p[f"{att}.value.weight"] = orthogonal(N_EMBD, N_EMBD)
        p[f"{att}.receptance.weight"] = torch.zeros(N_EMBD, N_EMBD)
        p[f"{att}.output.weight"] = torch.zeros(N_EMBD, N_EMBD)
        p[f"{ffn}.time_mix_k"] = mix.clone()
        p[f"{ffn}.time_mix_r"] = mix.clone()
        p[f"{ffn}.key.weight"] = orthogonal(N_FFN, N_EMBD)
        p[f"{ffn}.receptance.weight"] = torch.zeros(N_EMBD, N_EMBD)
        p[f"{ffn}.value.weight"] = torch.zeros(N_EMBD, N_FFN)
    layer_norm("ln_out")
    p["head.weight"] = orthogonal(VOCAB, N_EMBD, 0.5)
    return p


def forward(p: Params, tokens: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
    """Run ``tokens`` of shape ``(time, batch)`` and return the logits and new states."""
    after = []
    x = _norm(p, "blocks.0.ln0", functional.embedding(tokens, p["emb.weight"]))
    for i, state in enumerate(states):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        here = _norm(p, f"blocks.{i}.ln1", x)
        past = torch.cat((state.att_x[None], here[:-1]))
        k = _mixed(p, att, "k", "key", past, here)
        v = _mixed(p, att, "v", "value", past, here)
        r = torch.sigmoid(_mixed(p, att, "r", "receptance", past, here))
        decay = p[f"{att}.time_decay"].exp()
        first = p[f"{att}.time_first"]
        out, *sums = wkv(decay, first, k.float(), v.float(), state.num, state.den, state.top)
        x = x + functional.linear(r * out, p[f"{att}.output.weight"])

        att_x = here[-1].detach()
        here = _norm(p, f"blocks.{i}.ln2", x)
        past = torch.cat((state.ffn_x[None], here[:-1]))
        k = _mixed(p, ffn, "k", "key", past, here)
        r = torch.sigmoid(_mixed(p, ffn, "r", "receptance", past, here))
        k = functional.relu(k).square()
        x = x + r * functional.linear(k, p[f"{ffn}.value.weight"])
        after.append(State(att_x, here[-1].detach(), *(s.detach() for s in sums)))
    return functional.linear(_norm(p, "ln_out", x), p["head.weight"]), after


def _norm(p: Params, name: str, x: Tensor) -> Tensor:
    """Apply the named LayerNorm."""
    shape = (x.shape[-1],)
    return functional.layer_norm(x, shape, p[f"{name}.weight"], p[f"{name}.bias"], LN_EPS)


def _mixed(p: Params, part: str, mix: str, matrix: str, past: Tensor, here: Tensor) -> Tensor:
    """Mix each token with the one before it and apply the named matrix."""
    x = torch.lerp(past, here, p[f"{part}.time_mix_{mix}"])
    return functional.linear(x, p[f"{part}.{matrix}.weight"])
