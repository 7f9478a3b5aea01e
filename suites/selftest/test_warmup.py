"""Warm-up found in the samples: its level without one, its power with one, and what it never does."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.warmup import warmup_length

TIMES = st.lists(st.floats(1, 1e9), max_size=40)


@given(st.lists(TIMES, max_size=4))
@settings(max_examples=40, deadline=None)
def test_never_more_than_half_of_the_shortest_process(processes: list[list[float]]) -> None:
    shortest = min((len(times) for times in processes if times), default=0)
    assert 0 <= warmup_length(processes) <= shortest // 2


@given(st.lists(st.integers(1, 10**6), min_size=12, max_size=30), st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_only_the_order_counts(times: list[int], scale: float) -> None:
    assert warmup_length([times]) == warmup_length([[scale * 7 * time for time in times]])


@pytest.mark.parametrize("n", [8, 12, 30])
def test_without_warm_up_samples_are_lost_no_more_often_than_the_level(n: int) -> None:
    """Exact for a permutation test; here within five standard errors of 5 % of 400 runs of skewed times."""
    rng = np.random.default_rng(n)
    lost = sum(warmup_length([rng.lognormal(0, 0.3, n).tolist()], seed=i) > 0 for i in range(400))
    assert lost / 400 <= 0.05 + 5 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize("factor", [1.5, 0.6], ids=["slower", "faster"])
def test_a_first_stretch_that_differs_is_cut_off(factor: float) -> None:
    rng = np.random.default_rng(1)
    cut = []
    for i in range(40):
        times = rng.lognormal(0, 0.03, 20)
        times[:4] *= factor
        cut.append(warmup_length([times.tolist()], seed=i))
    assert min(cut) == 4  # all of it, always
    assert sorted(cut)[20] <= 6  # and little else


def test_stages_of_warming_up_are_all_cut_off() -> None:
    rng = np.random.default_rng(2)
    times = np.concatenate([[9, 8.5, 9.2, 8.8], [3, 3.2, 2.9, 3.1, 3.05], rng.normal(1, 0.02, 20)])
    assert warmup_length([times.tolist()]) >= 9


def test_what_one_process_is_too_short_to_show_several_show_together() -> None:
    rng = random.Random(3)
    short = [[5.0 + rng.random(), *(1 + rng.random() for _ in range(4))] for _ in range(6)]
    assert warmup_length(short[:1]) == 0
    assert warmup_length(short) == 1


def test_no_order_of_six_samples_is_evidence() -> None:
    assert {warmup_length([order]) for order in itertools.permutations([1, 2, 3, 4, 5, 6])} == {0}


@pytest.mark.parametrize("times", [[], [1], [7] * 30])
def test_nothing_to_see(times: list[float]) -> None:
    assert warmup_length([times]) == 0
