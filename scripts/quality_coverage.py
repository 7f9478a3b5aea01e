"""How often the intervals of `rwkv-bench quality` hold the figure of the whole text: the tables of docs/quality.md.

    python scripts/quality_coverage.py          about ten minutes on one core

The embedded model on all of its held-out text, by the reference. The text is cut into disjoint samples of 32
segments: spread over all of it with a fresh state in each, as the command does; spread over a part of it; and
neighbouring positions with the state carried through. An interval counts as right
where it holds the mean over the whole text.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from harness.compare import log_softmax
from harness.models import TINY, open_model
from harness.quality.intervals import edges, fraction, mean
from harness.quality.passage import HELD_OUT
from harness.quality.scores import divergence
from reference.forward import forward
from reference.schemes import apply

SCHEMES = ("q3f16_1", "Q4_0", "Q8_0")
SEGMENTS = 32
NEAR = (16, 8, 4, 1)
CONTEXT = 128
CALL = 256


def main() -> None:
    """Both tables."""
    ids = np.frombuffer(HELD_OUT.read_bytes(), np.uint8)
    with threadpool_limits(1):
        print(f"segments of {CONTEXT}, spread over the text, {SEGMENTS} a sample")
        fresh = figures(ids, CONTEXT, fresh=True)
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
        carried = figures(ids, CALL, fresh=False)
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
        print(f"  {name:<14}{held:>4} of {len(intervals)}{of_own}   half width {100 * half:.1f} %", flush=True)


def figures(ids: np.ndarray, length: int, fresh: bool) -> dict[str, np.ndarray]:
    """Name -> figure of every position, read in calls of ``length``."""
    full = open_model(TINY).weights
    models = [full.in_memory(), *(apply(full, scheme).in_memory() for scheme in SCHEMES)]
    states: list[np.ndarray | None] = [None] * len(models)
    rows: list[list[np.ndarray]] = []
    for start in range(0, (len(ids) - 1) // length * length, length):
        logs = []
        for i, model in enumerate(models):
            past = None if fresh else states[i]
            logits, states[i] = forward(model, ids[start : start + length], past, all_logits=True)
            logs.append(log_softmax(logits))
        p, *others = logs
        following = ids[start + 1 : start + 1 + length]
        rows.append(
            [
                -p[np.arange(length), following],
                *(divergence(p, q) for q in others),
                *(p.argmax(axis=-1) == q.argmax(axis=-1) for q in others),
            ]
        )
    names = ["surprise", *(f"KL {scheme}" for scheme in SCHEMES), *(f"top-1 {scheme}" for scheme in SCHEMES)]
    return {name: np.concatenate(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)}


if __name__ == "__main__":
    main()
