"""NaN and Inf that are in the weights before any backend computes with them."""

from __future__ import annotations

from harness.localize.finding import BAD_WEIGHTS, TRACE, Finding
from harness.non_finite import checkpoint_holds, first
from reference.config import Config
from reference.operations import steps
from reference.weights import Weights, find_non_finite

#: The trace point that each tensor of a block goes into.
_USED = {
    "time_mix_k": "xk",
    "time_mix_v": "xv",
    "time_mix_r": "xr",
    "time_decay": "wkv",
    "time_first": "wkv",
    "key.weight": "k",
    "value.weight": "v",
    "receptance.weight": "r",
    "output.weight": "out",
}


def bad_weights(weights: Weights, stored: Weights, scheme: str) -> Finding | None:
    """What is not finite in the checkpoint, or becomes so when ``scheme`` stores it; ``None`` if nothing is."""
    names = find_non_finite(weights)
    if names:
        return _finding(weights.config, names, checkpoint_holds(weights), "any backend would go wrong")
    names = find_non_finite(stored)
    if names:
        text = f"the checkpoint is finite, but not once it is stored as {scheme}: {first(names)}"
        return _finding(weights.config, names, text, "values beyond the format, or a group without a scale")
    return None


def _finding(config: Config, names: list[str], text: str, meaning: str) -> Finding:
    into = {_point(name) for name in names}
    begin = next(step for step in steps(config) if step.point in into)
    layer = 0 if begin.point == "blocks.0.ln0" else begin.layer
    return Finding(BAD_WEIGHTS, TRACE, layer, begin.point, cause=f"{text}; {meaning}")


def _point(name: str) -> str:
    """The trace point that a tensor goes into."""
    if name in ("emb.weight", "head.weight"):
        return "emb" if name == "emb.weight" else "logits"
    for ending, point in _USED.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + point
    return name.rpartition(".")[0]
