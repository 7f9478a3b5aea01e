"""How often the intervals of `rwkv-bench quality` hold the figure of the whole text: the tables of docs/quality.md.

    python scripts/quality_coverage.py          about a minute on one core

The embedded model on all of its held-out text. The text is cut into disjoint samples of 32
segments: spread over all of it with a fresh state in each, as the command does; spread over a part of it; and
neighbouring positions with the state carried through. An interval counts as right
where it holds the mean over the whole text. The difference of two schemes' divergences is taken at every position,
as --against does; beside its intervals, what they say: no worse, worse or undecided.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from threadpoolctl import threadpool_limits

from harness.compare import log_softmax
from harness.models import TINY, open_model
from harness.quality.intervals import edges, fraction, mean
from harness.quality.paired import finding
from harness.quality.passage import HELD_OUT
from harness.quality.scores import divergence
from reference.forward import PP_START, WkvState, forward, layer_norm, sigmoid, wkv
from reference.numerics import Exact
from reference.schemes import apply
from reference.weights import Weights

SCHEMES = ("q3f16_1", "Q4_0", "Q8_0")

#: Compared with each other: nearly the same, somewhat better, much worse.
PAIRS = (("ort_int4_g32_asym_int8act", "Q4_0"), ("ort_int4_g128_asym_att8_int8act", "Q4_0"), ("q3f16_1", "Q4_0"))

SEGMENTS = 32
NEAR = (16, 8, 4, 1)
CONTEXT = 128

#: Texts that are read at once.
AT_ONCE = 64


def main() -> None:
    """Both tables."""
    ids = np.frombuffer(HELD_OUT.read_bytes(), np.uint8)
    with threadpool_limits(1):
        print(f"segments of {CONTEXT}, spread over the text, {SEGMENTS} a sample")
        fresh = figures(ids, CONTEXT)
        count = len(fresh["surprise"]) // CONTEXT
        stride = count // SEGMENTS
        tell(fresh, [spread(k, stride) for k in range(stride)], CONTEXT, stride)
        for near in NEAR:
            span = near * SEGMENTS
            print(f"{SEGMENTS} segments of {CONTEXT}, one in {near}, of texts of {span * CONTEXT} positions")
            firsts = [text * span + k for text in range(count // span) for k in range(near)]
            texts = [np.arange(span * CONTEXT) + first // span * span * CONTEXT for first in firsts]
            tell(fresh, [spread(first, near) for first in firsts], CONTEXT, near, texts)
        print(f"{SEGMENTS * CONTEXT} neighbouring positions, state carried through")
        carried = figures(ids, SEGMENTS * CONTEXT)
        size = SEGMENTS * CONTEXT
        tell(carried, [np.arange(a, a + size) for a in range(0, len(carried["surprise"]), size)], 0, 1)


def spread(first: int, stride: int) -> np.ndarray:
    """Positions of every ``stride``-th segment from ``first`` on."""
    segments = first + stride * np.arange(SEGMENTS)
    return np.asarray((segments[:, None] * CONTEXT + np.arange(CONTEXT)).ravel())


def tell(
    values: dict[str, np.ndarray],
    samples: list[np.ndarray],
    context: int,
    spacing: float,
    texts: list[np.ndarray] | None = None,
) -> None:
    """One line a figure: how many of the samples' intervals hold the mean of all, and of their own text."""
    for name, all_of_it in values.items():
        estimate = fraction if name.startswith("top-1") else mean
        found = [estimate(all_of_it[sample], edges(len(sample), context, spacing)) for sample in samples]
        whole = all_of_it.mean()
        intervals = [one.interval for one in found if one.interval is not None]
        held = sum(low <= whole <= high for low, high in intervals)
        half = np.mean([(high - low) / 2 for low, high in intervals]) / whole
        means = [all_of_it[text].mean() for text in texts or []]
        near = sum(low <= own <= high for (low, high), own in zip(intervals, means, strict=False))
        of_own = f", own text {near}" if texts else ""
        width = f"half width {100 * half:.1f} %"
        if " less " in name:
            other = all_of_it.mean() / values["KL " + name.split(" less ")[1]].mean()
            said = Counter(finding(one) for one in found)
            width = f"{100 * other:+.1f} ±{100 * abs(half * other):.1f} % of the other; {dict(said)}"
        print(f"  {name:<45}{held:>4} of {len(intervals)}{of_own}   {width}", flush=True)


def figures(ids: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Name -> figure of every position, in texts of ``length`` that each begin with a fresh state."""
    full = open_model(TINY).weights
    count = (len(ids) - 1) // length
    texts, following = (ids[a : a + count * length].reshape(count, length) for a in (0, 1))
    exact = logits_of(full, texts)
    p = log_softmax(exact)
    found = {"surprise": -np.take_along_axis(p, following[..., None], axis=-1).ravel()}
    for scheme in dict.fromkeys([*SCHEMES, *(name for pair in PAIRS for name in pair)]):
        q = log_softmax(logits_of(apply(full, scheme), texts))
        found[f"KL {scheme}"] = np.concatenate([divergence(*pair) for pair in zip(p, q, strict=True)]).ravel()
        found[f"top-1 {scheme}"] = (p.argmax(axis=-1) == q.argmax(axis=-1)).ravel()
    pairs = {f"{one} less {other}": found[f"KL {one}"] - found[f"KL {other}"] for one, other in PAIRS}
    return {**found, **pairs}


def logits_of(weights: Weights, texts: np.ndarray) -> np.ndarray:
    """Float32 ``(texts, length, n_vocab)``: the reference over many texts at once, held to it on the first."""
    held = weights.in_memory()
    logits = np.concatenate([side_by_side(held, texts[a : a + AT_ONCE]) for a in range(0, len(texts), AT_ONCE)])
    expected, _ = forward(held, texts[0][:CONTEXT], all_logits=True)
    np.testing.assert_allclose(logits[0][:CONTEXT], expected, rtol=0, atol=1e-3 * float(np.std(expected)))
    return logits


def side_by_side(weights: Weights, texts: np.ndarray) -> np.ndarray:
    """Logits ``(B, T, n_vocab)`` of ``texts (B, T)``; to WKV, whose channels do not meet, texts are more channels."""
    op, (count, length) = Exact(np.float32), texts.shape

    def vector(name: str) -> np.ndarray:
        return np.asarray(weights[name].array()).reshape(-1)

    def mixed(h: np.ndarray, name: str, gate: str) -> np.ndarray:
        """Token shift, then the matrix of a gate."""
        mu = vector(f"{name}time_mix_{gate}")
        before = np.concatenate([np.zeros_like(h[:1]), h[:-1]])
        x = h * mu + before * (1 - mu)
        return linear(x, name + {"k": "key", "v": "value", "r": "receptance"}[gate])

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ weights[name + ".weight"].array().T)

    x = layer_norm(np.asarray(weights["emb.weight"].array())[texts.T], weights, "blocks.0.ln0", op)  # (T, B, C)
    for i in range(weights.config.n_layer):
        at = f"blocks.{i}.att."
        h = layer_norm(x, weights, f"blocks.{i}.ln1", op)
        k, v, r = (mixed(h, at, gate) for gate in "kvr")
        w, u = (np.tile(vector(at + name), count) for name in ("time_decay", "time_first"))
        past = WkvState(np.zeros_like(w), np.zeros_like(w), np.full_like(w, PP_START))
        y, _ = wkv(k.reshape(length, -1), v.reshape(length, -1), np.exp(w), u, past, op)
        x = x + linear(sigmoid(r) * y.reshape(x.shape), at + "output")
        at = f"blocks.{i}.ffn."
        h = layer_norm(x, weights, f"blocks.{i}.ln2", op)
        k, r = (mixed(h, at, gate) for gate in "kr")
        x = x + sigmoid(r) * linear(np.square(np.maximum(k, 0)), at + "value")
    logits = linear(layer_norm(x, weights, "ln_out", op), "head")
    return np.ascontiguousarray(logits.transpose(1, 0, 2))


if __name__ == "__main__":
    main()
