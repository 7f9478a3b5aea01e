"""How close every operation of a model comes to overflow in a narrow float format, before anything fails.

magnitudes   the largest value of each operation on a text, in float32 (:mod:`harness.localize.magnitudes`)
headroom     the format's largest number over it: below 1 it overflows
must stay    the operations that overflow by themselves. The set is the smallest there is: each of its members
             gives Inf even where all others are exact, and with all of them in fp32 nothing is left that does.
             Confirmed by emulating the format with exactly these exceptions over the same text
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from harness.budget import hold
from harness.localize.magnitudes import Peak, measure
from harness.localize.whatif import FORMATS, Outcome, emulate, emulated_here, patterns, smallest_set
from reference.config import Config
from reference.errors import CheckpointError
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

#: What is said to be near overflow: within this factor.
NEAR = 2.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Operations kept in fp32 and ``rescale_every`` (0: never), and what emulation says of a text with them.

    ``outcome`` is ``None`` for a format that is not emulated here, and for rescaling where nothing needs it.
    """

    keep: tuple[str, ...]
    rescale_every: int
    outcome: Outcome | None

    @property
    def confirmed(self) -> bool:
        return self.outcome is not None and self.outcome.finite


@dataclass(frozen=True)
class Headroom:
    """What was found on one text.

    sums     partial sums of products and WKV's sums are in the format too
    plain    the format everywhere, emulated; ``None`` where it is not emulated
    kept     the smallest set in fp32, without rescaling; ``rescaled`` with it
    """

    format: str
    sums: bool
    tokens: int
    config: Config
    peaks: tuple[Peak, ...]
    plain: Outcome | None
    kept: Plan
    rescaled: Plan

    @property
    def limit(self) -> float:
        """The format's largest number."""
        return FORMATS[self.format][0]

    def headroom(self, peak: Peak, rescale_every: int = 0) -> float:
        """The limit over the largest value; Inf for an operation that gives zeros only."""
        value = peak.largest(self.sums) / Mixed(Arithmetic(), (), rescale_every).unit(peak.point)
        return self.limit / value if value else float("inf")

    @property
    def overflowing(self) -> tuple[Peak, ...]:
        """Operations that overflow, in execution order."""
        return tuple(peak for peak in self.peaks if _over(peak, self.format, self.sums))

    @property
    def overflows(self) -> bool:
        """Whether anything does, by magnitude or emulated: sums in another order get larger than those measured."""
        return bool(self.overflowing) or not (self.plain is None or self.plain.finite)

    @property
    def near(self) -> Peak | None:
        """The first operation within ``NEAR`` of overflow, or beyond it; else the first that overflows emulated."""
        emulated = self.plain.point if self.plain is not None and not self.plain.finite else None
        close = (peak for peak in self.peaks if not self.headroom(peak) > NEAR)
        return next(close, next((peak for peak in self.peaks if peak.point == emulated), None))

    def worst(self) -> list[Peak]:
        """Of each operation the layer where it comes closest, in execution order."""
        by_name: dict[str, Peak] = {}
        for peak in self.peaks:
            held = by_name.get(peak.name)
            if held is None or peak.largest(self.sums) > held.largest(self.sums):
                by_name[peak.name] = peak
        return list(by_name.values())


def find(
    weights: Weights,
    tokens: Sequence[int],
    scheme: str = "fp32",
    format: str = "fp16",
    sums: bool = False,
    rescale_every: int = 6,
    tell: Tell = lambda text: None,
) -> Headroom:
    """Measure ``tokens`` on the weights as ``scheme`` stores them, then confirm by emulation.

    Raises CheckpointError for weights that hold NaN or Inf, TokenError for an empty text.
    """
    if weights.non_finite:
        raise CheckpointError(
            f"{weights.source}: {weights.non_finite[0]} holds NaN or Inf; no format has room for that: repair the file"
        )
    stored = hold(apply(weights, scheme))
    peaks = measure(stored, tokens, sums, tell)

    def found(plain: Outcome | None, kept: Plan, rescaled: Plan) -> Headroom:
        return Headroom(format, sums, len(tokens), weights.config, tuple(peaks.values()), plain, kept, rescaled)

    if not emulated_here(format):
        plans = [
            Plan(tuple(p for p, peak in peaks.items() if _over(peak, format, sums, n)), n, None)
            for n in (0, rescale_every)
        ]
        return found(None, *plans)
    inner = format if sums else "fp32"
    usual = Arithmetic(format, inner, format, inner)
    plain = emulate(stored, tokens, usual, tell)
    if plain.finite:  # there is nothing to confirm a second time
        return found(plain, Plan((), 0, plain), Plan((), rescale_every, None))
    plans = []
    for n in (0, rescale_every):
        keep, outcome = smallest_set(stored, tokens, usual, peaks, n, tell)
        plans.append(Plan(keep, n, outcome))
    return found(plain, *plans)


def _over(peak: Peak, format: str, sums: bool, rescale_every: int = 0) -> bool:
    unit = Mixed(Arithmetic(), (), rescale_every).unit(peak.point)
    return not peak.largest(sums) / unit < FORMATS[format][1]


def document(found: Headroom, **about: Any) -> dict[str, Any]:
    """Plain JSON types: ``about`` (model, text), the summary, and every operation of every layer."""
    near = found.near
    return {
        "schema": 1,
        **about,
        "format": found.format,
        "limit": found.limit,
        "sums": found.sums,
        "tokens": found.tokens,
        "overflows": found.overflows,
        "near": near and near.point,
        "emulated": _outcome(found.plain),
        "keep": _planned(found.kept, found.config),
        "rescaled": _planned(found.rescaled, found.config),
        "operations": [_operation(found, peak) for peak in found.peaks],
    }


def _operation(found: Headroom, peak: Peak) -> dict[str, Any]:
    known = {**asdict(peak), "headroom": found.headroom(peak)}
    known["rescaled_headroom"] = found.headroom(peak, found.rescaled.rescale_every)
    if not found.sums:
        del known["inner"]
    return {name: _finite(value) if isinstance(value, float) else value for name, value in known.items()}


def _planned(plan: Plan, config: Config) -> dict[str, Any]:
    return {
        "fp32": list(plan.keep),
        "patterns": list(patterns(plan.keep, config.n_layer)),
        "rescale_every": plan.rescale_every,
        "confirmed": plan.confirmed if plan.outcome else None,
        "emulated": _outcome(plan.outcome),
    }


def _outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {"first_non_finite": outcome.point, "token": outcome.token, "error": _finite(outcome.error)}


def _finite(value: float) -> float | None:
    """JSON has no Inf and no NaN."""
    return float(value) if np.isfinite(value) else None
