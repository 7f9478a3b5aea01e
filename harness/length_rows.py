"""Rows of how decode scales with context length, from cells that differ in nothing but their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.length_scaling import CONFIDENCE, LEAST_POINTS, LEAST_ROUNDS, slope
from harness.rows import Row, cell

#: Fewer turns cannot make :data:`harness.length_scaling.LEAST_ROUNDS` independent orders: each second one is a reverse.
LEAST_REPEATS = 2 * LEAST_ROUNDS - 1

#: Metric of such a row; its value is nanoseconds that a step takes longer per token of context.
METRIC = "length_slope"


def length_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for each cell that was decoded at three or more lengths; why there is no slope is a reason.

    Lengths that were measured in different runs, as ``--resume`` leaves them, did not take turns: they have none.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.kind == "measured" and row.metric == "decode" and row.verdict == "PASS" and row.workload is not None:
            key = cell(replace(row, workload=replace(row.workload, prompt_tokens=1)))
            groups.setdefault(key, []).append(row)
    return [_row(group) for group in groups.values() if len({_length(row) for row in group}) >= LEAST_POINTS]


def _row(group: Sequence[Row]) -> Row:
    group = sorted(group, key=_length)
    lengths = [_length(row) for row in group]
    runs = len({row.run for row in group})
    times = in_rounds(group)
    found = slope(lengths, times) if len(times) and runs == 1 else None
    row = replace(
        group[-1],
        time=max(row.time or "" for row in group),
        session=None,
        metric=METRIC,
        unit="",
        value=None,
        interval=None,
        roofline_fraction=None,
        samples=None,
        steps=None,
        blocks=None,
        warmup=None,
        percentiles=None,
        peak_bytes=None,
        extra={},
        stopped=None,
        reason=_why_none(group, runs, len(times)),
        verdict="UNSUPPORTED",
    )
    if found is None:
        return row
    low, high = found.interval
    return replace(
        row,
        value=found.ns,
        interval=(low, high) if np.isfinite([low, high]).all() else None,
        verdict="PASS",
        reason=str(found),
        extra={"length_scaling": {"flat": found.flat, "p": found.p, "confidence": CONFIDENCE, "lengths": lengths}},
    )


def _why_none(group: Sequence[Row], runs: int, orders: int) -> str:
    if runs > 1:
        return f"slope: points are of {runs} runs"
    if min(len(row.blocks or ()) + len(row.warmup or ()) for row in group) < LEAST_REPEATS:
        return f"slope needs at least {LEAST_REPEATS} repeats"
    return f"decode at {len(group)} lengths was not measured in enough random orders: {orders}"


def in_rounds(group: Sequence[Row]) -> np.ndarray:
    """Nanoseconds a step, ``(orders, cells)``: complete rounds, those that are one another's reverse as their mean.

    Rounds are found from the times at which blocks were taken; a cell that comes again begins the next one. A round
    that lacks a cell, because its block was warm-up or was left out, is none.
    """
    taken = [entry for i, row in enumerate(group) for entry in _blocks(row, i)]
    rounds: list[list[tuple[int, float | None]]] = []
    for _, i, ns in sorted(taken, key=lambda entry: entry[:2]):
        if not rounds or any(i == other for other, _ in rounds[-1]):
            rounds.append([])
        rounds[-1].append((i, ns))
    found: list[np.ndarray] = []
    last: list[int] = []
    for entries in rounds:
        order = [i for i, _ in entries]
        whole = len(order) == len(group) and all(ns is not None for _, ns in entries)
        if whole:
            times = np.empty(len(group))
            times[order] = [ns or np.nan for _, ns in entries]
            if last == order[::-1]:
                found[-1] = (found[-1] + times) / 2
                order = []  # a pair is complete
            else:
                found.append(times)
        last = order if whole else []
    return np.array(found).reshape(-1, len(group))


def _blocks(row: Row, number: int) -> list[tuple[str, int, float | None]]:
    """When each block was taken, of which cell, and its median time of a step; ``None`` for one that is left out."""
    assert row.workload is not None
    found = []
    for block in row.blocks or ():
        samples = (row.samples or ())[block["start"] : block["start"] + block["count"]]
        counts = bool(samples) and not block.get("left_out")
        ns = float(np.median(samples)) / row.workload.decode_tokens if counts else None
        found.append((str(block["time"]), number, ns))
    return found


def _length(row: Row) -> int:
    return row.workload.prompt_tokens if row.workload is not None else 0
