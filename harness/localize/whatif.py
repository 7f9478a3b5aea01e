"""What would happen in another arithmetic: which operations overflow in it, and a text emulated beside float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from harness.localize.magnitudes import Peak, chunks
from reference.config import Config
from reference.forward import check_tokens, forward
from reference.mixed import Mixed
from reference.numerics import ROUND, Arithmetic
from reference.operations import Step, steps
from reference.weights import Weights

#: Format -> its largest number, and from where on a value is rounded to Inf (fp8 e4m3, which has no Inf: to NaN, or to
#: the largest number by conversions that saturate). Halfway, e4m3 alone rounds down: its largest mantissa is even.
FORMATS: dict[str, tuple[float, float]] = {
    "fp32": (float(np.finfo(np.float32).max), float("inf")),
    "fp16": (65504.0, 65520.0),
    "bf16": (255 * 2.0**120, 511 * 2.0**119),
    "fp8": (448.0, math.nextafter(464.0, math.inf)),
    "fp8_e5m2": (57344.0, 61440.0),
}

#: Operations whose result is the residual stream.
_STREAM = ("emb", "blocks.0.ln0", "att.residual", "ffn.residual")
_PRODUCTS = ("att.k", "att.v", "att.r", "att.out", "ffn.k", "ffn.v", "ffn.r", "logits")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What an emulated run came to.

    point  the first trace point that was not finite, and the position of the token; ``None``: all were
    error  RMS of the logits' error in units of their spread; NaN where they are not finite
    """

    point: str | None
    token: int | None
    error: float

    @property
    def finite(self) -> bool:
        return self.point is None


def emulate(
    weights: Weights,
    tokens: Sequence[int] | np.ndarray,
    arithmetic: Arithmetic | Mixed,
    tell: Tell = lambda text: None,
) -> Outcome:
    """Run ``tokens`` in an emulated arithmetic; stops after the first part of the text that is not finite."""
    ids = check_tokens(tokens, weights.config.n_vocab)
    state: np.ndarray | None = None
    exact: np.ndarray | None = None
    squares = spread = 0.0
    for start, part in chunks(ids):
        bad: list[tuple[str, int]] = []
        logits, state = forward(
            weights, part, state, arithmetic=arithmetic, all_logits=True, tap=_first_bad(bad, start)
        )
        if bad:
            return Outcome(*bad[0], float("nan"))
        truth, exact = forward(weights, part, exact, all_logits=True, dtype=np.float64)
        squares += float(np.square(logits - truth).mean(axis=-1).sum())
        spread += float(np.var(truth, axis=-1).sum())
        tell(f"{arithmetic}: {start + len(part)} of {len(ids)} tokens")
    return Outcome(None, None, float(np.sqrt(squares / spread)) if spread else float("inf"))


def excess(peaks: Mapping[str, Peak], arithmetic: Arithmetic | Mixed, config: Config) -> dict[str, float]:
    """The operations that overflow in an arithmetic, each with its largest value over what its types hold."""
    ratios = {step.point: _ratio(step, peaks, arithmetic) for step in steps(config)}
    return {point: ratio for point, ratio in ratios.items() if not ratio < 1}


def _ratio(step: Step, peaks: Mapping[str, Peak], arithmetic: Arithmetic | Mixed) -> float:
    """Of the results, of the sums on the way to them, and of inputs that are converted before a product."""
    peak = peaks[step.point]
    here = arithmetic.of(step.point) if isinstance(arithmetic, Mixed) else arithmetic
    unit = arithmetic.unit(step.point) if isinstance(arithmetic, Mixed) else 1.0
    kept = here.residual if step.name in _STREAM else here.activations
    ratios = [peak.value / unit / _edge(kept)]
    if step.name in _PRODUCTS:
        ratios.append(peak.inner / unit / _edge(here.accumulation))
        if here.activations == "fp16in":
            ratios.append(peaks[step.inputs[0]].value / _edge("fp16"))
    if step.name == "att.wkv":
        ratios.append(peak.inner / _edge(here.wkv))
    return max(ratios)


def _edge(kind: str) -> float:
    """Of types that only round the inputs of products, results are fp32."""
    return FORMATS[kind if kind in FORMATS else "fp32"][1]


#: Values that miss the limit by a rounding show only in emulation; so many may be added to the set.
_MOST_ADDED = 16


def smallest_set(
    weights: Weights,
    tokens: Sequence[int] | np.ndarray,
    usual: Arithmetic,
    peaks: Mapping[str, Peak],
    rescale_every: int = 0,
    tell: Tell = lambda text: None,
) -> tuple[tuple[str, ...], Outcome]:
    """The fewest operations that must be in fp32 for all results to be finite, and what emulation says of it.

    The set is that of all that overflow by themselves: each of them gives Inf even where all others are exact.
    """
    keep = list(excess(peaks, Mixed(usual, (), rescale_every), weights.config))
    for _ in range(_MOST_ADDED):
        outcome = emulate(weights, tokens, mixed(usual, keep, rescale_every), tell)
        if outcome.point is None or outcome.point in keep:
            break
        keep.append(outcome.point)
    return tuple(point for point in peaks if point in keep), outcome


def mixed(usual: Arithmetic, keep: Sequence[str], rescale_every: int = 0) -> Mixed:
    """``usual`` with some trace points, or patterns of them, in fp32."""
    return Mixed(usual, tuple((point, Arithmetic()) for point in keep), rescale_every)


def emulated_here(format: str) -> bool:
    """Whether rounding to a format is known here."""
    return format in ROUND


def harmful(name: str, x: np.ndarray) -> np.ndarray:
    """Of a trace point's values, those that can do harm if they overflow.

    Inf under the ReLU or in front of a sigmoid is no fault, and neither is shown but the former.
    """
    return np.maximum(x, 0) if name.endswith(".ffn.k") else x


def _first_bad(found: list[tuple[str, int]], start: int) -> Callable[[str, np.ndarray], None]:
    def look(name: str, x: np.ndarray) -> None:
        shown = harmful(name, x)
        if not found and not np.isfinite(shown).all():
            found.append((name, start + int(np.flatnonzero(~np.isfinite(shown).all(axis=-1))[0])))

    return look


def patterns(points: Sequence[str], n_layer: int) -> tuple[str, ...]:
    """Trace points as few shell patterns: an operation that is listed at every layer becomes ``*.name``."""
    by_name: dict[str, list[str]] = {}
    for point in points:
        by_name.setdefault(point.split(".", 2)[2] if point.startswith("blocks.") else point, []).append(point)
    return tuple(
        pattern
        for name, listed in by_name.items()
        for pattern in ([f"blocks.*.{name}"] if len(listed) == n_layer > 1 else listed)
    )


def layer_ranges(layers: Sequence[int]) -> str:
    """``0-3, 7`` of layer numbers."""
    runs: list[list[int]] = []
    for now, before in zip_longest(sorted(set(layers)), [None, *sorted(set(layers))[:-1]]):
        if before is not None and now == before + 1:
            runs[-1][1] = now
        else:
            runs.append([now, now])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
