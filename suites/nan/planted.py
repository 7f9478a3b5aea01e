"""Checkpoints that overflow fp16 at one chosen operation of one chosen layer, and nowhere before it.

Made from any model by multiplying some of its tensors, so that in exact arithmetic the operation's largest value is
beyond 65504 and that of every operation before it is not. Where there is an inverse, a later matrix takes the factor
back, so that what follows is no larger than it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.localize.magnitudes import measure
from reference.forward import forward
from reference.operations import steps
from reference.weights import Tensor, Weights

#: Where values are driven: beyond fp16's 65504, but not so far that a vector of the checkpoint is itself.
TARGET = 1.0e5

#: How far the stream is driven before the operation that takes it beyond, and there.
BELOW, BEYOND = 6.0e4, 6.9e4


@dataclass(frozen=True)
class Lever:
    """How an operation is driven: ``grow`` is multiplied by the factor, ``shrink`` by its power ``-back``.

    ``degree``: of the operation's value in the factor.
    """

    grow: tuple[str, ...]
    shrink: tuple[str, ...] = ()
    degree: int = 1
    back: int = 1


#: Operation within a block -> its lever.
LEVERS: dict[str, Lever] = {
    "ln1": Lever(("ln1.weight", "ln1.bias"), ("att.key.weight", "att.value.weight", "att.receptance.weight")),
    "att.xk": Lever(("att.time_mix_k",), ("att.key.weight",)),
    "att.k": Lever(("att.key.weight",)),
    "att.v": Lever(("att.value.weight",), ("att.output.weight",)),
    "att.out": Lever(("att.output.weight",)),
    "ln2": Lever(("ln2.weight", "ln2.bias"), ("ffn.key.weight", "ffn.receptance.weight")),
    "ffn.k": Lever(("ffn.key.weight",), ("ffn.value.weight",)),
    "ffn.k2": Lever(("ffn.key.weight",), ("ffn.value.weight",), degree=2, back=2),
    "ffn.v": Lever(("ffn.value.weight",)),
}

#: Operations outside the blocks.
ENDS: dict[str, Lever] = {
    "ln_out": Lever(("ln_out.weight", "ln_out.bias"), ("head.weight",)),
    "logits": Lever(("head.weight",)),
}

#: Additions to the stream, by the product whose rows are driven.
STREAM = {"att.residual": ("att.out", "att.output.weight"), "ffn.residual": ("ffn.v", "ffn.value.weight")}

#: What overflows only where WKV's sums are fp16 themselves.
SUMS = "att.wkv"

#: Every operation that can be planted in a block.
IN_BLOCK = (*LEVERS, *STREAM, SUMS)


def scaled(weights: Weights, factors: dict[str, float | np.ndarray]) -> Weights:
    """The model with some tensors multiplied, in float32; an array multiplies rows."""

    def change(name: str, tensor: Tensor) -> Tensor:
        return Tensor.of(tensor.array() * np.float32(factors[name])) if name in factors else tensor

    return weights.map(change)


def plant(weights: Weights, tokens: Sequence[int], name: str, layer: int | None = None) -> tuple[Weights, str]:
    """The planted model, and the trace point that overflows in fp16 on ``tokens``; ``layer`` of what is in a block."""
    if layer is None:
        return _driven(weights, tokens, name, ENDS[name], ""), name
    at = f"blocks.{layer}."
    if name in STREAM:
        return _stream(weights, tokens, name, at), at + name
    if name == SUMS:
        return _sums(weights, tokens, at), at + name
    return _driven(weights, tokens, name, LEVERS[name], at), at + name


def _driven(weights: Weights, tokens: Sequence[int], name: str, lever: Lever, at: str) -> Weights:
    value = measure(weights, tokens)[at + name].value
    factor = (TARGET / value) ** (1 / lever.degree)
    factors: dict[str, float | np.ndarray] = {at + grown: factor for grown in lever.grow}
    factors |= {at + shrunk: factor**-lever.back for shrunk in lever.shrink}
    return scaled(weights, factors)


def _stream(weights: Weights, tokens: Sequence[int], name: str, at: str) -> Weights:
    """The whole stream just below the limit, and one channel of what is added to it here such that the sum is beyond.

    That channel is one where stream and addend have a sign in common, so that neither is beyond by itself.
    """
    product, matrix = STREAM[name]
    source = _before(weights, at + name)
    seen: dict[str, np.ndarray] = {}
    forward(weights, tokens, tap=lambda point, x: seen.__setitem__(point, x))
    order = list(seen)
    early = [
        point for point in order[: order.index(at + name)] if point.endswith((".ln0", "residual", ".out", "ffn.v"))
    ]
    factor = BELOW / max(float(np.abs(seen[point]).max()) for point in early)
    x, gate = seen[source] * factor, seen[at + "ffn.r"] if name == "ffn.residual" else 1.0
    made = seen[at + product] * factor
    added = made * gate
    with np.errstate(divide="ignore", invalid="ignore"):
        row = np.where(x * added != 0, (BEYOND * np.sign(x) - x) / added, np.inf)  # (T, C): what takes x to BEYOND
        size = np.abs(row) * np.abs(made).max(axis=0)  # of the product then, over all tokens
    token, channel = np.unravel_index(int(np.argmin(size)), size.shape)
    if not size[token, channel] < BELOW:
        raise ValueError(f"no channel of {at}{name} can be driven beyond fp16 by its last addition")
    rows = np.ones((x.shape[1], 1))
    rows[channel] = row[token, channel]
    factors: dict[str, float | np.ndarray] = {"blocks.0.ln0.weight": factor, "blocks.0.ln0.bias": factor}
    for i in range(weights.config.n_layer):
        factors |= {f"blocks.{i}.att.output.weight": factor, f"blocks.{i}.ffn.value.weight": factor}
    factors[at + matrix] = factor * rows
    return scaled(weights, factors)


def _before(weights: Weights, point: str) -> str:
    """The stream that an addition reads."""
    return next(step.inputs[0] for step in steps(weights.config) if step.point == point)


def _sums(weights: Weights, tokens: Sequence[int], at: str) -> Weights:
    """Values just below the limit, remembered for ever and weighted alike: their sum is beyond it."""
    forgetful: dict[str, float | np.ndarray] = {at + "att.key.weight": 0.0}
    slow = Tensor.of(np.full(weights.config.n_embd, -9.0, np.float32))
    changed = scaled(weights, forgetful).map(lambda n, t: slow if n == at + "att.time_decay" else t)
    factor = BELOW / measure(changed, tokens)[at + "att.v"].value
    return scaled(changed, {at + "att.value.weight": factor, at + "att.output.weight": 1 / factor})
