"""What a library's trace entries return, in execution order, and in which units."""

from __future__ import annotations

_TIME_MIX = ("ln1", *(f"att.{point}" for point in ["xk", "xv", "xr", "k", "v", "r", "wkv", "rwkv", "out", "residual"]))
_CHANNEL_MIX = ("ln2", *(f"ffn.{point}" for point in ["xk", "xr", "k", "k2", "v", "r", "out", "residual"]))

#: Points of a layer that are written in units of the residual stream, which ``rescale_every`` halves.
OF_THE_STREAM = ("att.out", "att.residual", "ffn.v", "ffn.out", "ffn.residual")


def trace_points(n_layer: int) -> list[str]:
    """Names of all trace points of a model, in execution order."""
    layers = [f"blocks.{i}.{point}" for i in range(n_layer) for point in (*_TIME_MIX, *_CHANNEL_MIX)]
    return ["emb", "blocks.0.ln0", *layers, "ln_out", "logits"]


def unit(name: str, rescale_every: int) -> float:
    """What a point of a library with ``rescale_every`` is multiplied with to be in the model's own units.

    ``ffn.residual`` is what the next layer reads, halved already.
    """
    if not rescale_every or not name.endswith(OF_THE_STREAM):
        return 1.0
    layer = int(name.split(".")[1])
    return 2.0 ** ((layer + name.endswith("ffn.residual")) // rescale_every)
