"""One step of RWKV-4 as a torch module: ``(embedding (C,), 5 L state rows (C,))`` -> every trace point and state row.

The symbols and the trace points are those of reference/forward.py. All trace points are outputs of the
graph, in execution order: ncnn computes only what is extracted, so an output nobody asks for costs nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backends.ncnn_rwkv.names import output_names
from reference.forward import AA, ATT_X, BB, FFN_X, LN_EPS, PP
from reference.weights import Weights


class Step(torch.nn.Module):
    """The graph over float32 copies of ``weights``; ``time_decay`` and ``1 - mu`` are worked out here, once."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._config = weights.config
        for name, stored in weights.items():
            if name == "emb.weight":
                continue
            array = np.array(stored.array(), dtype=np.float32)
            self._keep(name, np.exp(array) if name.endswith("time_decay") else array)
            if ".time_mix_" in name:
                self._keep(name + ".rest", 1 - array)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Values of :func:`output_names`, in that order."""
        points: dict[str, Tensor] = {}
        x = self._norm(x, "blocks.0.ln0")
        points["blocks.0.ln0"] = x
        for i in range(self._config.n_layer):
            past = state[5 * i : 5 * i + 5]
            x = x + self._time_mix(x, f"blocks.{i}.", past, points)
            points[f"blocks.{i}.att.residual"] = x
            x = x + self._channel_mix(x, f"blocks.{i}.", past[FFN_X], points)
            points[f"blocks.{i}.ffn.residual"] = x
        points["ln_out"] = self._norm(x, "ln_out")
        points["logits"] = F.linear(points["ln_out"], self._weight("head.weight"))
        return tuple(points[name] for name in output_names(self._config))

    def _time_mix(self, x: Tensor, block: str, past: tuple[Tensor, ...], points: dict[str, Tensor]) -> Tensor:
        at = block + "att."
        h = self._norm(x, block + "ln1")
        points[block + "ln1"] = h
        for c in "kvr":
            points[f"{at}x{c}"] = self._mix(h, past[ATT_X], f"{at}time_mix_{c}")
        k = F.linear(points[at + "xk"], self._weight(at + "key.weight"))
        v = F.linear(points[at + "xv"], self._weight(at + "value.weight"))
        r = torch.sigmoid(F.linear(points[at + "xr"], self._weight(at + "receptance.weight")))
        w, u = self._weight(at + "time_decay"), self._weight(at + "time_first")
        aa, bb, pp = past[AA], past[BB], past[PP]

        uk = u + k
        top = torch.maximum(pp, uk)
        old, new = torch.exp(pp - top), torch.exp(uk - top)
        y = (old * aa + new * v) / (old * bb + new)
        faded = pp - w
        after = torch.maximum(faded, k)
        decay, gain = torch.exp(faded - after), torch.exp(k - after)
        points.update({at + "k": k, at + "v": v, at + "r": r, at + "wkv": y, at + "rwkv": r * y})
        points.update({at + "aa": decay * aa + gain * v, at + "bb": decay * bb + gain, at + "pp": after})

        out = F.linear(points[at + "rwkv"], self._weight(at + "output.weight"))
        points[at + "out"] = out
        return out

    def _channel_mix(self, x: Tensor, block: str, ffn_x: Tensor, points: dict[str, Tensor]) -> Tensor:
        at = block + "ffn."
        h = self._norm(x, block + "ln2")
        points[block + "ln2"] = h
        for c in "kr":
            points[f"{at}x{c}"] = self._mix(h, ffn_x, f"{at}time_mix_{c}")
        k = F.linear(points[at + "xk"], self._weight(at + "key.weight"))
        k2 = torch.square(torch.relu(k))
        v = F.linear(k2, self._weight(at + "value.weight"))
        r = torch.sigmoid(F.linear(points[at + "xr"], self._weight(at + "receptance.weight")))
        out = r * v
        points.update({at + "k": k, at + "k2": k2, at + "v": v, at + "r": r, at + "out": out})
        return out

    def _norm(self, x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, (self._config.n_embd,), self._weight(at + ".weight"), self._weight(at + ".bias"), LN_EPS)

    def _mix(self, h: Tensor, past: Tensor, mu: str) -> Tensor:
        return h * self._weight(mu) + past * self._weight(mu + ".rest")

    def _keep(self, name: str, array: np.ndarray) -> None:
        self.register_buffer(name.replace(".", "_"), torch.from_numpy(array))

    def _weight(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name.replace(".", "_"))
        return tensor
