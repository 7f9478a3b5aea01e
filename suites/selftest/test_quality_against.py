"""``rwkv-bench quality --against``: every cell's divergence beside that of one that is named."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.quality.paired import NO_WORSE, UNDECIDED, WORSE
from suites.selftest.conftest import Done
from suites.selftest.test_quality_command import FEW, LATE, WRONG_SCALE, rows_of

Bench = Callable[..., Done]


def comparisons(done: Done) -> dict[tuple[str, str], dict[str, Any]]:
    """Backend and scheme -> what its row of divergence says of the other cell."""
    rows = [row for row in rows_of(done) if row["metric"] == "kl_divergence" and row["value"] is not None]
    return {(row["backend"], row["scheme"]): row["quality"]["against"] for row in rows}


def test_the_named_cell_runs_first_and_is_not_asked_for_twice(bench: Bench, small: str) -> None:
    argv = ("quality", "--model", small, "--backend", "numpy", "--quant", "Q8_0,Q4_0,fp16", *FEW)
    done = bench(*argv, "--against", "numpy:Q4_0", "--format", "json")
    assert done.code == 0
    found = comparisons(done)
    assert list(found) == [("numpy", "Q4_0"), ("numpy", "fp16"), ("numpy", "Q8_0")]
    values = {row["scheme"]: row["value"] for row in rows_of(done) if row["metric"] == "kl_divergence"}
    for (_, scheme), about in found.items():
        assert (about["backend"], about["scheme"], about["value"]) == ("numpy", "Q4_0", values["Q4_0"])
        assert about["difference"] == pytest.approx(values[scheme] - values["Q4_0"], rel=1e-9)
        assert about["finding"] == NO_WORSE
    assert found["numpy", "Q4_0"]["interval"] == [0, 0]
    assert found["numpy", "Q8_0"]["interval"][1] < 0


def test_another_backend_of_the_same_scheme_and_the_other_way_round(bench: Bench, small: str) -> None:
    """A cell that nothing else asks for is added; what is worse is worse, and no failure unless asked."""
    argv = ("quality", "--model", small, "--backend", "torch", "--quant", "fp32,fp16", *FEW, "--format", "json")
    found = comparisons(bench(*argv, "--against", "numpy:fp16"))
    assert list(found) == [("numpy", "fp16"), ("torch", "fp32"), ("torch", "fp16")]
    assert found["torch", "fp32"]["finding"] == NO_WORSE
    worse = bench("quality", "--model", small, "--backend", "numpy", "--quant", "Q4_0", *FEW, "--against", "torch:fp16")
    assert worse.code == 0
    assert "worse" in worse.out
    assert "against: KL less that of torch fp16 on the same positions" in worse.out.replace("\n", " ")


def test_exit_status_by_what_is_asked(bench: Bench, small: str) -> None:
    argv = ("quality", "--model", small, "--backend", "numpy", "--quant", "Q4_0", *FEW, "--against")
    done = bench(*argv, "numpy:Q8_0", "--no-worse", "--format", "json")
    assert done.code == 1
    (row,) = [row for row in rows_of(done) if row["verdict"] == "FAIL"]
    assert (row["metric"], row["scheme"], row["quality"]["against"]["finding"]) == ("kl_divergence", "Q4_0", WORSE)
    assert row["reason"].startswith("worse than numpy Q8_0: divergence +")
    assert bench(*argv, "numpy:q3f16_1", "--no-worse", "--strict").code == 0
    words = shlex.split(row["command"])
    assert bench(*words[1:], "--format", "json").code == 1
    few = ("--tokens", "128", "--context", "32", "--threads", "1")  # four blocks have no interval
    strict_argv = ("--model", small, "--backend", "numpy", "--quant", "Q4_0", *few, "--against", "numpy:q4f16_1")
    undecided = bench("quality", *strict_argv, "--no-worse")
    assert undecided.code == 0
    assert "undecided: 4 blocks of 8" in undecided.out
    assert bench("quality", *strict_argv, "--format", "csv").out.count(",4 blocks of 8") == 1
    strict = bench("quality", *strict_argv, "--no-worse", "--strict")
    assert strict.code == 1
    assert "not shown to be no worse than numpy q4f16_1: too few blocks" in strict.out.replace("\n", " ")


def test_a_kernel_that_is_wrong_is_worse_than_the_right_one(bench: Bench, small: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG_SCALE)
    backend = str(tmp_path / "wrong.py")
    argv = ("--model", small, "--backend", backend, "--quant", "Q4_0", *FEW, "--format", "json")
    found = comparisons(bench("quality", *argv, "--against", "numpy:Q4_0"))
    assert found[backend, "Q4_0"]["difference"] > 0
    assert found["numpy", "Q4_0"]["finding"] == NO_WORSE


def test_a_named_cell_without_figures_leaves_the_others_theirs(bench: Bench, small: str, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE.replace('("exit", "nan", "raise")', '("cpu",)'))
    late = str(tmp_path / "late.py")
    argv = ("quality", "--model", small, "--backend", "numpy", "--quant", "Q4_0", *FEW)
    done = bench(*argv, "--against", f"{late}:fp32", "--format", "json")
    assert done.code == 1  # NaN, in what was named
    about = comparisons(done)["numpy", "Q4_0"]
    assert (about["difference"], about["finding"], about["why"]) == (None, UNDECIDED, "no figures")
    assert "undecided: no figures" in bench(*argv, "--against", f"{late}:fp32").out


def test_what_is_named_and_not_to_be_had_is_3(bench: Bench, small: str) -> None:
    argv = ("quality", "--model", small, "--backend", "numpy", "--quant", "Q8_0", *FEW, "--format", "json")
    done = bench(*argv, "--against", "torch:Q4_0")
    assert done.code == 3
    assert "torch has no scheme Q4_0" in next(row["reason"] for row in rows_of(done) if row["backend"] == "torch")
    assert comparisons(done)["numpy", "Q8_0"]["finding"] == UNDECIDED


def test_table_markdown_and_csv_have_it(bench: Bench, small: str, tmp_path: Path) -> None:
    argv = ("quality", "--model", small, "--backend", "numpy", "--quant", "Q4_0,Q8_0", *FEW, "--against", "numpy:Q4_0")
    table = bench(*argv)
    assert "against" in table.out
    assert "no worse" in table.out
    assert any(" = " in line for line in table.out.splitlines() if "Q4_0" in line)
    assert "| against |" in bench(*argv, "--format", "md").out
    records = list(csv.DictReader(io.StringIO(bench(*argv, "--format", "csv").out)))
    (eight,) = [r for r in records if (r["metric"], r["scheme"]) == ("kl_divergence", "Q8_0")]
    assert (eight["text"], eight["positions"], eight["context"]) == ("random ids, seed 0", "512", "64")
    assert (eight["against_backend"], eight["against_scheme"], eight["against_finding"]) == ("numpy", "Q4_0", NO_WORSE)
    assert float(eight["against_low"]) <= float(eight["against_difference"]) <= float(eight["against_high"]) < 0
    assert float(eight["weights_low"]) <= float(eight["weights_value"]) <= float(eight["weights_high"])
    lines = [json.loads(line) for line in bench(*argv, "--format", "jsonl").out.splitlines()]
    told = [line["quality"] for line in lines if line["metric"] == "kl_divergence"]
    assert [(q["text"], q["positions"], q["context"]) for q in told] == [("random ids, seed 0", 512, 64)] * 2


def test_dry_run_has_the_named_cell(bench: Bench, state: Path) -> None:
    argv = ("--model", "tiny,169m", "--backend", "torch", "--quant", "fp32", "--dry-run", "--format", "json")
    done = bench("quality", *argv, "--against", "numpy:Q4_0")
    cells = [(cell["model"], cell["backend"], cell["scheme"]) for cell in json.loads(done.out)["cells"]]
    assert cells == [
        *(("tiny", "numpy", "Q4_0"), ("tiny", "torch", "fp32")),
        *(("169m", "numpy", "Q4_0"), ("169m", "torch", "fp32")),
    ]
    assert not state.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--against rwkv.cpp", "'rwkv.cpp' is no one cell; BACKEND:SCHEME, such as rwkv.cpp:Q4_0"),
        ("--against numpy:", "is no one cell"),
        ("--against all:Q4_0", "is no one cell"),
        ("--against numpyy:Q4_0", "did you mean 'numpy'"),
        ("--against numpy:Q4_O", "did you mean 'Q4_0'"),
        ("--against numpy:int4", "int4 is a class of schemes; name one of numpy's: q4f32_0, "),
        ("--against torch:int4", "int4 is a class of schemes; torch has none of it"),
        ("--no-worse", "--no-worse needs --against"),
        ("--strict --against numpy:Q4_0", "--strict needs --no-worse"),
    ],
)
def test_bad_input_is_one_line_and_2(argv: str, words: str, bench: Bench) -> None:
    done = bench("quality", "--backend", "numpy", "--quant", "fp32", *shlex.split(argv))
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert words in done.err
