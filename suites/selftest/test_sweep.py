"""Sweeps: points along one axis, their table, and whether decode gets longer with its context."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import length_scaling
from harness.hardware import Hardware
from harness.length_rows import METRIC, in_rounds, length_rows
from harness.length_scaling import slope
from harness.plan import Cell, Plan
from harness.rows import Row
from harness.samples import Workload
from harness.store import read
from harness.sweep import BadSweep, Sweep, parse, swept
from reports.output import formatted
from suites.selftest.conftest import Done

LENGTHS = (64, 128, 256, 512, 1024, 2048)
CELL = Cell("tiny", "torch", "fp32", Hardware("cpu", "cpu", "x"), 2, Workload(256, 64))


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("prompt=64..2048", LENGTHS),
        ("prompt=48..200", (48, 96, 192, 200)),
        ("threads=1..4", (1, 2, 3, 4)),
        ("threads=1..16", (1, 2, 4, 8, 16)),
        ("batch=1,3,8", (1, 3, 8)),
        ("decode=8..16", (8, 16)),
    ],
)
def test_ranges_and_lists(text: str, points: tuple[int, ...]) -> None:
    sweep = parse(text)
    assert sweep.points == points
    assert parse(str(sweep)) == sweep


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.sampled_from(["prompt", "threads", "batch"]))
def test_a_range_holds_its_ends_and_rises(first: int, last: int, axis: str) -> None:
    if first >= last:
        with pytest.raises(BadSweep):
            parse(f"{axis}={first}..{last}")
        return
    points = parse(f"{axis}={first}..{last}").points
    assert (points[0], points[-1]) == (first, last)
    assert list(points) == sorted(set(points))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("promt=1..2", "did you mean 'prompt'"),
        ("prompt", "FIRST..LAST"),
        ("prompt=", "not a whole number"),
        ("prompt=0..4", "not a whole number"),
        ("prompt=8..8", "1 point"),
        ("prompt=4,2", "must rise"),
        ("threads=1..99999999999", "not a whole number"),
        ("prompt=" + ",".join(map(str, range(1, 90))), "2 to 64"),
    ],
)
def test_what_is_no_sweep_is_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(BadSweep) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cells_times_points() -> None:
    planned = Plan((CELL, replace(CELL, scheme="bf16")), (), ())
    cells = swept(planned, Sweep("prompt", (64, 128))).cells
    assert [(c.scheme, c.workload.prompt_tokens) for c in cells] == [
        *(("fp32", 64), ("fp32", 128)),
        *(("bf16", 64), ("bf16", 128)),
    ]
    assert {c.workload.decode_tokens for c in cells} == {64}
    assert [c.threads for c in swept(planned, Sweep("threads", (1, 2))).cells] == [1, 2, 1, 2]
    assert swept(planned, None) is planned


def in_random_order(rng: np.random.Generator, orders: int, per_token: float, noise: Callable[[int], np.ndarray]) -> Any:
    """Times of a step as a run has them: noise by moment, length by the order drawn."""
    times = np.empty((orders, len(LENGTHS)))
    moments = noise(orders * len(LENGTHS)).reshape(times.shape)
    for one, row in enumerate(times):
        order = rng.permutation(len(LENGTHS))
        row[order] = 1e7 + moments[one] + per_token * np.array(LENGTHS)[order]
    return times


def drifting(rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    """A random walk, and now and then a burst."""

    def noise(n: int) -> np.ndarray:
        burst = 1e6 * (rng.random(n) < 0.05)
        walk: np.ndarray = np.cumsum(1e5 * rng.standard_normal(n)) + 5e4 * rng.standard_t(3, n) + burst
        return walk

    return noise


def test_flat_times_raise_no_more_alarms_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A/A with drift and bursts. 12 or more of 400 at 1 % happen by chance once in 700 such tests."""
    monkeypatch.setattr(length_scaling, "DRAWS", 499)
    rng = np.random.default_rng(7)
    alarms = 0
    for seed in range(400):
        found = slope(LENGTHS, in_random_order(rng, 4, 0.0, drifting(rng)), seed)
        assert found is not None
        alarms += found.p <= 0.01
    assert alarms < 12


def test_a_planted_slope_is_found_and_its_size_is_in_the_interval() -> None:
    rng = np.random.default_rng(3)
    missed = wrong = 0
    for seed in range(20):
        found = slope(LENGTHS, in_random_order(rng, 8, 400.0, drifting(rng)), seed)
        assert found is not None
        missed += found.flat
        wrong += not found.interval[0] <= 400 <= found.interval[1]
    assert missed <= 1
    assert wrong <= 1


def test_a_drift_alone_is_no_slope() -> None:
    """On a machine that slows down by half while it is measured."""
    rng = np.random.default_rng(5)
    found = slope(LENGTHS, in_random_order(rng, 8, 0.0, lambda n: np.linspace(0, 5e6, n)))
    assert found is not None
    assert found.flat


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 10), st.floats(-1e3, 1e3))
def test_units_and_a_known_slope_move_with_it(seed: int, unit: float, added: float) -> None:
    rng = np.random.default_rng(seed)
    times = in_random_order(rng, 4, 0.0, lambda n: 1e5 * rng.standard_normal(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_scaling, "DRAWS", 299)
        plain = slope(LENGTHS, times)
        moved = slope(LENGTHS, unit * (times + added * np.array(LENGTHS)))
    assert plain is not None
    assert moved is not None
    assert moved.ns == pytest.approx(unit * (plain.ns + added), abs=1e-3)
    assert moved.interval == pytest.approx([unit * (end + added) for end in plain.interval], rel=1e-3, abs=1.0)
    assert moved.interval[0] <= moved.ns <= moved.interval[1]


def test_exactly_flat_and_too_little_to_tell() -> None:
    still = slope(LENGTHS, np.full((4, 6), 1e7))
    assert still is not None
    assert (still.ns, still.flat, still.p) == (0, True, 1)
    assert slope(LENGTHS, np.full((2, 6), 1e7)) is None
    assert slope((64, 128), np.full((9, 2), 1e7)) is None
    with pytest.raises(ValueError, match="finite"):
        slope(LENGTHS, np.full((4, 6), np.nan))


def row(length: int, taken: Sequence[tuple[int, float]], out: Sequence[int] = (), **fields: Any) -> Row:
    """A decode row whose blocks were taken at those moments, with milliseconds of a step."""
    blocks = tuple(
        {"start": i, "count": 1, "time": f"2026-01-01T00:00:{at:02}", **({"left_out": True} if at in out else {})}
        for i, (at, _) in enumerate(taken)
    )
    return Row(
        **{
            "kind": "measured",
            "run": "r",
            "time": "t",
            "hardware": "cpu",
            "backend": "torch",
            "model": "tiny",
            "scheme": "fp32",
            "metric": "decode",
            "value": 1.0,
            "verdict": "PASS",
            "workload": Workload(length, 4),
            "driver": "loop",
            "samples": tuple(4e6 * ms for _, ms in taken),
            "blocks": blocks,
            **fields,
        }
    )


def test_rounds_are_found_by_time_and_a_round_and_its_reverse_are_one() -> None:
    """A B C C B A, then B A C alone, then a round in which one was left out."""
    a = row(64, [(0, 1.0), (5, 2.0), (7, 3.0), (10, 9.0)])
    b = row(128, [(1, 10.0), (4, 20.0), (6, 30.0), (9, 9.0)])
    c = row(256, [(2, 100.0), (3, 200.0), (8, 300.0), (11, 9.0)], out=[11])
    times = in_rounds([a, b, c])
    np.testing.assert_allclose(times, [[1.5e6, 15e6, 150e6], [3e6, 30e6, 300e6]])


def test_blocks_one_cell_after_the_other_are_no_rounds() -> None:
    rows = [row(n, [(10 * i + j, 1.0) for j in range(6)]) for i, n in enumerate((64, 128, 256))]
    assert in_rounds(rows).shape == (0, 3)
    (found,) = length_rows(rows)
    assert (found.value, found.verdict) == (None, "UNSUPPORTED")
    assert "random orders" in str(found.reason)


def measured(per_token: float) -> list[Row]:
    rng = np.random.default_rng(0)
    taken: dict[int, list[tuple[int, float]]] = {n: [] for n in (64, 512, 2048)}
    for at in range(6):
        for i, n in enumerate(rng.permutation(list(taken))):
            taken[int(n)].append((3 * at + i, 10 + per_token * n + 0.001 * rng.standard_normal()))
    return [row(n, times) for n, times in taken.items()]


def test_a_slope_is_a_row_that_says_so() -> None:
    (found,) = length_rows(measured(1e-3))
    assert (found.metric, found.unit, found.verdict) == (METRIC, "ns/token", "PASS")
    assert found.value == pytest.approx(1000, rel=0.02)
    assert found.extra["length_scaling"]["flat"] is False
    assert str(found.reason).startswith("longer: +1000 ns a step per token of context, 99 % interval +")
    (flat,) = length_rows(measured(0))
    assert str(flat.reason).startswith("flat: ")
    assert json.loads(json.dumps(flat.to_dict()))["metric"] == METRIC


def test_a_slope_of_points_of_two_runs_is_none_and_says_so() -> None:
    rows = measured(1e-3)
    (found,) = length_rows([rows[0], rows[1], replace(rows[2], run="later", time="u")])
    assert (found.value, found.verdict, found.reason) == (None, "UNSUPPORTED", "slope: points are of 2 runs")
    assert (found.run, found.time, found.session) == ("later", "u", None)
    text = formatted([rows[0], rows[1], replace(rows[2], run="later"), found], "table", 80)
    (line,) = [line for line in text.splitlines() if line.startswith("torch")]
    assert len(line.split()) >= 6  # one line, and a speed in each of its three columns
    assert text.count("points are of 2 runs") == 1
    assert "UNSUPPORTED" not in text


def back_and_forth(repeats: int, **fields: Any) -> list[Row]:
    """Three lengths in rounds, each second one the reverse of the first."""
    order = [(j, i if j % 2 else 2 - i) for i in range(3) for j in range(repeats)]
    lengths = {n: order[i * repeats : (i + 1) * repeats] for i, n in enumerate((8, 16, 32))}
    return [row(n, [(3 * j + at, 1.0) for j, at in taken], **fields) for n, taken in lengths.items()]


def test_too_few_repeats_for_a_slope_are_one_line_and_no_verdict() -> None:
    rows = [*back_and_forth(4, backend="a"), *back_and_forth(4, backend="b")]
    text = formatted([*rows, *length_rows(rows)], "table", 80)
    assert text.count("slope needs at least 5 repeats") == 1
    assert "UNSUPPORTED" not in text
    assert length_rows(back_and_forth(5))[0].value == 0


def test_cells_that_differ_in_more_than_length_are_not_mixed() -> None:
    rows = measured(0)
    assert length_rows([rows[0], replace(rows[1], backend="numpy"), replace(rows[2], threads=4)]) == []
    assert length_rows(rows[:2]) == []
    assert length_rows([replace(r, verdict="FAIL", value=None, reason="wrong") for r in rows]) == []


def test_a_sweep_is_a_table_with_a_column_per_point(bench: Callable[..., Done], small: str) -> None:
    options = ("--model", small, "--backend", "numpy", "--quant", "fp32", "--decode-tokens", "4", "--repeats", "3")
    done = bench(*options, "--sweep", "prompt=8..32", "--format", "json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    lengths = [row["workload"]["prompt_tokens"] for row in rows if row["metric"] == "decode"]
    assert lengths == [8, 16, 32]
    assert [row["metric"] for row in rows if row["metric"] == METRIC] == [METRIC]
    text = formatted([Row.from_dict(row) for row in rows], "table", 80)
    header = next(line for line in text.splitlines() if line.startswith("backend"))
    assert header.split() == ["backend", "scheme", "tok/s", "prompt", "8", "16", "32"]
    assert "sweep over prompt" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_sweep_leaves_its_slope_in_the_store_for_report_and_resume(
    bench: Callable[..., Done], small: str, state: Path
) -> None:
    store = state / "rows.jsonl"
    work = ("--model", small, "--backend", "numpy", "--quant", "fp32", "--decode-tokens", "2", "--repeats", "5")
    first = bench(*work, "--sweep", "prompt=8..32", "--format", "json")
    (shown,) = [r for r in json.loads(first.out)["rows"] if r["metric"] == METRIC]
    (stored,) = [r.to_dict() for r in read(store) if r.metric == METRIC]
    assert {**shown, "schema": None} == {**stored, "schema": None}
    assert f"{len(read(store))} rows added" in first.err
    assert " ".join(shown["reason"].split()[:4]) in bench("report").out
    again = bench(*work, "--sweep", "prompt=8..32", "--resume", "--format", "json")
    assert [r["reason"] for r in json.loads(again.out)["rows"] if r["metric"] == METRIC] == [shown["reason"]]
    assert sum(r.metric == METRIC for r in read(store)) == 1
    more = bench(*work, "--sweep", "prompt=8..64", "--resume")
    assert "slope: points are of 2 runs" in more.out
    assert [r.reason for r in read(store) if r.metric == METRIC][1:] == ["slope: points are of 2 runs"]


def test_a_failing_cell_shows_its_verdict_in_the_sweep() -> None:
    rows = [
        replace(r, verdict="FAIL", value=None, interval=None, reason="wrong") if i == 1 else r
        for i, r in enumerate(measured(0))
    ]
    line = next(line for line in formatted(rows, "table").splitlines() if line.startswith("torch"))
    assert "FAIL" in line


def test_a_bad_sweep_is_2(bench: Callable[..., Done]) -> None:
    done = bench("--sweep", "prompt=9")
    assert done.code == 2
    assert "--sweep" in done.err
