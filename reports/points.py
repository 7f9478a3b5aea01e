"""Cells -> the points of the plots, plain numbers: page and picture draw the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.rows import Row
from harness.stats import rate
from reports.cells import SPEEDS, Cell
from reports.row_fields import roofline

_NS = 1e9


def in_unit(row: Row) -> list[float]:
    """Raw samples of a time or a speed in the row's unit; empty where they cannot be brought into it."""
    if not row.samples:
        return []
    if row.metric in SPEEDS:
        tokens = tokens_of(row)
        return [] if tokens is None else [rate(tokens, ns) for ns in row.samples if ns > 0]
    return [ns / _NS for ns in row.samples] if row.unit == "s" else list(row.samples)


def tokens_of(row: Row) -> int | None:
    """Tokens in one sample of prefill or decode."""
    if row.workload is None:
        return None
    length = row.workload.prompt_tokens if row.metric == "prefill" else row.workload.decode_tokens
    return length * row.workload.batch or None


def operations(row: Row) -> float | None:
    """Floating-point operations of the matrix products of one decode step, or of one prompt.

    RWKV-4: key, value, receptance and output of the time mix are C x C, the channel mix has C x F, F x C and C x C;
    a prompt needs the head for its last token only.
    """
    try:
        c, f, n, v = (int((row.config or {})[name]) for name in ("n_embd", "n_ffn", "n_layer", "n_vocab"))
    except (KeyError, TypeError, ValueError):
        return None
    if row.workload is None:
        return None
    tokens = row.workload.prompt_tokens if row.metric == "prefill" else 1
    return 2.0 * row.workload.batch * (tokens * n * (5 * c * c + 2 * c * f) + c * v)


def roofline_points(cell: Cell) -> list[dict[str, Any]]:
    """Prefill and decode of a cell as (operations per byte of weights read, operations per second).

    ``roof`` is what the machine can do at that intensity: its bandwidth times the intensity for decode, its matrix
    rate for prefill. None where the row does not say: then the point stands without a roof.
    """
    found = []
    for metric in SPEEDS:
        row = cell.speed(metric)
        work = None if row is None else operations(row)
        if row is None or row.value is None or work is None or not row.weight_bytes or row.workload is None:
            continue
        tokens = row.workload.batch * (row.workload.prompt_tokens if metric == "prefill" else 1)
        intensity, reached, told = work / row.weight_bytes, work * row.value / tokens, roofline(row)
        roof = told.rate if told.rate is None or metric == "prefill" else told.rate * intensity
        found.append({"metric": metric, "x": intensity, "y": reached, "roof": roof, "fraction": told.fraction})
    return found


def frontier_point(cell: Cell) -> dict[str, float] | None:
    """Decode speed against the divergence from the fp32 weights, where both are known."""
    speed, divergence = cell.speed("decode"), cell.quality_of("kl_divergence")
    if speed is None or speed.value is None or divergence is None or divergence.value is None:
        return None
    return {"speed": speed.value, "kl": max(divergence.value, 0.0)}


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Positions of the points that no other point is at least as good as in everything and better in something.

    Larger is better in every coordinate. Of equal points all stay.
    """

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
