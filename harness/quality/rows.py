"""What was found on a passage -> rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.measure import Workload
from harness.quality.intervals import (
    Mean,
    edges,
    exp,
    exponential,
    fraction,
    mean,
    not_negative,
    positive,
    ratio,
    wilson,
)
from harness.quality.paired import Against, compared, shortcoming
from harness.quality.passage import Passage
from harness.quality.scores import BadLogits, Scores
from harness.rows import METRIC_UNITS, Row
from harness.without_codec import NotComparable

METRICS = ("perplexity", "bits_per_byte", "kl_divergence", "top1_agreement", "top5_agreement")

SYNTHETIC = "synthetic weights: this says nothing of any text, only divergence and agreement mean something"


@dataclass(frozen=True)
class Demand:
    """What a cell's divergence is held against. ``no_worse``: it fails if it is worse; ``strict``: also undecided."""

    against: Against | None = None
    no_worse: bool = False
    strict: bool = False


def score_rows(base: Row, passage: Passage, scores: Scores, bad: str | None, demand: Demand = Demand()) -> list[Row]:
    """The rows of one session on one passage. ``bad``: why its kernel, and so no figure of it, passes."""
    blocks = edges(len(passage), passage.context, passage.spacing)
    about = described(passage, len(blocks) - 1)
    surprise = positive(scores.nll, blocks)
    change = exponential(mean(scores.nll - scores.nll_fp32, blocks))
    fp32 = exp(float(np.mean(scores.nll_fp32)))
    beside = {
        "fp32": _finite(fp32),
        "times_fp32": _finite(change.value),
        "times_fp32_interval": None if change.interval is None else list(change.interval),
    }
    found = [_row(base, "perplexity", exponential(surprise), {**about, **beside}, bad)]
    if passage.n_bytes is not None:
        bits = not_negative(ratio(scores.nll / math.log(2), passage.n_bytes, blocks))
        known = float(np.sum(scores.nll_fp32) / math.log(2) / np.sum(passage.n_bytes))
        found.append(_row(base, "bits_per_byte", bits, {**about, "fp32": known}, bad))
    parts = {"weights": scores.kl_weights, "kernel": scores.kl_kernel}
    shares = {name: _share(positive(values, blocks)) for name, values in parts.items() if values is not None}
    lacking = bad
    if demand.against is not None:
        shares["against"] = compared(scores.kl, demand.against, blocks)
        if demand.no_worse:
            lacking = "; ".join(filter(None, (bad, shortcoming(shares["against"], demand.strict)))) or None
    return [
        *found,
        _row(base, "kl_divergence", positive(scores.kl, blocks), {**about, **shares}, lacking),
        _row(base, "top1_agreement", fraction(scores.top1, blocks), about, bad),
        _row(base, "top5_agreement", fraction(scores.top5, blocks), about, bad),
    ]


def failed_rows(base: Row, passage: Passage, error: NotComparable) -> list[Row]:
    """Every metric of a passage, with the reason why it has no figure."""
    row = replace(base, workload=Workload(len(passage), 0), quality=described(passage))
    metrics = [m for m in METRICS if m != "bits_per_byte" or passage.n_bytes is not None]
    return [_failed(row, metric, error) for metric in metrics]


def lambada_row(base: Row, right: Sequence[bool] | np.ndarray, about: dict[str, Any], bad: str | None) -> Row:
    """The share of questions that were answered, each taken as a trial of its own."""
    share = float(np.mean(right))
    return replace(
        base,
        metric="lambada_accuracy",
        unit="",
        workload=None,
        verdict="PASS" if bad is None else "FAIL",
        reason="; ".join(filter(None, (bad, SYNTHETIC if base.synthetic else None))) or None,
        value=share,
        interval=wilson(share, len(right)),
        samples=tuple(float(x) for x in right),
        quality=about,
    )


def failed_lambada(base: Row, about: dict[str, Any], error: NotComparable) -> Row:
    """The row of questions that gave no figure."""
    return _failed(replace(base, workload=None, quality=about), "lambada_accuracy", error)


def described(passage: Passage, blocks: int | None = None) -> dict[str, Any]:
    """What a passage was, for a row."""
    about = {"text": passage.name, "ids_sha256": passage.sha256, "positions": len(passage), "context": passage.context}
    return about if blocks is None else {**about, "blocks": blocks}


def _failed(row: Row, metric: str, error: NotComparable) -> Row:
    where = error.where if isinstance(error, BadLogits) else None
    return replace(row, metric=metric, unit="", verdict="FAIL", reason=str(error), first_bad=where)


def _row(base: Row, metric: str, found: Mean, about: dict[str, Any], bad: str | None) -> Row:
    meaningless = base.synthetic and metric in ("perplexity", "bits_per_byte")
    value = _finite(found.value)
    large = f"{metric} is beyond float64: the text is all but impossible to this backend" if value is None else None
    return replace(
        base,
        metric=metric,
        unit=METRIC_UNITS[metric],
        workload=Workload(about["positions"], 0),
        value=value,
        interval=found.interval,
        samples=found.blocks if np.isfinite(found.blocks).all() else None,
        verdict="PASS" if bad is None and large is None else "FAIL",
        reason="; ".join(filter(None, (bad, large, SYNTHETIC if meaningless else None))) or None,
        quality=about,
    )


def _share(found: Mean) -> dict[str, Any]:
    return {"value": found.value, "interval": None if found.interval is None else list(found.interval)}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
