"""``rwkv-bench ab``: pairs in random order, answers, what ends it early."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness.ab
import harness.ab_workers
import reports.ab_work
from harness.ab_checkouts import Side
from harness.ab_workers import Block, BlockFailed, BlockWrong
from harness.store import read
from reports.verdict.blocks import read_rows
from suites.selftest.ab_repository import SIDES, git
from suites.selftest.conftest import Done

Bench = Callable[..., Done]


class Machine:
    """Stands in for processes: block times with noise that lasts, head slower by ``slowdown``; a block takes 1 s."""

    def __init__(
        self, slowdown: float = 0.0, ends: int | None = None, broken: str | None = None, wrong: str | None = None
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.slowdown, self.ends, self.broken, self.wrong = slowdown, ends, broken, wrong
        self.right_for, self.crowded = 40, False
        self.asked: list[list[str]] = []
        self.calls: list[str] = []
        self.samples: list[int | None] = []
        self.level = 0.0
        self.clock = 0.0

    def monotonic(self) -> float:
        return self.clock

    def measure(self, asked: Sequence[tuple[Side, Mapping[str, Any]]]) -> list[Block | BlockFailed | None]:
        """Of the first that fails, and of none after it."""
        found: list[Block | BlockFailed | None] = [None] * len(asked)
        if len(asked) == 2 and self.crowded:
            self.clock += 1.0
            return [BlockFailed("killed by SIGKILL: no output"), None]
        for i, (side, spec) in enumerate(asked):
            try:
                found[i] = self.block(side, spec)
            except BlockFailed as error:
                found[i] = error
                break
        return found

    def block(self, side: Side, asked: Mapping[str, Any]) -> Block:
        self.calls.append(side.name)
        self.samples.append(asked["repeats"])
        self.clock += 1.0
        if self.ends is not None and len(self.calls) > self.ends:
            raise KeyboardInterrupt
        if self.broken in (side.name, "both"):
            raise BlockFailed("killed by SIGSEGV: no more words")
        if self.wrong == side.name and len(self.calls) > self.right_for:
            raise BlockWrong("prefill: logit 0 is nan at step 0 of sample 0")
        self.level = 0.9 * self.level + self.rng.normal(0, 0.05)  # drift far larger than the difference
        slow = 1 / (1 - self.slowdown) if side.name == "head" else 1.0
        ns = {
            metric: tuple(int(1e7 * slow * np.exp(self.level + self.rng.normal(0, 0.004))) for _ in range(3))
            for metric in asked["metrics"]
        }
        return Block(ns, dict.fromkeys(ns, "loop") | {"prefill": None}, "1.0")

    def parity(self, side: Side, words: list[str]) -> list[dict[str, Any]]:
        self.asked.append(list(words))
        return [{"scheme": "fp32", "verdict": "PASS", "reason": "worst position"}]


@pytest.fixture
def ab(bench: Bench, untouched: Path, small: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command in the repository, with a machine that is made up."""
    monkeypatch.chdir(untouched)

    def run(machine: Machine, *words: str) -> Done:
        monkeypatch.setattr(reports.ab_work, "measure", machine.measure)
        monkeypatch.setattr(reports.ab_work, "parity_rows", machine.parity)
        for module in (reports.ab_work, harness.ab):
            monkeypatch.setattr(module, "time", machine)
        common = ("--backend", "mine.py", "--model", small, "--threads", "1")
        return bench("ab", "--base", "HEAD~1", *common, "--seed", "3", *words)

    return run


def test_a_slowdown_far_below_the_drift_is_seen(ab: Callable[..., Done]) -> None:
    machine = Machine(slowdown=0.05)
    done = ab(machine, "--format", "json")
    told = json.loads(done.out)
    assert done.code == 1
    assert told["paired"] is True
    assert {it["decision"] for it in told["cells"]} == {"SLOWER"}
    assert all(it["ratio"] == pytest.approx(0.95, abs=0.03) for it in told["cells"])


def test_no_difference_is_answered_and_rows_are_kept(ab: Callable[..., Done], tmp_path: Path) -> None:
    done = ab(Machine(), "--store", str(tmp_path / "rows.jsonl"), "--effect", "20%", "--margin", "10%")
    assert done.code == 0
    assert "2 of 2 no slower" in done.out
    assert "pairs of blocks" in done.out
    rows = read(tmp_path / "rows.jsonl")
    assert {row.extra["ab"]["side"] for row in rows} == {"base", "head"}
    commits = {row.extra["ab"]["side"]: row.extra["revision"] for row in rows}
    assert commits == {side: git(Path(), "rev-parse", "--short=10", at).strip() for side, at in SIDES.items()}
    blocks = {len(series.times) for series in read_rows(rows[:2]).series.values()}
    assert len(blocks) == 1
    assert blocks.pop() >= 10


def test_a_fair_coin_says_who_is_first(ab: Callable[..., Done]) -> None:
    machine = Machine()
    ab(machine, "--effect", "20%", "--margin", "10%")
    firsts = machine.calls[::2]
    assert set(zip(firsts, machine.calls[1::2], strict=True)) == {("base", "head"), ("head", "base")}
    rng = random.Random(3)
    expected = []
    for _ in firsts:
        order = [0]
        rng.shuffle(order)
        expected.append("head" if rng.random() < 0.5 else "base")
    assert firsts == expected


def test_ctrl_c_shows_what_was_measured(ab: Callable[..., Done]) -> None:
    done = ab(Machine(slowdown=0.3, ends=61))
    assert done.code == 130 or "REGRESSION" in done.out
    early = ab(Machine(ends=7))
    assert early.code == 130
    assert "UNDECIDED" in early.out
    assert "interrupted" in early.err


def test_a_head_that_crashes_is_a_regression(ab: Callable[..., Done]) -> None:
    done = ab(Machine(broken="head"))
    assert done.code == 1
    assert "PASS → CRASHED" in done.out
    assert "SIGSEGV" in done.out
    base = ab(Machine(broken="base"))
    assert base.code == 4
    assert "cannot be measured in base" in base.out


def test_what_both_sides_fail_at_is_no_regression(ab: Callable[..., Done]) -> None:
    for seed in range(4):  # whichever is asked first
        done = ab(Machine(broken="both"), "--seed", str(seed))
        assert done.code == 4
        assert "cannot be measured in base" in done.out
        assert "cannot be measured in head" in done.out
        assert "REGRESSION" not in done.out


def test_what_fails_only_beside_the_other_is_measured_alone(ab: Callable[..., Done]) -> None:
    machine = Machine()
    machine.crowded = True
    done = ab(machine, "--effect", "20%", "--margin", "10%")
    assert done.code == 0
    assert "2 of 2 no slower" in done.out
    assert machine.samples[1::2] == [3] * len(machine.samples[::2])
    told = " ".join(done.out.split())
    assert "each side alone, one after the other, since beside the other" in told
    assert "killed by SIGKILL: no output" in told


def test_a_block_that_is_wrong_takes_the_speed_away(ab: Callable[..., Done], tmp_path: Path) -> None:
    """Also the one of a reading before, after 12 pairs."""
    store = tmp_path / "rows.jsonl"
    done = ab(Machine(wrong="head"), "--effect", "1.1%", "--store", str(store))
    assert done.code == 1
    assert "PASS → FAIL" in done.out
    assert "is wrong in head: prefill: logit 0 is nan" in done.out
    assert "tok/s" not in done.out
    rows = {(row.extra["ab"]["side"], row.metric): row for row in read(store)}
    assert {rows["head", metric].value for metric in ("prefill", "decode")} == {None}
    assert {rows["head", metric].verdict for metric in ("prefill", "decode")} == {"FAIL"}
    assert rows["base", "decode"].value is not None
    base = ab(Machine(wrong="base"), "--effect", "1.1%")
    assert "is wrong in base" in base.out
    assert "FAIL → PASS" in base.out


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_block_that_is_wrong_from_the_first_is_answered_too(
    ab: Callable[..., Done], tmp_path: Path, side: str
) -> None:
    store = tmp_path / "rows.jsonl"
    machine = Machine(wrong=side)
    machine.right_for = 0
    done = ab(machine, "--store", str(store))
    assert done.code == (1 if side == "head" else 4)
    assert f"is wrong in {side}: prefill: logit 0 is nan" in done.out
    assert {(row.extra["ab"]["side"], row.value, row.verdict) for row in read(store)} == {(side, None, "FAIL")}


def test_parity_is_asked_for_the_lengths_that_are_timed(ab: Callable[..., Done]) -> None:
    machine = Machine()
    ab(machine, "--prompt-tokens", "300", "--decode-tokens", "5", "--effect", "20%", "--margin", "10%")
    for words in machine.asked:
        assert words[words.index("--prompt-tokens") + 1] == "300"
        assert words[words.index("--decode-tokens") + 1] == "5"
    assert len(machine.asked) == 2


def test_a_head_that_is_wrong_is_not_timed(ab: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    bad = {"base": "PASS", "head": "FAIL"}
    monkeypatch.setattr(
        Machine, "parity", staticmethod(lambda side, words: [{"scheme": "fp32", "verdict": bad[side.name]}])
    )
    done = ab(machine)
    assert done.code == 1
    assert machine.calls == []
    assert "PASS → FAIL" in done.out


@pytest.mark.parametrize("verdict", ["UNAVAILABLE", "UNSUPPORTED"])
def test_what_head_has_lost_is_a_regression(
    ab: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    """Both sides ran on one machine: what base can be judged by is there."""
    said = {"base": {"verdict": "PASS"}, "head": {"verdict": verdict, "reason": "no kernel"}}
    monkeypatch.setattr(Machine, "parity", staticmethod(lambda side, words: [{"scheme": "fp32", **said[side.name]}]))
    done = ab(Machine(), "--minutes", "1")
    assert done.code == 1
    assert f"PASS → {verdict}" in done.out
    assert "no kernel" in done.out


def test_the_last_reading_waits_for_the_end_of_the_time(ab: Callable[..., Done]) -> None:
    """Three readings, after 12, 24 and 48 pairs, leave a small effect open; 421 pairs, when time is over, do not."""
    machine = Machine()
    machine.rng = np.random.default_rng(1)
    found = json.loads(ab(machine, "--minutes", "14", "--effect", "1.1%", "--format", "json").out)
    assert len(machine.calls) == 2 * 14 * 30 + 2  # the pair that began in time is finished
    assert {it["decision"] for it in found["cells"]} == {"NO SLOWER"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "mian"), "no revision 'mian'"),
        (("--base", "HEAD", "--minutes", "0"), "--minutes is 0"),
        (("--base", "HEAD", "--base-python", "python0"), "no interpreter python0"),
        (("--base", "HEAD", "--setup", "echo so it goes >&2; exit 3"), "status 3: so it goes"),
        (("--base", "mian", "--store", "no folder/rows.jsonl"), "no folder"),
        (("--base", "HEAD", "--hardware", "a800"), "both sides run on this machine"),
        ((), "--base"),
    ],
)
def test_what_cannot_be_is_told(
    bench: Bench, untouched: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(untouched)
    done = bench("ab", *words, "--backend", "numpy", "--quant", "fp32")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_of_it(bench: Bench, untouched: Path, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes, real parity: twice the work takes twice the time."""
    monkeypatch.chdir(untouched)
    done = bench(
        "ab", "--base", "HEAD~1", "--backend", "mine.py", "--model", small, "--threads", "1", "--format", "json"
    )
    told = json.loads(done.out)
    assert done.code == 1
    assert {(it["metric"], it["decision"]) for it in told["cells"]} == {("prefill", "SLOWER"), ("decode", "SLOWER")}
    assert all(0.3 < it["ratio"] < 0.8 for it in told["cells"])
    assert [it["head"] for it in told["parity"]] == ["PASS"]
