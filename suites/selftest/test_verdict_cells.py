"""Which cells of two files are one, and the worst of their verdicts over all runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.store import append
from reports.verdict import parity
from suites.selftest.conftest import Done
from suites.selftest.test_compare_command import CELLS, row

Bench = Callable[..., Done]

MACHINES = ("AMD EPYC 7B13", "Intel Xeon 8370C")


def on(path: Path, seed: int, level: float = 0.0, verdict: str = "PASS", runs: int = 12, **more: Any) -> str:
    """Runs of one cell on one machine, or with one checkpoint."""
    rng = np.random.default_rng(seed)
    for run in range(runs):
        append(path, row(CELLS[0], run, "parity", verdict=verdict, reason="told", error=0.05, **more))
        if verdict == "PASS":
            samples = tuple(6e7 * np.exp(level + rng.normal(0, 0.003, 5)))
            append(path, row(CELLS[0], run, "decode", verdict="PASS", samples=samples, **more))
    return str(path)


@pytest.mark.parametrize(
    ("base", "head", "said"),
    [
        (
            {"hardware_detail": {"name": MACHINES[0]}},
            {"hardware_detail": {"name": MACHINES[1]}},
            r"measured\s+on\s+AMD\s+EPYC\s+7B13\s+in\s+\S+,\s+on\s+Intel\s+Xeon\s+8370C\s+in",
        ),
        (
            {"model_sha256": "a" * 64},
            {"model_sha256": "b" * 64},
            r"with\s+weights\s+a{12}\s+in\s+\S+,\s+b{12}\s+in",
        ),
    ],
)
def test_two_machines_and_two_checkpoints_are_two_cells(
    bench: Bench, tmp_path: Path, base: dict[str, Any], head: dict[str, Any], said: str
) -> None:
    files = [on(tmp_path / "a.jsonl", 1, **base), on(tmp_path / "b.jsonl", 2, 0.1, **head)]
    done = bench("compare", *files, "--format", "md")
    assert done.code == 0
    assert "SLOWER:" not in done.err
    assert "no speed is in both, 1 missing" in done.err
    assert re.search(said, done.out)
    assert bench("compare", *files, "--strict").code == 1
    wrong = on(tmp_path / "c.jsonl", 2, verdict="FAIL", **head)
    assert bench("compare", files[0], wrong).code == 1  # what is right on one machine is wrong on no other


def test_both_machines_in_both_files_are_told_apart(bench: Bench, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for i, (file_, slow) in enumerate(zip(files, (0.0, 0.1), strict=True)):
        on(Path(file_), i, hardware_detail={"name": MACHINES[0]})
        on(Path(file_), i + 2, 1.0 + slow, hardware_detail={"name": MACHINES[1]})
    done = bench("compare", *files, "--format", "json")
    told = {it["machine"]: it["decision"] for it in json.loads(done.out)["cells"]}
    assert told == {MACHINES[0]: "NO SLOWER", MACHINES[1]: "SLOWER"}


def test_a_file_that_does_not_say_its_machine_is_compared_still(bench: Bench, tmp_path: Path) -> None:
    base = on(tmp_path / "a.jsonl", 1)
    head = on(tmp_path / "b.jsonl", 2, 0.1, hardware_detail={"name": MACHINES[0]}, model_sha256="a" * 64)
    done = bench("compare", base, head, "--format", "json")
    assert done.code == 1
    told = json.loads(done.out)
    assert [it["decision"] for it in told["cells"]] == ["SLOWER"]
    assert told["missing"] == told["added"] == []


def verdicts(path: Path, failing: Sequence[int], runs: int = 12, verdict: str = "FAIL") -> str:
    """Parity of one cell in so many runs, of which some fail."""
    for run in range(runs):
        told = verdict if run in failing else "PASS"
        append(path, row(CELLS[0], run, "parity", verdict=told, error=0.05, bound=0.1, reason=f"run {run}"))
    return str(path)


def test_a_head_that_fails_at_times_is_wrong_whichever_run_was_the_last(bench: Bench, tmp_path: Path) -> None:
    base = verdicts(tmp_path / "a.jsonl", [])
    for failing in (range(11), [4]):
        head = verdicts(tmp_path / f"{len(failing)}.jsonl", list(failing))
        done = bench("compare", base, head)
        assert done.code == 1
        assert "REGRESSION: 1 fails that ran right before" in done.out
        assert f"fails in {len(failing)} of 12 runs of" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [(3, 3, 0), (3, 1, 0), (3, 5, 0), (1, 12, 1), (12, 12, 0), (12, 0, 0), (2, 0, 0)],
)
def test_beside_a_base_that_fails_at_times_only_more_than_chance_counts(
    bench: Bench, tmp_path: Path, before: int, after: int, code: int
) -> None:
    base = verdicts(tmp_path / "a.jsonl", range(before))
    head = verdicts(tmp_path / "b.jsonl", range(after))
    done = bench("compare", base, head, "--format", "json")
    assert done.code == code
    untold = 0 < before < 12 and after > 0 and not code
    assert bench("compare", base, head, "--strict").code == (1 if untold else code)
    notes = json.loads(done.out)["notes"]
    assert sum("fails in" in note for note in notes) == sum(0 < failed < 12 for failed in (before, after))


@pytest.mark.parametrize(("before", "runs", "after"), [(1, 12, 1), (1, 12, 3), (1, 2, 12), (1, 2, 50)])
def test_a_head_that_always_fails_is_a_regression_whatever_base_once_did(
    bench: Bench, tmp_path: Path, before: int, runs: int, after: int
) -> None:
    base = verdicts(tmp_path / "a.jsonl", range(before), runs)
    assert bench("compare", base, verdicts(tmp_path / "b.jsonl", range(after), after)).code == 1


def test_a_run_that_could_not_measure_a_cell_says_nothing_of_it(bench: Bench, tmp_path: Path) -> None:
    base = verdicts(tmp_path / "a.jsonl", [0, 11], verdict="UNAVAILABLE")
    assert bench("compare", base, verdicts(tmp_path / "b.jsonl", range(12))).code == 1
    lost = verdicts(tmp_path / "c.jsonl", range(12), verdict="UNAVAILABLE")
    assert "1 missing" in bench("compare", base, lost).out


def test_more_often_is_fishers_exact_test() -> None:
    """Against the sum over all ways to hand the failures out."""
    base, head = parity.Verdict("FAIL", "", 1, 4), parity.Verdict("FAIL", "", 3, 5)
    ways = [sum(i >= 4 for i in chosen) for chosen in itertools.combinations(range(9), 4)]
    assert parity.more_often(base, head) == pytest.approx(sum(k >= 3 for k in ways) / len(ways))
