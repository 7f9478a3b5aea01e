"""Faults of the embedding, LayerNorm and token shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.forward import ATT_X, FFN_X, LN_EPS, layer_norm, mix, vector
from reference.numerics import Op
from reference.operations import Here
from suites.selftest.planted.fault import (
    Fault,
    Patch,
    Planted,
    Site,
    Wrong,
    changed,
    operation,
    planted,
    rounded,
    tensor,
)


def _sliced(h: Here, name: str, source: str, how: Callable[[np.ndarray, Op], np.ndarray]) -> np.ndarray:
    """LayerNorm ``name`` of ``source`` with another way to centre and scale."""
    op = h.op.at(h.at + name)
    x = how(h.read(source), op)
    weight, bias = (vector(h.weights, f"{h.at}{name}.{part}", op) for part in ("weight", "bias"))
    return np.asarray(op.act(x * weight + bias))


def _norm(name: str, source: str, how: Callable[[np.ndarray, Op], np.ndarray]) -> Wrong:
    return lambda h: _sliced(h, name, source, how)


def _standard(eps: float = LN_EPS, ddof: int = 0, outside: bool = False) -> Callable[[np.ndarray, Op], np.ndarray]:
    def how(x: np.ndarray, op: Op) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(x).sum(axis=-1, keepdims=True) / op.dtype.type(x.shape[-1] - ddof)
        if outside:
            return np.asarray(x / (np.sqrt(variance) + op.dtype.type(eps)))
        return np.asarray(x / np.sqrt(variance + op.dtype.type(eps)))

    return how


def _rms(x: np.ndarray, op: Op) -> np.ndarray:
    return np.asarray(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + op.dtype.type(LN_EPS)))


def _in_half(x: np.ndarray, op: Op) -> np.ndarray:
    """Mean and variance summed up in half precision."""
    half = x.astype(np.float16)
    mean = np.add.reduce(half, axis=-1, dtype=np.float16, keepdims=True) / np.float16(x.shape[-1])
    centred = half - mean
    variance = np.add.reduce(np.square(centred), axis=-1, dtype=np.float16, keepdims=True) / np.float16(x.shape[-1])
    return np.asarray(centred / np.sqrt(variance + np.float16(LN_EPS))).astype(x.dtype)


def _padded(x: np.ndarray, op: Op) -> np.ndarray:
    """Statistics over a width that was rounded up by 8."""
    n = op.dtype.type(x.shape[-1] + 8)
    mean = x.sum(axis=-1, keepdims=True) / n
    variance = np.square(x - mean).sum(axis=-1, keepdims=True) / n
    return np.asarray((x - mean) / np.sqrt(variance + op.dtype.type(LN_EPS)))


def _skipped(source: str) -> Wrong:
    return lambda h: np.array(h.read(source))


def _other_vectors(name: str, other: str, source: str) -> Callable[[Site], Wrong]:
    return lambda site: lambda h: layer_norm(h.read(source), h.weights, h.at + other, h.op)


def _part(which: str, value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.full_like(a, value)


def _ln0_twice(h: Here) -> np.ndarray:
    once = layer_norm(h.read("emb"), h.weights, "blocks.0.ln0", h.op)
    return h.op.at("blocks.0.ln0").residual(layer_norm(once, h.weights, "blocks.0.ln0", h.op))


# Token shift


def _row(name: str) -> int:
    return ATT_X if name.startswith("att") else FFN_X


def _shift(
    name: str,
    before: Callable[[Here, str, int], np.ndarray] | None = None,
    mu: Callable[[np.ndarray], np.ndarray] = lambda mu: mu,
    vector_of: str = "",
) -> Wrong:
    """Token shift with another vector, or other values for the token before."""
    source = "ln1" if name.startswith("att") else "ln2"

    def wrong(h: Here) -> np.ndarray:
        row = _row(name)
        shifted = before(h, source, row) if before else h.shifted(source, row)
        weights = h.vector(vector_of or name.replace(".x", ".time_mix_"))
        return mix(h.read(source), shifted, mu(weights), h.op.at(h.at + name))

    return wrong


def _same(h: Here, source: str, row: int) -> np.ndarray:
    return h.read(source)


def _two_back(h: Here, source: str, row: int) -> np.ndarray:
    x = h.read(source)
    return np.concatenate([h.past[row][None], h.past[row][None], x])[: len(x)]


def _from_zero(h: Here, source: str, row: int) -> np.ndarray:
    x = h.read(source)
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def _wrapped(h: Here, source: str, row: int) -> np.ndarray:
    x = h.read(source)
    return np.roll(x, 1, axis=0) if len(x) > 1 else h.shifted(source, row)


def _other_row(h: Here, source: str, row: int) -> np.ndarray:
    return np.concatenate([h.past[ATT_X + FFN_X - row][None], h.read(source)[:-1]])


def _half_row(h: Here, source: str, row: int) -> np.ndarray:
    return np.concatenate([rounded(h.past[row][None] / 8, np.int8) * 8, h.read(source)[:-1]])


def _swapped_mixes(site: Site) -> Planted:
    replaced: dict[str, Any] = {}
    for at, vector_of in (("att.xk", "att.time_mix_r"), ("att.xr", "att.time_mix_k")):
        replaced |= dict.fromkeys(site.names(at), _shift(at, vector_of=vector_of))
    return Planted(Patch(replaced=replaced), site.names("att.xk")[0])


def _before_norm(site: Site) -> Planted:
    """The token shift of the attention takes the stream where it should take its LayerNorm."""
    replaced: dict[str, Any] = {}
    for layer in site.layers:
        kept: dict[str, np.ndarray] = {}

        def ln1(h: Here, kept: dict[str, np.ndarray] = kept) -> np.ndarray:
            kept["x"] = h.read("x")
            return layer_norm(h.read("x"), h.weights, h.at + "ln1", h.op)

        def xk(h: Here, kept: dict[str, np.ndarray] = kept) -> np.ndarray:
            shifted = np.concatenate([h.past[ATT_X][None], kept["x"][:-1]])
            return mix(h.read("ln1"), shifted, h.vector("att.time_mix_k"), h.op.at(h.at + "att.xk"))

        replaced |= {f"blocks.{layer}.ln1": ln1, f"blocks.{layer}.att.xk": xk}
    return Planted(Patch(replaced=replaced), site.names("att.xk")[0])


# Embedding


def _rows(index: Callable[[np.ndarray, int], np.ndarray]) -> Wrong:
    """The embedding with other rows than those of the tokens."""

    def wrong(h: Here) -> np.ndarray:
        weight = h.weights["emb.weight"]
        rows: np.ndarray = weight.rows(index(h.past, weight.shape[0]), h.op.dtype)
        return h.op.at("emb").residual(rows)

    return wrong


def _scaled_embedding(h: Here) -> np.ndarray:
    x = h.weights["emb.weight"].rows(h.past, h.op.dtype)
    return h.op.at("emb").residual(x * h.op.dtype.type(np.sqrt(x.shape[-1])))


def _int8_embedding(site: Site) -> Planted:
    def to_int8(name: str, a: np.ndarray) -> np.ndarray:
        if name != "emb.weight":
            return a
        scale = np.abs(a).max(axis=-1, keepdims=True) / np.float32(127)
        return np.asarray(np.round(a / np.maximum(scale, np.float32(1e-30))) * scale)

    return Planted(Patch(weights=changed(site.weights, to_int8)), "emb")


FAULTS = (
    operation("embedding one row late", "emb", _rows(lambda i, n: (i + 1) % n), "Row id + 1 of the embedding."),
    operation("embedding one row early", "emb", _rows(lambda i, n: (i - 1) % n), "Row id - 1 of the embedding."),
    operation(
        "last rows of the embedding clamped",
        "emb",
        _rows(lambda i, n: np.minimum(i, n - 8)),
        "Ids of the last rows are clamped to a vocabulary that is too small.",
    ),
    operation("ids in seven bits", "emb", _rows(lambda i, n: i % min(128, n - 1)), "Ids lose their highest bit."),
    operation(
        "embedding scaled", "emb", _scaled_embedding, "The embedding is multiplied by sqrt(width), as elsewhere."
    ),
    Fault(
        "embedding in int8",
        "The embedding is kept in int8, which the scheme does not say.",
        _int8_embedding,
        layered=False,
    ),
    operation("ln0 skipped", "blocks.0.ln0", _skipped("emb"), "The embedding enters the first block as it is."),
    operation("ln0 twice", "blocks.0.ln0", _ln0_twice, "ln0 is folded into the embedding and applied again."),
    operation("ln1 eps 1e-6", "ln1", _norm("ln1", "x", _standard(1e-6)), "LayerNorm with eps 1e-6."),
    operation("ln2 eps 1e-3", "ln2", _norm("ln2", "att.residual", _standard(1e-3)), "LayerNorm with eps 1e-3."),
    operation(
        "ln1 without eps in the root",
        "ln1",
        _norm("ln1", "x", _standard(outside=True)),
        "eps is added to the deviation, not to the variance.",
    ),
    operation(
        "ln1 unbiased variance", "ln1", _norm("ln1", "x", _standard(ddof=1)), "The variance is divided by C - 1."
    ),
    operation("ln2 is an RMS norm", "ln2", _norm("ln2", "att.residual", _rms), "The mean is not taken off."),
    operation(
        "ln1 sums in fp16", "ln1", _norm("ln1", "x", _in_half), "Mean and variance are summed in half precision."
    ),
    operation("ln2 over padding", "ln2", _norm("ln2", "att.residual", _padded), "Mean and variance of a padded width."),
    operation("ln_out skipped", "ln_out", _skipped("x"), "The head is given the stream as it is."),
    planted("ln2 with ln1's vectors", "ln2", _other_vectors("ln2", "ln1", "att.residual"), "A name mixed up."),
    tensor("ln1 bias dropped", "ln1", "ln1.bias", _part("bias", 0), "LayerNorm without its bias."),
    tensor("ln2 weight dropped", "ln2", "ln2.weight", _part("weight", 1), "LayerNorm without its weight."),
    tensor("ln_out bias dropped", "ln_out", "ln_out.bias", _part("bias", 0), "The last LayerNorm without its bias."),
    operation("att.xk the wrong way round", "att.xk", _shift("att.xk", mu=lambda m: 1 - m), "mu and 1 - mu exchanged."),
    operation("ffn.xr the wrong way round", "ffn.xr", _shift("ffn.xr", mu=lambda m: 1 - m), "mu and 1 - mu exchanged."),
    Fault("time_mix_k and time_mix_r swapped", "Two vectors are bound to each other's names.", _swapped_mixes),
    operation("att.xv with time_mix_k", "att.xv", _shift("att.xv", vector_of="att.time_mix_k"), "A name copied."),
    operation("ffn.xk with att's vector", "ffn.xk", _shift("ffn.xk", vector_of="att.time_mix_k"), "A name copied."),
    operation("att.xk not shifted", "att.xk", _shift("att.xk", _same), "The token before is the token itself."),
    operation("ffn.xk not shifted", "ffn.xk", _shift("ffn.xk", _same), "The token before is the token itself."),
    operation("att.xr shifted by two", "att.xr", _shift("att.xr", _two_back), "The token before the one before."),
    operation(
        "att.xv starts from zero", "att.xv", _shift("att.xv", _from_zero), "Every call starts with no token before."
    ),
    operation(
        "ffn.xk starts from zero", "ffn.xk", _shift("ffn.xk", _from_zero), "Every call starts with no token before."
    ),
    operation(
        "att.xk wraps around", "att.xk", _shift("att.xk", _wrapped), "The last token of a call is before its first."
    ),
    operation(
        "ffn.xk from att's row", "ffn.xk", _shift("ffn.xk", _other_row), "The row of the state of the other half."
    ),
    operation(
        "att.xk row in int8", "att.xk", _shift("att.xk", _half_row), "The row of the state is kept in a few bits."
    ),
    Fault("att.xk shifts the stream", "The token before is taken before its LayerNorm.", _before_norm),
)
