"""``rwkv-bench compare``: answers on planted files, exit status, formats, what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xmlschema

from harness.rows import Row
from harness.samples import Workload
from harness.store import append
from reports.verdict import exact
from reports.verdict.blocks import read_rows
from reports.verdict.comparison import names_of
from reports.verdict.decision import Rules
from reports.verdict.power import SPARE
from suites.selftest.conftest import Done

Bench = Callable[..., Done]

CELLS = (("numpy", "fp32"), ("torch", "fp16"), ("torch", "bf16"))
SECONDS = {"prefill": 0.25, "decode": 0.06}
XSD = Path(__file__).with_name("junit.xsd")


def row(cell: tuple[str, str], run: int, metric: str, **more: Any) -> Row:
    return Row(
        kind="measured",
        run=f"run{run}",
        time=f"2026-01-{2 + run // 24:02d}T{run % 24:02d}:00:00+00:00",
        hardware="cpu",
        device="cpu",
        model="tiny",
        threads=1,
        workload=Workload(256, 64),
        backend=cell[0],
        scheme=cell[1],
        metric=metric,
        **more,
    )


def file(
    path: Path,
    seed: int,
    slower: Mapping[tuple[tuple[str, str], str], float] | None = None,
    failing: Sequence[tuple[str, str]] = (),
    cells: Sequence[tuple[str, str]] = CELLS,
    runs: int = 14,
    spread: float = 0.01,
) -> str:
    """A result file of as many runs, each a block; ``slower``: what part of its speed a cell has lost."""
    rng = np.random.default_rng(seed)
    for run in range(runs):
        for cell in cells:
            if cell in failing:
                append(path, row(cell, run, "parity", verdict="FAIL", error=1.0, bound=0.1, reason="token 3 is off"))
                continue
            append(path, row(cell, run, "parity", verdict="PASS", error=0.05, bound=0.1))
            for metric, seconds in SECONDS.items():
                block = 1e9 * seconds * np.exp(rng.normal(0, spread)) / (1 - (slower or {}).get((cell, metric), 0.0))
                samples = tuple(float(ns) for ns in block * np.exp(rng.normal(0, 0.003, 5)))
                append(path, row(cell, run, metric, verdict="PASS", samples=samples, stopped="repeats reached"))
    return str(path)


def found(done: Done) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(it["backend"], it["scheme"], it["metric"]): it for it in json.loads(done.out)["cells"]}


def test_no_difference_is_no_alarm(bench: Bench, tmp_path: Path) -> None:
    done = bench("compare", file(tmp_path / "a.jsonl", 1), file(tmp_path / "b.jsonl", 2))
    assert done.code == 0
    assert done.out.startswith("no regression: 6 of 6 no slower\n")
    assert "stored files cannot be paired" in done.out


def test_what_got_slower_is_named_first(bench: Bench, tmp_path: Path) -> None:
    base = file(tmp_path / "a.jsonl", 1)
    head = file(tmp_path / "b.jsonl", 2, {(CELLS[1], "decode"): 0.06, (CELLS[0], "prefill"): -0.06})
    done = bench("compare", base, head, "--format", "json")
    assert done.code == 1
    assert done.err == ("rwkv-bench: REGRESSION: 1 of 6 slower than the margin of 1 % allows, 1 faster\n")
    answers = found(done)
    slow = answers["torch", "fp16", "decode"]
    assert slow["decision"] == "SLOWER"
    assert slow["ratio"] == pytest.approx(0.94, abs=0.012)
    assert slow["interval"][0] < slow["ratio"] < slow["interval"][1] < 0.99
    assert slow["base_value"] == pytest.approx(64 / 0.06, rel=0.02)
    assert 0.01 < slow["detectable"] < 0.06
    assert answers["numpy", "fp32", "prefill"]["decision"] == "FASTER"
    assert {it["decision"] for it in answers.values()} == {"SLOWER", "FASTER", "NO SLOWER"}
    allowed = bench("compare", base, head, "--margin", "10%", "--effect", "20%")
    assert allowed.code == 0


def test_too_few_runs_are_undecided_and_say_how_many(bench: Bench, tmp_path: Path) -> None:
    files = [file(tmp_path / f"{seed}.jsonl", seed, runs=3) for seed in (1, 2)]
    done = bench("compare", *files)
    assert done.code == 0
    assert done.out.startswith("UNDECIDED: up to ")
    assert "more runs of each side would tell" in done.out
    assert bench("compare", *files, "--strict").code == 1
    more = found(bench("compare", *files, "--format", "json"))["numpy", "fp32", "decode"]
    assert more["decision"] == "UNDECIDED"
    assert more["needed"] > 3


def test_a_cell_that_fails_parity_is_a_regression_and_has_no_speed(bench: Bench, tmp_path: Path) -> None:
    base = file(tmp_path / "a.jsonl", 1)
    head = file(tmp_path / "b.jsonl", 2, failing=[CELLS[2]])
    done = bench("compare", base, head)
    assert done.code == 1
    assert "1 fails that ran right before" in done.out
    assert "PASS → FAIL" in done.out
    assert "token 3 is off" in done.out
    told = json.loads(bench("compare", base, head, "--format", "json").out)
    assert [it["regression"] for it in told["parity"]] == [False, False, True]
    assert told["missing"] == []
    mended = bench("compare", head, base)
    assert mended.code == 0
    both = bench("compare", head, file(tmp_path / "c.jsonl", 3, failing=[CELLS[2]]))
    assert both.code == 0


def test_missing_and_added_cells_are_named(bench: Bench, tmp_path: Path) -> None:
    base = file(tmp_path / "a.jsonl", 1, cells=CELLS[:2])
    head = file(tmp_path / "b.jsonl", 2, cells=CELLS[1:])
    done = bench("compare", base, head)
    assert done.code == 0
    assert "2 missing" in done.out.splitlines()[0]
    assert f"missing in {head}: numpy fp32 tiny cpu, 1 threads, 256+64 tokens: decode" in done.out
    assert f"only in {head}: torch bf16" in done.out
    assert bench("compare", base, head, "--strict").code == 1


def test_a_cell_in_a_process_of_its_own_is_told_from_one_that_is_not(bench: Bench, tmp_path: Path) -> None:
    def both(path: Path, seed: int) -> str:
        rng = np.random.default_rng(seed)
        for run, own in itertools.product(range(14), (True, False)):
            samples = tuple(6e7 * np.exp(rng.normal(0, 0.01)) * np.exp(rng.normal(0, 0.003, 5)))
            append(path, row(CELLS[0], run, "decode", verdict="PASS", samples=samples, isolated=own))
        return str(path)

    done = bench("compare", both(tmp_path / "a.jsonl", 1), both(tmp_path / "b.jsonl", 2), "--format", "json")
    assert [it["process"] for it in json.loads(done.out)["cells"]] == ["own", ""]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(bench: Bench, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no folder" / "verdict.md")
    done = bench("compare", "neither", "exists", "--output", nowhere)
    assert done.code == 2
    assert "no folder" in done.err
    assert "neither" not in done.err


def test_markdown_has_the_conclusion_first(bench: Bench, tmp_path: Path) -> None:
    base = file(tmp_path / "a.jsonl", 1)
    head = file(tmp_path / "b.jsonl", 2, {(CELLS[1], "decode"): 0.06})
    also = str(tmp_path / "verdict.xml")
    done = bench("compare", base, head, "--output", str(tmp_path / "verdict.md"), "--also", also)
    xmlschema.XMLSchema(XSD).validate(also)
    lines = (tmp_path / "verdict.md").read_text().splitlines()
    assert lines[0] == "❌ **REGRESSION: 1 of 6 slower than the margin of 1 % allows**"
    table = [line for line in lines if line.startswith("|")]
    assert {line.count(" | ") for line in table} == {table[0].count(" | ")}
    assert "❌ SLOWER" in table[2]
    assert done.code == 1


def test_junit_is_valid_and_counts(bench: Bench, tmp_path: Path) -> None:
    base = file(tmp_path / "a.jsonl", 1)
    head = file(tmp_path / "b.jsonl", 2, {(CELLS[1], "decode"): 0.06}, failing=[CELLS[0]], runs=5)
    done = bench("compare", base, head, "--output", str(tmp_path / "verdict.xml"))
    assert done.code == 1
    xmlschema.XMLSchema(XSD).validate(tmp_path / "verdict.xml")
    told: Any = xmlschema.XMLSchema(XSD).to_dict(tmp_path / "verdict.xml")
    suite = told["testsuite"][0]
    failed = [(case["@classname"], case["@name"]) for case in suite["testcase"] if "failure" in case]
    assert suite["@failures"] == len(failed)
    assert any("numpy.fp32" in of and name == "parity" for of, name in failed)
    strict = bench("compare", base, head, "--format", "junit", "--strict")
    assert strict.out.count("<failure") >= len(failed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "two result files are needed"),
        (("a.jsonl",), "two result files are needed"),
        (("a.jsonl", "a.jsonl"), "are the same file"),
        (("a.jsonl", "nowhere.jsonl"), "no such file"),
        (("a.jsonl", "empty.jsonl"), "has no measured rows"),
        (("a.jsonl", "b.jsonl", "--margin", "5%"), "is not below --effect"),
        (("a.jsonl", "b.jsonl", "--margin", "lots"), "is not a part"),
        (("a.jsonl", "b.jsonl", "--metric", "decod"), "did you mean 'decode'"),
        (("a.jsonl", "b.jsonl", "--also", "x.foo"), "does not end in .md, .xml, .json"),
        (("a.jsonl", "nowhere.jsonl", "--also", "no folder/x.md"), "cannot write no folder/x.md"),
        (("a.jsonl", "--self-test"), "takes no files"),
        (("--self-test", "--seconds", "0"), "--seconds is 0"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        file(tmp_path / name, 1, runs=1)
    (tmp_path / "empty.jsonl").write_text("")
    done = bench("compare", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_blocks_of_a_row_count_and_disturbed_ones_do_not() -> None:
    samples = tuple(float(i + 1) for i in range(9))
    gone: dict[str, Any] = {"start": 3, "count": 3, "disturbed": "others took 12 %", "left_out": True}
    spans = [{"start": 0, "count": 3}, gone, {"start": 6, "count": 3}]
    own = row(CELLS[0], 1, "decode", samples=samples, verdict="PASS", sampling={"fresh": True})
    told = read_rows([Row.from_dict({**own.to_dict(), "blocks": spans})])
    (series,) = told.series.values()
    np.testing.assert_allclose(np.exp(series.times), [6 ** (1 / 3), 504 ** (1 / 3)])
    assert series.left_out == 1
    kept = [{**span, "left_out": False} for span in spans]
    (series,) = read_rows([Row.from_dict({**own.to_dict(), "blocks": kept})]).series.values()
    np.testing.assert_allclose(np.exp(series.times), [6 ** (1 / 3), 120 ** (1 / 3), 504 ** (1 / 3)])


def test_a_row_without_blocks_is_one_block_and_copies_count_once() -> None:
    own = row(CELLS[0], 1, "decode", samples=(4.0, 1.0, 2.0), verdict="PASS")
    other = row(CELLS[0], 2, "decode", samples=(8.0,), verdict="PASS")
    told = read_rows([own, other, own])
    (series,) = told.series.values()
    np.testing.assert_allclose(np.exp(series.times), [2.0, 8.0])
    assert told.doubled == 1


def test_rows_that_were_not_measured_are_not_compared() -> None:
    own = row(CELLS[0], 1, "decode", samples=(4.0,), verdict="PASS")
    claimed = Row.from_dict({**own.to_dict(), "kind": "published", "verdict": None})
    assert not read_rows([claimed]).series


def blocked(
    run: int,
    level: float,
    rng: np.random.Generator,
    fresh: bool = False,
    blocks: int = 14,
    every: float = 2.0,
    **more: Any,
) -> list[Row]:
    """One run of one cell: a row with many quiet blocks, all of them ``level`` off, as one process may be; one block
    begins ``every`` so many seconds."""
    times = 6e7 * np.exp(level + rng.normal(0, 0.002, blocks))
    began = datetime(2026, 1, 2, run, tzinfo=timezone.utc)
    at = [(began + timedelta(seconds=every * i)).isoformat(timespec="milliseconds") for i in range(blocks)]
    spans = [{"start": i, "count": 1, "time": at[i], "seconds": 1.0, **more} for i in range(blocks)]
    asked = {"fresh": fresh, "repeats": blocks}
    timed = row(CELLS[0], run, "decode", verdict="PASS", samples=tuple(times.tolist()), blocks=spans, sampling=asked)
    return [row(CELLS[0], run, "parity", verdict="PASS", error=0.05, bound=0.1), timed]


def stored(path: Path, rows: Sequence[Row]) -> str:
    for each in rows:
        append(path, each)
    return str(path)


def test_one_run_a_side_gives_no_answer_however_many_blocks_it_has(bench: Bench, tmp_path: Path) -> None:
    """Base and head are the same code; their processes differ by 4 %, as processes do."""
    rng = np.random.default_rng(0)
    base, many = stored(tmp_path / "a.jsonl", blocked(0, 0.0, rng)), tmp_path / "c.jsonl"
    head = stored(tmp_path / "b.jsonl", blocked(1, 0.04, rng))
    done = bench("compare", base, head)
    assert done.code == 0
    least = exact.fewest(Rules().of_one(1)) + SPARE
    assert done.out.startswith(f"UNDECIDED: give {least} or more runs a side, 5 min or more apart, or use ab\n")
    assert "raise an alarm" not in done.out
    assert bench("compare", base, head, "--strict").code == 1
    (cell,) = found(bench("compare", base, head, "--format", "json")).values()
    assert (cell["decision"], cell["blocks"], cell["needed"]) == ("UNDECIDED", [1, 1], least)
    assert cell["ratio"] == pytest.approx(np.exp(-0.04), abs=0.005)
    stored(many, [each for run in range(20) for each in blocked(run, 0.04, rng)])
    assert "UNDECIDED" in bench("compare", base, str(many)).out


def test_no_difference_between_single_runs_never_raises_an_alarm(bench: Bench, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    files = [stored(tmp_path / f"{i}.jsonl", blocked(i, rng.normal(0, 0.03), rng)) for i in range(6)]
    codes = [bench("compare", a, b).code for a, b in itertools.combinations(files, 2)]
    assert codes == [0] * 15


def test_single_runs_still_show_what_is_wrong(bench: Bench, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = stored(tmp_path / "a.jsonl", blocked(0, 0.0, rng))
    head = stored(tmp_path / "b.jsonl", [row(CELLS[0], 1, "parity", verdict="FAIL", error=1.0, bound=0.1)])
    assert bench("compare", base, head).code == 1


def test_the_unit_is_the_run_or_a_process_of_its_own(bench: Bench, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    several = [each for run in range(8) for each in blocked(run, rng.normal(0, 0.01), rng)]
    (series,) = read_rows(several).series.values()
    assert series.times.shape == (8,)
    median = float(np.median(np.log(several[1].samples or ())))
    assert series.times[0] == pytest.approx(median)
    (series,) = read_rows(blocked(0, 0.0, rng, fresh=True)).series.values()
    assert series.times.shape == (14,)
    base = stored(tmp_path / "a.jsonl", blocked(0, 0.0, rng, fresh=True, every=302.0))
    slow = stored(tmp_path / "b.jsonl", blocked(0, 0.1, rng, fresh=True, every=302.0))
    assert "REGRESSION: 1 of 1 slower" in bench("compare", base, slow).out


@pytest.mark.parametrize("fresh", [True, False])
def test_runs_that_follow_each_other_are_one_sitting_and_decide_nothing(
    bench: Bench, tmp_path: Path, fresh: bool
) -> None:
    """What disturbed the machine for those minutes is in all of them: here 10 %, and the code is the same."""
    rng = np.random.default_rng(4)

    def sitting(name: str, hour: int, level: float) -> str:
        if fresh:
            return stored(tmp_path / name, blocked(hour, level, rng, fresh=True))
        runs = [blocked(hour, level + rng.normal(0, 0.005), rng) for _ in range(12)]
        spread = [
            replace(each, run=f"{hour}-{i}", time=f"2026-01-02T{hour:02d}:{i:02d}:10+00:00", blocks=None)
            for i, own in enumerate(runs)
            for each in own
        ]
        return stored(tmp_path / name, spread)

    base, head = sitting("a.jsonl", 3, 0.0), sitting("b.jsonl", 9, 0.1)
    done = bench("compare", base, head)
    assert done.code == 0
    assert done.out.startswith("UNDECIDED: give 7 or more runs a side, 5 min or more apart, or use ab\n")
    assert re.search(
        rf"{14 if fresh else 12}\s+runs\s+of\s+head\s+less\s+than\s+5\s+min\s+apart\s+count\s+as\s+1", done.out
    )
    (cell,) = found(bench("compare", base, head, "--format", "json")).values()
    assert (cell["decision"], cell["blocks"]) == ("UNDECIDED", [1, 1])


def test_a_time_that_is_none_is_refused(bench: Bench, tmp_path: Path) -> None:
    own = replace(row(CELLS[0], 1, "decode", samples=(4.0,), verdict="PASS"), time="yesterday")
    files = [stored(tmp_path / name, [own]) for name in ("a.jsonl", "b.jsonl")]
    done = bench("compare", *files)
    assert done.code == 2
    assert "a row's time is 'yesterday'" in done.err


def test_a_row_disturbed_throughout_counts_and_nothing_is_nan(bench: Bench, tmp_path: Path) -> None:
    """The row leaves nothing out where all of it was disturbed; one that does has no speed here."""
    rng = np.random.default_rng(2)
    base = stored(tmp_path / "a.jsonl", blocked(0, 0.0, rng, disturbed="others took 12 %"))
    head = stored(tmp_path / "b.jsonl", blocked(1, 0.0, rng))
    done = bench("compare", base, head)
    assert "nan" not in done.out
    assert "left out" not in done.out
    gone = stored(tmp_path / "c.jsonl", blocked(0, 0.0, rng, disturbed="others took 12 %", left_out=True))
    done = bench("compare", gone, head)
    assert done.code == 0
    assert "nan" not in done.out
    assert "all 14 blocks of base were disturbed" in done.out


@pytest.mark.parametrize("verdict", ["UNAVAILABLE", "UNSUPPORTED"])
def test_what_head_cannot_judge_any_more_is_missing(bench: Bench, tmp_path: Path, verdict: str) -> None:
    base = stored(tmp_path / "a.jsonl", [row(CELLS[0], 0, "parity", verdict="PASS", error=0.05, bound=0.1)])
    head = stored(tmp_path / "b.jsonl", [row(CELLS[0], 1, "parity", verdict=verdict, reason="not installed")])
    done = bench("compare", base, head)
    assert done.code == 0
    assert done.out.startswith("no regression of parity; no speed is in both, 1 missing\n")
    assert bench("compare", base, head, "--strict").code == 1


def test_batches_have_a_name_of_their_own() -> None:
    own = row(CELLS[0], 1, "decode", samples=(1.0,), verdict="PASS")
    assert names_of(own)["workload"] == "256+64"
    assert names_of(replace(own, workload=Workload(64, 16, 2)))["workload"] == "64+16×2"


def test_cells_that_are_too_noisy_are_counted(bench: Bench, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in ("a.jsonl", "b.jsonl"):
        for cell, spread in zip(CELLS[:2], (0.02, 3.0), strict=True):
            for run in range(4):
                time = 6e7 * float(np.exp(rng.normal(0, spread)))
                append(tmp_path / name, row(cell, run, "decode", verdict="PASS", samples=(time,)))
    said = bench("compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")).out.splitlines()[0]
    assert re.fullmatch(r"UNDECIDED: up to \d+ more runs of each side would tell; 1 of 2 is too noisy", said)
