"""What was found on a passage -> rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.measure import Workload
from harness.quality.intervals import Mean, edges, exponential, fraction, mean, positive, ratio, wilson
from harness.quality.passage import Passage
from harness.quality.scores import Scores
from harness.rows import METRIC_UNITS, Row

#: Parts of a divergence: what the stored weights alone do, and how far the kernel is from computing with them.
WEIGHTS, KERNEL = "weights", "kernel"

#: Metrics of a passage, and which part of a divergence each row is of.
METRICS = ("perplexity", "bits_per_byte", "kl_divergence", "top1_agreement", "top5_agreement")

SYNTHETIC = "synthetic weights: this says nothing of any text, only divergence and agreement mean something"


def score_rows(base: Row, passage: Passage, scores: Scores, bad: str | None) -> list[Row]:
    """The rows of one session on one passage. ``bad``: why its kernel, and so no figure of it, passes."""
    blocks = edges(len(passage), passage.context)
    about = described(passage, len(blocks) - 1)
    surprise = mean(scores.nll, blocks)
    change = mean(scores.nll - scores.nll_fp32, blocks)
    fp32 = float(np.mean(scores.nll_fp32))
    beside = {**about, "fp32": math.exp(fp32), **_change(change)}
    found: list[tuple[str, Mean, dict[str, Any], str | None]] = [("perplexity", exponential(surprise), beside, None)]
    if passage.n_bytes is not None:
        bits = ratio(scores.nll / math.log(2), passage.n_bytes, blocks)
        known = float(np.sum(scores.nll_fp32) / math.log(2) / np.sum(passage.n_bytes))
        found.append(("bits_per_byte", bits, {**about, "fp32": known}, None))
    for part, values in ((None, scores.kl), (WEIGHTS, scores.kl_weights), (KERNEL, scores.kl_kernel)):
        if values is not None:
            found.append(("kl_divergence", positive(values, blocks), about, part))
    found += [
        ("top1_agreement", fraction(scores.top1, blocks), about, None),
        ("top5_agreement", fraction(scores.top5, blocks), about, None),
    ]
    return [_row(base, passage, *what, bad) for what in found]


def failed_rows(base: Row, passage: Passage, why: str) -> list[Row]:
    """Every metric of a passage, with the reason why it has no figure."""
    row = replace(base, workload=Workload(len(passage), 0), verdict="FAIL", reason=why, quality=described(passage))
    metrics = [m for m in METRICS if m != "bits_per_byte" or passage.n_bytes is not None]
    return [replace(row, metric=metric, unit="") for metric in metrics]


def lambada_row(base: Row, right: Sequence[bool] | np.ndarray, name: str, bad: str | None) -> Row:
    """The share of questions that were answered; they are of different books, so each counts as independent."""
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
        quality={"text": name, "documents": len(right)},
    )


def described(passage: Passage, blocks: int | None = None) -> dict[str, Any]:
    """What a passage was, for a row."""
    about = {"text": passage.name, "ids_sha256": passage.sha256, "positions": len(passage), "context": passage.context}
    return about if blocks is None else {**about, "blocks": blocks}


def _row(
    base: Row, passage: Passage, metric: str, found: Mean, about: dict[str, Any], part: str | None, bad: str | None
) -> Row:
    meaningless = base.synthetic and metric in ("perplexity", "bits_per_byte")
    return replace(
        base,
        metric=metric,
        unit=METRIC_UNITS[metric],
        part=part,
        workload=Workload(len(passage), 0),
        value=found.value,
        interval=found.interval,
        samples=found.blocks,
        verdict="PASS" if bad is None else "FAIL",
        reason="; ".join(filter(None, (bad, SYNTHETIC if meaningless else None))) or None,
        quality=about,
    )


def _change(found: Mean) -> dict[str, Any]:
    """How many times as large a perplexity is as the fp32 weights' on the same positions, and the interval of that."""
    low, high = found.interval
    return {"times_fp32": math.exp(found.value), "times_fp32_interval": [math.exp(low), math.exp(high)]}
