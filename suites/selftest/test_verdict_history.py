"""Change-points: found where planted, seldom where there is none, and never where there are too few runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.verdict.history import FEWEST, changes, histories
from suites.selftest.test_compare_command import CELLS, row


def series(levels: list[tuple[int, float]], spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([level * np.exp(rng.normal(0, spread, n)) for n, level in levels])


def test_a_change_is_found_where_it_is() -> None:
    (found,) = changes(series([(14, 100.0), (14, 94.0)], 0.01).tolist(), 0.01 / 40)
    assert abs(found.at - 14) <= 1
    assert found.ratio == pytest.approx(0.94, abs=0.01)
    assert found.p < 0.01 / 40


def test_several_changes() -> None:
    found = changes(series([(20, 100.0), (20, 110.0), (20, 90.0)], 0.01).tolist(), 0.01 / 10)
    assert [round(change.at, -1) for change in found] == [20, 40]


def test_no_change_is_seldom_one() -> None:
    alarms = [bool(changes(series([(30, 50.0)], 0.03, seed).tolist(), 0.05)) for seed in range(300)]
    assert sum(alarms) <= 18  # 15 expected at most; the share of the first test is half of that


@given(st.lists(st.floats(0.5, 2.0), max_size=2 * FEWEST - 1))
@settings(max_examples=20, deadline=None)
def test_too_few_runs_have_no_change(values: list[float]) -> None:
    assert changes(values, 1.0) == []


def test_a_constant_series_has_no_change() -> None:
    assert changes([5.0] * 40, 0.5) == []


def test_histories_of_rows() -> None:
    times = series([(15, 0.06e9), (15, 0.066e9)], 0.005)
    rows = [row(CELLS[0], run, "decode", samples=(float(t),), verdict="PASS") for run, t in enumerate(times)]
    (found,) = histories(rows[::-1])
    assert found.runs == tuple(f"run{i}" for i in range(30))
    assert found.values[0] == pytest.approx(64e9 / times[0])
    assert found.unit == "tok/s"
    (change,) = found.changes
    assert change.at == 15
    assert change.ratio == pytest.approx(1 / 1.1, abs=0.01)
    assert len(set(found.levels)) == 2
