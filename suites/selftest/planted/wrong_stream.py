"""Faults of the residual stream, of tensors, and of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.forward import layer_norm
from reference.operations import BLOCK, Here
from suites.selftest.planted.fault import Fault, Patch, Planted, Site, Wrong, changed, operation, rounded, tensor


def _from_block_input(point: str) -> Callable[[Site], Planted]:
    """``point`` reads the block's input where it should read the stream after the attention."""

    def plant(site: Site) -> Planted:
        replaced: dict[str, Any] = {}
        for layer in site.layers:
            kept: dict[str, np.ndarray] = {}

            def ln1(h: Here, kept: dict[str, np.ndarray] = kept) -> np.ndarray:
                kept["x"] = h.read("x")
                return layer_norm(h.read("x"), h.weights, h.at + "ln1", h.op)

            def wrong(h: Here, kept: dict[str, np.ndarray] = kept) -> np.ndarray:
                if point == "ln2":
                    return layer_norm(kept["x"], h.weights, h.at + "ln2", h.op)
                return np.asarray(h.op.at(h.at + point).residual(kept["x"] + h.read("ffn.out")))

            replaced |= {f"blocks.{layer}.ln1": ln1, f"blocks.{layer}.{point}": wrong}
        return Planted(Patch(replaced=replaced), site.names(point)[0])

    return plant


def _added(point: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Wrong:
    a, b = BLOCK[point].inputs
    return lambda h: h.op.at(h.at + point).residual(change(h.read(a), h.read(b)))


def _same_layer_twice(site: Site) -> Planted:
    """A layer has the weights of the one before."""
    layer = max(1, site.layers[0])
    here, before = f"blocks.{layer}.", f"blocks.{layer - 1}."

    def change(name: str, a: np.ndarray) -> np.ndarray:
        return site.weights[before + name[len(here) :]].array(np.float32) if name.startswith(here) else a

    return Planted(Patch(weights=changed(site.weights, change)), here + "ln1")


def _key_of_another_layer(site: Site) -> Planted:
    layer = max(1, site.layers[0])
    name = f"blocks.{layer}.att.key.weight"
    other = site.weights[f"blocks.{layer - 1}.att.key.weight"].array(np.float32)
    return Planted(
        Patch(weights=changed(site.weights, lambda n, a: other if n == name else a)), f"blocks.{layer}.att.k"
    )


def _flipped_bit(a: np.ndarray) -> np.ndarray:
    """Bit 27, of the exponent, of one weight."""
    a = np.ascontiguousarray(a, dtype=np.float32)
    a.view(np.uint32).reshape(-1)[a.size // 2] ^= np.uint32(1 << 27)
    return a


def _last_row(a: np.ndarray) -> np.ndarray:
    a[-1] = 0
    return a


def _row_copied(a: np.ndarray) -> np.ndarray:
    a[1] = a[0]
    return a


def _tied(site: Site) -> Planted:
    emb = site.weights["emb.weight"].array(np.float32)
    return Planted(Patch(weights=changed(site.weights, lambda n, a: emb if n == "head.weight" else a)), "logits")


def _head(change: Callable[[np.ndarray], np.ndarray]) -> Wrong:
    def wrong(h: Here) -> np.ndarray:
        logits = h.op.at("logits").linear(h.read("ln_out"), h.weights["head.weight"])
        return np.asarray(change(logits.copy()))

    return wrong


def _cancelling(y: np.ndarray) -> np.ndarray:
    """Up by a tenth for one token, down by it for the next: sums and means stay as they are."""
    even = y.shape[-1] // 2 * 2
    y[:, 0:even:2] += 0.1
    y[:, 1:even:2] -= 0.1
    return y


def _set(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(y: np.ndarray) -> np.ndarray:
        y[:, index] = value
        return y

    return change


def _padding(y: np.ndarray) -> np.ndarray:
    y[:, -4:] = 0
    return y


def _one_off(y: np.ndarray) -> np.ndarray:
    return np.roll(y, 1, axis=-1)


def _log_probabilities(y: np.ndarray) -> np.ndarray:
    return np.asarray(
        y
        - np.log(np.exp(y - y.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))
        - y.max(axis=-1, keepdims=True)
    )


FAULTS = (
    Fault(
        "ffn.residual from the block's input",
        "The attention's contribution is lost.",
        _from_block_input("ffn.residual"),
    ),
    Fault("ln2 of the block's input", "Both halves of a block run in parallel.", _from_block_input("ln2")),
    operation(
        "att.residual without x",
        "att.residual",
        _added("att.residual", lambda x, y: y),
        "The residual connection is missing.",
    ),
    operation(
        "ffn.residual added twice",
        "ffn.residual",
        _added("ffn.residual", lambda x, y: x + 2 * y),
        "An accumulating product adds to what it added already.",
    ),
    operation(
        "ffn.residual in fp16",
        "ffn.residual",
        _added("ffn.residual", lambda x, y: rounded(x + y, np.float16)),
        "The stream is kept in half precision.",
    ),
    operation(
        "stream halved, weights not",
        "ffn.residual",
        _added("ffn.residual", lambda x, y: (x + y) / 2),
        "rescale_every halves x, but nobody divided the weights.",
    ),
    tensor(
        "weights halved, stream not",
        "att.out",
        "att.output.weight",
        lambda a: a / 2,
        "The weights are divided for rescale_every, x is not halved.",
    ),
    Fault("a layer computed twice", "A layer has the weights of the one before.", _same_layer_twice, first_layer=1),
    Fault("key of another layer", "One matrix is that of the layer before.", _key_of_another_layer, first_layer=1),
    tensor(
        "one bit flipped", "ffn.v", "ffn.value.weight", _flipped_bit, "One weight has a bit of its exponent flipped."
    ),
    tensor("last row lost", "att.out", "att.output.weight", _last_row, "The last row of a matrix is zero."),
    tensor("a row copied", "ffn.r", "ffn.receptance.weight", _row_copied, "Row 1 of a matrix is row 0."),
    operation(
        "head with cancelling errors",
        "logits",
        _head(_cancelling),
        "Every second logit is a tenth too large, the others too small.",
    ),
    operation("vocabulary padding in the logits", "logits", _head(_padding), "The last logits are those of padding."),
    operation("logits one token late", "logits", _head(_one_off), "Every logit is that of the id before."),
    operation("log probabilities for logits", "logits", _head(_log_probabilities), "The result is normalised already."),
    operation(
        "logits in fp16 steps of 1/16",
        "logits",
        _head(lambda y: np.round(y * 16) / 16),
        "Logits are rounded to sixteenths.",
    ),
    operation("NaN for one id", "logits", _head(_set(3, np.nan)), "The logit of an id that text never has is NaN."),
    operation("minus infinity for one id", "logits", _head(_set(0, -np.inf)), "The logit of id 0 is masked."),
    Fault("head is the embedding", "The head is tied to the embedding, as in other models.", _tied, layered=False),
)
