"""Which cells are loaded together and in which order they take turns."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harness.run
from harness.cell_rows import Job
from harness.hardware import Hardware
from harness.measure import Workload
from harness.plan import Cell, Request, plan
from harness.rows import Row
from harness.samples import Sampling
from harness.schedule import groups, passes, rounds

CPU, GPU, BOX = Hardware("cpu", "cpu", ""), Hardware("h200", "cuda:0", ""), Hardware("box", "cpu", "", host="box")


def cell(scheme: str, model: str = "tiny", hardware: Hardware = CPU, threads: int = 1, backend: str = "numpy") -> Cell:
    return Cell(model, backend, scheme, hardware, threads, Workload(8, 8))


def together(cells: list[Cell], free: int = 1000, need: int = 1) -> list[list[str]]:
    found = groups(cells, lambda cell: need, free, lambda cell: cell.backend == "tvm")
    return [[cell.scheme for cell in group] for group in found]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(50, 400))
def test_every_cell_is_in_one_group_in_its_order_and_fits_or_is_alone(needs: list[int], free: int) -> None:
    cells = [cell(f"s{i}") for i in range(len(needs))]
    need = dict(zip(cells, needs, strict=True))
    found = groups(cells, need.__getitem__, free, lambda cell: False)
    assert [one for group in found for one in group] == cells
    for group in found:
        assert len(group) == 1 or sum(need[one] for one in group) <= 0.7 * free


def test_what_memory_does_not_hold_together_is_apart() -> None:
    cells = [cell(name) for name in "abcde"]
    assert together(cells, free=1000, need=300) == [["a", "b"], ["c", "d"], ["e"]]
    assert together(cells, free=100, need=300) == [["a"], ["b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([cell("a"), cell("b", model="169m")], [["a"], ["b"]]),
        ([cell("a"), cell("b", threads=2)], [["a"], ["b"]]),
        ([cell("a"), cell("b", threads=2, backend="tvm")], [["a", "b"]]),
        ([cell("a"), cell("b", threads=2, backend="tvm"), cell("c", threads=3)], [["a", "b"], ["c"]]),
        ([cell("a", hardware=GPU), cell("b", hardware=GPU)], [["a"], ["b"]]),
        ([cell("a"), cell("b", hardware=BOX)], [["a"], ["b"]]),
    ],
    ids=["models", "threads", "threads of a process of its own", "of three", "gpu", "host"],
)
def test_what_would_disturb_each_other_is_apart(cells: list[Cell], expected: list[list[str]]) -> None:
    assert together(cells) == expected


@given(st.integers(0, 100), st.integers(1, 9))
def test_rounds_come_in_pairs_that_mirror_each_other(seed: int, count: int) -> None:
    """So that each item's mean position is the same, and a drift linear in time is the same for all."""
    items = list(range(count))
    for first, second in zip(*[islice(rounds(items, seed), 8)] * 2, strict=True):
        assert sorted(first) == items
        assert second == first[::-1]
    assert list(islice(rounds(items, seed), 4)) == list(islice(rounds(items, seed), 4))


def test_orders_differ_from_pair_to_pair_and_seed_to_seed() -> None:
    items = list(range(8))
    assert len({tuple(order) for order in islice(rounds(items, 1), 0, 20, 2)}) == 10
    assert next(rounds(items, 1)) != next(rounds(items, 2))


@pytest.mark.parametrize(("worth", "loads"), [(1e9, ["fp32", "fp16", "fp16", "fp32"]), (-1.0, ["fp32", "fp16"])])
def test_a_group_is_loaded_again_for_half_its_turns_where_that_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, worth: float, loads: list[str]
) -> None:
    monkeypatch.setattr(harness.run, "RELOAD_SECONDS", worth)
    monkeypatch.setattr(harness.run, "available_bytes", lambda: 1)  # so that every cell is a group
    request = Request(backends=("numpy",), schemes=("fp32", "fp16"), workload=Workload(16, 4))
    rows: list[Row] = []
    told: list[str] = []

    def tell(cell: Cell, doing: str) -> None:
        if doing == "loading":
            told.append(cell.scheme)

    harness.run.run(plan(request), Job(request, Sampling(repeats=4), "r"), lambda row, named: rows.append(row), tell)
    assert told == loads
    assert [len(row.samples or ()) for row in rows if row.metric == "decode"] == [4, 4]


def test_groups_are_visited_there_and_back() -> None:
    assert list(islice(passes(["a", "b", "c"]), 3)) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
