"""What becomes of the turns of a cell: warm-up cut off, disturbed blocks left out, and when there are enough."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from harness.blocks import Blocks, Kept, narrow
from harness.rows import Row
from harness.samples import NonFinite, Sampling, Taken, Workload
from harness.stats import LOOKS, block_medians, derived, disturbed, interval_of_looks

QUIET = {"seconds": 1.0, "cpu_s": 2.0, "others_s": 0.0, "waited_s": 0.0}
BUSY = {**QUIET, "others_s": 1.0}


def blocks(
    times: Sequence[Sequence[int]], sampling: Sampling, noisy: Sequence[int] = (), fresh: bool = False
) -> Blocks:
    """Turns with these samples, of one step each; ``noisy`` are those that were disturbed."""
    found = Blocks(sampling)
    for i, ns in enumerate(times):
        taken = Taken(tuple(ns), steps=tuple((n,) for n in ns), noise=BUSY if i in noisy else QUIET)
        found.add(taken, i if fresh else 0)
    return found


def row_of(kept: Kept) -> Row:
    return derived(
        Row(
            kind="measured",
            run="r",
            time="2024-01-01T00:00:00+00:00",
            hardware="cpu",
            backend="b",
            model="m",
            scheme="s",
            metric="decode",
            workload=Workload(1, 1),
            samples=kept.ns,
            steps=kept.steps,
            blocks=kept.blocks,
            verdict="PASS",
        )
    )


def test_disturbed_blocks_keep_their_samples_and_lose_their_say() -> None:
    kept = Kept.of(blocks([[100], [900], [102], [101]], Sampling(4), noisy=[1]))
    row = row_of(kept)
    assert list(row.samples or ()) == [100, 900, 102, 101]
    assert block_medians(row) == list(kept.times) == [100.0, 102.0, 101.0]
    assert row.value == pytest.approx(1e9 / 101)
    assert (row.percentiles or {})["p99"] < 103e-9
    assert disturbed(row) == (1, 1)


def test_all_disturbed_is_said_and_all_count() -> None:
    row = row_of(Kept.of(blocks([[100], [900], [102]], Sampling(3), noisy=[0, 1, 2])))
    assert disturbed(row) == (3, 0)
    assert row.value == pytest.approx(1e9 / 102)


def test_a_block_counts_once_however_many_samples_it_has() -> None:
    """Seven blocks of ten equal samples are seven measurements, not seventy."""
    row = row_of(Kept.of(blocks([[100 + i] * 10 for i in (3, 1, 2, 5, 4, 6, 7)], Sampling(7), fresh=True)))
    assert len(row.samples or ()) == 70
    assert row.interval == pytest.approx((1e9 / 107, 1e9 / 101))
    short = row_of(Kept.of(blocks([[100 + i] * 10 for i in range(5)], Sampling(5), fresh=True)))
    assert short.interval is None


def test_warm_up_is_cut_off_and_kept_apart() -> None:
    rng = random.Random(1)
    times = [[3000 + rng.randrange(50)] for _ in range(3)] + [[1000 + rng.randrange(50)] for _ in range(17)]
    kept = Kept.of(blocks(times, Sampling(20)))
    assert kept.warmup_ns[:3] == tuple(t[0] for t in times[:3])
    assert len(kept.warmup_ns) + len(kept.ns) == 20
    assert max(kept.ns) < 2000
    assert [block["start"] for block in kept.blocks] == list(range(len(kept.ns)))


def test_of_several_processes_each_loses_its_first_samples() -> None:
    rng = random.Random(2)
    found = Blocks(Sampling(6, fresh=True))
    for process in range(6):
        times = (5000 + rng.randrange(9), *(1000 + rng.randrange(9) for _ in range(4)))
        found.add(Taken(times, noise=QUIET), process)
    kept = Kept.of(found)
    assert [block["count"] for block in kept.blocks] == [4] * 6
    assert len(kept.warmup_ns) == 6


def test_so_many_as_asked() -> None:
    sampling = Sampling(3, again=0)
    assert [blocks([[1]] * n, sampling).stopped() for n in (0, 2, 3)] == [None, None, "repeats reached"]


def test_disturbed_blocks_are_taken_again_a_few_times() -> None:
    sampling = Sampling(4, again=2)
    assert blocks([[1]] * 4, sampling).stopped() == "repeats reached"
    assert blocks([[1]] * 4, sampling, noisy=[0]).stopped() is None
    assert blocks([[1]] * 5, sampling, noisy=[0]).stopped() == "repeats reached"
    assert blocks([[1]] * 6, sampling, noisy=[0, 1, 2]).stopped() == "repeats reached"
    assert blocks([[1]] * 4, sampling, noisy=[0, 1, 2, 3]).stopped() == "repeats reached"  # it would be of no use


def test_the_time_budget_ends_it_but_not_before_an_interval_is_possible() -> None:
    sampling = Sampling(100, budget_s=5, minimum=6)
    for count, spent, stopped in ((6, 4.9, None), (6, 5.0, "time budget"), (5, 99, None)):
        found = blocks([[1]] * count, sampling)
        found.spent_s = spent
        assert found.stopped() == stopped


def test_precision_ends_it_as_soon_as_a_look_shows_it() -> None:
    rng = random.Random(3)
    times = [[100_000 + rng.randrange(-1000, 1000)] for _ in range(200)]
    sampling = Sampling(10_000, precision=0.02, minimum=6)
    found = next(n for n in range(1, 200) if blocks(times[:n], sampling).stopped())
    assert blocks(times[:found], sampling).stopped() == "precision reached"
    assert found >= LOOKS[0]
    assert narrow(Kept.of(blocks(times[:found], sampling)).times, 0.02)
    tight = Sampling(10_000, precision=0.0001, minimum=6)
    assert blocks(times, tight).stopped() is None
    given_up = blocks(times, tight)
    given_up.sampling = Sampling(10_000, precision=0.0001, minimum=6, budget_s=1)
    given_up.spent_s = 2
    assert given_up.stopped() == "time budget"


def test_a_logit_that_is_no_number_ends_it_at_once() -> None:
    found = Blocks(Sampling(10, minimum=6))
    found.add(Taken((1,), non_finite_at=NonFinite("sample", 0, 0, 1, "nan")), 0)
    assert found.stopped() is not None
    assert found.non_finite_at is not None


def test_narrow_is_narrow_in_the_unit_that_is_shown() -> None:
    """Times from 1 to 1.4 around 1.2 are within 17 % of it; their rates reach 20 % above."""
    times = [1.0] * 6 + [1.2] * 6 + [1.4] * 6
    assert interval_of_looks(times) == (1.0, 1.4)
    assert not narrow(times, 0.18)
    assert narrow(times, 0.21)
