"""How often the intervals of `rwkv-bench quality` hold the figure of the whole text: the tables of docs/quality.md.

    python scripts/quality_coverage.py          about ten minutes on one core

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

from backends.api import Scoring
from harness.compare import log_softmax
from harness.models import TINY, open_model
from harness.quality.intervals import edges, fraction, mean
from harness.quality.paired import finding
from harness.quality.passage import HELD_OUT
from harness.quality.scores import divergence
from harness.session import open_session
from reference.schemes import apply
from reference.weights import Weights

SCHEMES = ("q3f16_1", "Q4_0", "Q8_0")

#: Compared with each other: nearly the same, somewhat better, much worse.
PAIRS = (("ort_int4_g32_asym_int8act", "Q4_0"), ("ort_int4_g128_asym_att8_int8act", "Q4_0"), ("q3f16_1", "Q4_0"))
WHAT = ("KL", "top-1")

SEGMENTS = 32
NEAR = (16, 8, 4, 1)
CONTEXT = 128
CALL = 1024


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
        carried = figures(ids, 0)
        size = SEGMENTS * CONTEXT
        tell(carried, [np.arange(a, a + size) for a in range(0, len(carried["surprise"]) - size, size)], 0, 1)


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
    """Name -> figure of every position, in segments of ``length`` with a fresh state each; 0: in one run."""
    full = open_model(TINY).weights
    schemes = list(dict.fromkeys([*SCHEMES, *(name for pair in PAIRS for name in pair)]))
    length = length or len(ids) - 1
    count = (len(ids) - 1) // length * length
    exact = logits_of(full, ids[:count], length)
    following = ids[1 : count + 1]
    found = {"surprise": np.empty(count), **{f"{what} {name}": np.empty(count) for what in WHAT for name in schemes}}
    for k, scheme in enumerate(schemes):
        other = logits_of(apply(full, scheme), ids[:count], length)
        for a in range(0, count, CALL):
            at = slice(a, min(a + CALL, count))
            p, q = log_softmax(exact[at]), log_softmax(other[at])
            if k == 0:
                found["surprise"][at] = -p[np.arange(len(p)), following[at]]
            found[f"KL {scheme}"][at] = divergence(p, q)
            found[f"top-1 {scheme}"][at] = p.argmax(axis=-1) == q.argmax(axis=-1)
    pairs = {f"{one} less {other}": found[f"KL {one}"] - found[f"KL {other}"] for one, other in PAIRS}
    return {**found, **pairs}


def logits_of(weights: Weights, ids: np.ndarray, length: int) -> np.ndarray:
    """Float32 ``(positions, n_vocab)``, by the torch backend: the reference takes ten times as long."""
    with open_session("torch", weights, "fp32", threads=1, isolate=False) as opened:
        assert isinstance(opened.session, Scoring)
        parts = [opened.session.logits(ids[a : a + length].tolist(), None) for a in range(0, len(ids), length)]
        return np.concatenate([np.array(part) for part in parts])


if __name__ == "__main__":
    main()
