"""Which CPUs: what can be written, what is refused, and that a child with all its threads is really there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.isolation import placement
from harness.isolation.placement import BadPlacement, Placement, as_ranges, parse, usable
from harness.session import Apart, open_session
from suites.selftest.conftest import Done

Bench = Callable[..., Done]
USABLE = sorted(os.sched_getaffinity(0))


@given(st.sets(st.integers(0, 65535), min_size=1, max_size=40))
def test_ranges_round_trip(cpus: set[int]) -> None:
    text = as_ranges(sorted(cpus))
    assert parse(text) == Placement(tuple(sorted(cpus)))
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", (0,)), ("0-3,6", (0, 1, 2, 3, 6)), ("6,0-1", (0, 1, 6)), ("1,1-2,2", (1, 2)), (" 0 , 2-3 ", (0, 2, 3))],
)
def test_lists_as_people_write_them(text: str, cpus: tuple[int, ...]) -> None:
    assert parse(text).cpus == cpus


@given(st.text(max_size=12))
def test_whatever_is_written_is_cpus_or_one_line(text: str) -> None:
    with suppress(BadPlacement):
        assert parse(text).cpus


@pytest.mark.parametrize(
    "text", ["", ",", "-1", "3-1", "0-", "a", "0.5", "1e3", "99999", "0-99999", "٣", "node:", "0x1"]
)
def test_what_is_no_cpu_is_named(text: str) -> None:
    with pytest.raises(BadPlacement, match="give numbers and ranges such as"):
        parse(text)


def test_a_node_that_is_not_there() -> None:
    with pytest.raises(BadPlacement, match="no such NUMA node"):
        usable(parse("node:4095"))


def test_a_node_has_its_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("2-3,8\n")
    monkeypatch.setattr(placement, "_NODE_CPUS", f"{tmp_path}/node{{}}/cpulist")
    assert parse("node:1") == Placement(None, 1)
    assert str(parse("node:1")) == "node:1"


def test_cpus_that_are_not_ours_are_refused() -> None:
    with pytest.raises(BadPlacement, match=rf"CPU 60000 is not to be had; usable are {as_ranges(USABLE)}"):
        usable(Placement((USABLE[0], 60000)))


def test_a_system_without_affinity_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    with pytest.raises(BadPlacement, match="this system cannot bind"):
        usable(Placement((0,)))


@pytest.mark.parametrize("cpu", USABLE[:2])
def test_the_child_and_every_thread_of_it_is_there(cpu: int, small: str) -> None:
    """Importing numpy has started BLAS's threads before the child is told where to run."""
    with open_session("numpy", small, "fp32", threads=2, apart=Apart(placement=Placement((cpu,)))) as opened:
        assert opened.cpus == str(cpu)
        opened.session.forward([1, 2, 3], None)
        tasks = Path(f"/proc/{opened.session._line.child.process.pid}/task")  # type: ignore[attr-defined]
        bound = {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks.iterdir()}
        assert bound == {frozenset({cpu})}
    assert sorted(os.sched_getaffinity(0)) == USABLE


def test_placement_is_in_the_rows(small: str, bench: Bench) -> None:
    cpus = as_ranges(USABLE[:1])
    done = bench(
        "parity", "--model", small, "--backend", "numpy", "--quant", "fp32", "--cpus", cpus, "--format", "json"
    )
    assert done.code == 0
    for row in json.loads(done.out)["rows"]:
        assert (row["cpus"], row["isolated"]) == (cpus, True)
        assert f"--cpus {cpus}" in row["command"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--cpus 99999", "'99999' is no CPU"),
        ("--cpus 60000", "CPU 60000 is not to be had"),
        ("--cpus node:4095", "no such NUMA node"),
        ("--cpus 0;rm", "is no CPU"),
        ("--timeout nan", "'nan' is not a number"),
        ("--timeout 0", "'0' is not a number"),
        ("--timeout -1", "'-1' is not a number from 0.1"),
        ("--timeout inf", "'inf' is not a number"),
        ("--in-process --timeout 3", "--timeout needs a process of its own for each cell; leave out --in-process"),
        ("--in-process --cpus 0", "--cpus needs a process of its own"),
        ("--in-process --isolate", "not allowed with"),
    ],
)
def test_what_cannot_be_is_one_line_and_2(argv: str, words: str, bench: Bench) -> None:
    done = bench("parity", *argv.split())
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err
