"""Hypotheses about the embedding, the head, and weights that are those of another place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from harness.localize.hypotheses import Hypothesis, at
from harness.localize.hypotheses_products import PRODUCTS
from harness.localize.part import ENDS, Unknown
from reference.numerics import ROUND
from reference.operations import BLOCK, Here, recurrence
from reference.weights import Tensor


def other_layers() -> list[Hypothesis]:
    """Every operation with weights, given those of the layer before or after."""
    found = []
    weighted = [name for name in BLOCK if name in PRODUCTS or name.startswith(("ln", "att.x", "ffn.x", "att.wkv"))]
    for by, side in ((-1, "before"), (1, "after")):
        for name in weighted:
            sentence = f"the weights of the layer {side} are used"
            found.append(at(name, f"layer {side}", sentence, _in_layer(name, by)))
        together = {name: _in_layer(name, by) for name in weighted}
        found.append(Hypothesis(f"layer {side}", f"all weights are those of the layer {side}", together))
    return found


def _in_layer(name: str, by: int) -> Callable[[Here], np.ndarray]:
    usual = recurrence if name == "att.wkv" else BLOCK[name].compute

    def compute(h: Here) -> np.ndarray:
        found = re.fullmatch(r"blocks\.(\d+)\.", h.at)
        other = f"blocks.{int(found[1]) + by}." if found else ""
        if other + "ln1.weight" not in h.weights:
            raise Unknown(other)
        return usual(h._replace(at=other))  # type: ignore[return-value]

    return compute


def _rows(ids: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Here], np.ndarray]:
    def compute(h: Here) -> np.ndarray:
        table = h.weights["emb.weight"]
        n = table.shape[0]
        return h.op.at("emb").residual(table.rows(np.clip(ids(h.past, n), 0, n - 1), h.op.dtype))

    return compute


def _low_bits(n: int) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda ids, _: ids & ((1 << n) - 1)


_IDS: tuple[tuple[str, str, Callable[[np.ndarray, int], np.ndarray]], ...] = (
    ("id + 1", "the embedding's row of id + 1 is taken", lambda ids, n: ids + 1),
    ("id - 1", "the embedding's row of id - 1 is taken", lambda ids, n: ids - 1),
    ("token before", "the row of the token before is taken", lambda ids, n: np.concatenate([ids[:1], ids[:-1]])),
    ("token after", "the row of the next token is taken", lambda ids, n: np.concatenate([ids[1:], ids[-1:]])),
    ("first token", "the row of the prompt's first token is taken for all", lambda ids, n: np.full_like(ids, ids[0])),
    ("last token", "the row of the prompt's last token is taken for all", lambda ids, n: np.full_like(ids, ids[-1])),
    ("row 0", "row 0 is taken for every token", lambda ids, n: ids * 0),
    ("from the end", "rows are counted from the end", lambda ids, n: n - 1 - ids),
    *((f"{b} bits", f"only the low {b} bits of an id are used", _low_bits(b)) for b in range(7, 17)),
    ("16 bits, signed", "ids are kept in 16 bits with a sign", lambda ids, n: np.clip(ids.astype(np.int16), 0, None)),
    ("tokens reversed", "the prompt is reversed", lambda ids, n: ids[::-1]),
    ("half ids", "ids are halved (wrong stride)", lambda ids, n: ids // 2),
)


def ends() -> list[Hypothesis]:
    """Of the embedding and the head."""

    def other(name: str) -> Callable[[Here], np.ndarray]:
        return lambda h: h.read(name)

    def scaled(h: Here) -> np.ndarray:
        return np.asarray(ENDS["emb"].compute(h) * h.op.dtype.type(h.weights.config.n_embd**0.5))

    def logs(h: Here) -> np.ndarray:
        y = ENDS["logits"].compute(h)
        y = y - y.max(axis=-1, keepdims=True)
        return np.asarray(y - np.log(np.exp(y).sum(axis=-1, keepdims=True)))

    return [
        *(at("emb", name, sentence, _rows(ids)) for name, sentence, ids in _IDS),
        at("emb", "times sqrt(C)", "the embedding is multiplied by the square root of its width", scaled),
        at("logits", "probabilities", "softmax is applied to the logits", lambda h: np.exp(logs(h))),
        at("logits", "log probabilities", "log-softmax is applied to the logits", logs),
    ]


#: Operation -> vectors that it reads.
_VECTORS = {
    **{name: (f"{name}.weight", f"{name}.bias") for name in ("blocks.0.ln0", "ln1", "ln2", "ln_out")},
    **{f"{half}.x{c}": (f"{half}.time_mix_{c}",) for half, letters in (("att", "kvr"), ("ffn", "kr")) for c in letters},
    "att.wkv": ("att.time_decay", "att.time_first"),
}

_CHANGED: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("by one", "is off by one channel", lambda x: np.roll(x, 1)),
    ("by one back", "is off by one channel, backwards", lambda x: np.roll(x, -1)),
    ("reversed", "is in reverse order", lambda x: x[::-1]),
    ("halves", "has its halves exchanged", lambda x: np.roll(x, x.size // 2)),
    ("pairs", "has neighbours exchanged", lambda x: x[np.arange(x.size) ^ 1] if x.size % 2 == 0 else x),
    ("one value", "is its first value for all channels", lambda x: np.full_like(x, x[0])),
    ("bf16", "is rounded to bf16", ROUND["bf16"]),
    ("fp16", "is rounded to fp16", ROUND["fp16"]),
    ("1 % large", "is 1 % too large", lambda x: x * np.float32(1.01)),
    ("1 % small", "is 1 % too small", lambda x: x * np.float32(0.99)),
)


def vectors() -> list[Hypothesis]:
    """Every vector rearranged or rounded."""
    return [
        at(point, f"{name} {what}", f"{name} {sentence}", _with(point, name, change))
        for point, names in _VECTORS.items()
        for name in names
        for what, sentence, change in _CHANGED
    ]


def _with(point: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Here], np.ndarray]:
    usual = recurrence if point == "att.wkv" else {**BLOCK, **ENDS}[point].compute

    def compute(h: Here) -> np.ndarray:
        right = h.weights[h.at + name].array(np.float32)
        made = np.ascontiguousarray(change(right), dtype=np.float32)
        if np.array_equal(made, right):
            raise Unknown(f"{name}, which this does not change")
        weights = replace(h.weights, tensors={**h.weights.tensors, h.at + name: Tensor.of(made)})
        return usual(h._replace(weights=weights))  # type: ignore[return-value]

    return compute
