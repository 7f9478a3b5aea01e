"""The command line: exit status, streams, formats, messages."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness import budget
from harness import run as run_module
from harness.rows import FIELDS
from harness.store import read
from suites.selftest.conftest import Done

Bench = Callable[..., Done]

#: One cell, as fast as can be.
ONE = ("--backend", "numpy", "--quant", "fp32", "--threads", "1", "--quick")


@pytest.fixture
def quick(small: str) -> tuple[str, ...]:
    return ("--model", small, *ONE)


def faulty(device: str, small: str) -> tuple[str, ...]:
    return ("--model", small, "--backend", "faulty", "--device", device, "--threads", "1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--backend numpyy", "did you mean 'numpy'"),
        ("--backend nowhere/mine.py", "nowhere/mine.py: no such file"),
        ("--quant Q4_O", "did you mean 'Q4_0'"),
        ("--hardware A80", "did you mean 'a800'"),
        ("--model 168m", "did you mean '169m'"),
        ("--model no/such.pth", "no/such.pth"),
        ("--device gpu", "devices: cpu, cuda, mps"),
        ("--device cuda:one", "no device 'cuda:one'"),
        ("--hardware cpu --device cuda", "hardware cpu has no device cuda"),
        ("--store no/such/store.jsonl", "does not exist"),
        ("--output no/such/table.md", "does not exist"),
        ("--output .", "it is a folder"),
        ("--dry-run --format csv", "--dry-run has --format table or json"),
        ("generate ''", "the prompt is empty"),
        ("generate x --quant foo", "no scheme 'foo'"),
        ("nonsense", "no command 'nonsense'"),
        (f"--model {'x' * 5000}", "no model"),
        (f"--model {'x' * 5000}.pth", "too long"),
        (f"--backend {'x' * 5000}.py", "no such file"),
        (f"--store {'x' * 5000}", "too long"),
        (f"--output {'x' * 5000}", "too long"),
        ("--threads 0", "see rwkv-bench run --help"),
    ],
)
def test_bad_input_is_one_line_and_2(argv: str, words: str, bench: Bench) -> None:
    done = bench(*shlex.split(argv))
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("rwkv-bench: ")
    assert words in done.err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut", bytes(4096)])
def test_a_file_that_is_no_checkpoint(content: bytes, tmp_path: Path, bench: Bench) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        done = bench("--model", str(tmp_path / name), *ONE)
        assert done.code == 2
        assert name in done.err
        assert done.err.count("\n") == 1


def test_names_cannot_move_the_cursor(bench: Bench) -> None:
    done = bench("--model", "\x1b[31mred\n.pth")
    assert done.code == 2
    assert "\\x1b[31mred .pth" in done.err


def test_json_is_one_document_that_the_store_repeats(quick: tuple[str, ...], bench: Bench, state: Path) -> None:
    done = bench(*quick, "--format", "json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["schema"] == 1
    metrics = [row["metric"] for row in found["rows"]]
    assert metrics == ["parity", "state_parity", "load", "first_call", "prefill", "time_to_first_token", "decode"]
    assert all(set(row) - {"roofline", "revision"} == set(FIELDS) and row["verdict"] == "PASS" for row in found["rows"])
    parity = found["rows"][0]
    assert 0 <= parity["error"] <= parity["bound"]
    assert parity["first_bad"] is None
    assert [row.to_dict() for row in read(state / "rows.jsonl")] == found["rows"]
    assert "7 rows added" in done.err


def test_jsonl_csv_and_md(quick: tuple[str, ...], bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(bench(*quick, "--format", "jsonl").out)
    rows = read(tmp_path / "rows.jsonl")
    assert len(rows) == 7
    records = list(csv.DictReader(io.StringIO(bench(*quick, "--format", "csv").out)))
    assert [record["metric"] for record in records] == [row.metric for row in rows]
    assert {float(record["value"]) > 0 for record in records} == {True}
    lines = [line for line in bench(*quick, "--format", "md").out.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1


def test_output_holds_the_table_and_stdout_nothing(quick: tuple[str, ...], bench: Bench, tmp_path: Path) -> None:
    done = bench(*quick, "--output", str(tmp_path / "out.json"))
    assert (done.code, done.out) == (0, "")
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 7


def test_output_never_replaces_the_store(quick: tuple[str, ...], bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    assert bench(*quick, "--store", path).code == 0
    done = bench(*quick, "--store", path, "--output", path)
    assert done.code == 2
    assert "it is the store" in done.err
    assert len(read(path)) == 7


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "md", "table"])
def test_published_only_is_3_and_a_whole_document(kind: str, bench: Bench, state: Path) -> None:
    done = bench("--hardware", "a800", "--format", kind)
    assert done.code == 3
    assert "a800 is not in this machine" in done.err
    assert "published" in done.out
    assert not state.exists()
    if kind == "json":
        rows = json.loads(done.out)["rows"]
        assert rows
        assert {(row["kind"], row["verdict"]) for row in rows} == {("published", None), ("predicted", None)}


def test_hardware_nobody_has_published(bench: Bench) -> None:
    done = bench("--hardware", "snapdragon865", "--format", "json")
    assert (done.code, {row["kind"] for row in json.loads(done.out)["rows"]}) == (3, {"predicted"})


def test_a_failure_is_1_has_no_speed_and_leaves_a_bundle(small: str, bench: Bench) -> None:
    done = bench(*faulty("nan", small), "--quick", "--format", "json")
    assert done.code == 1
    rows = {row["metric"]: row for row in json.loads(done.out)["rows"]}
    for metric in ("prefill", "decode"):
        assert (rows[metric]["verdict"], rows[metric]["value"]) == ("FAIL", None)
    assert "NaN" in rows["parity"]["reason"]
    assert rows["parity"]["first_bad"]
    bundle = rows["parity"]["reason"].rpartition("bundle ")[2].split(";")[0]
    with np.load(bundle) as content:
        assert {"tokens", "truth_logits", "logits", "state", "command"} <= set(content)
        assert np.isnan(content["logits"]).any()


def test_a_crash_is_4_even_beside_a_failure(small: str, bench: Bench) -> None:
    done = bench("parity", *faulty("nan,exception,clean", small))
    assert done.code == 4
    assert [word for word in ("FAIL", "CRASHED", "PASS") if word in done.out] == ["FAIL", "CRASHED", "PASS"]
    assert "kernel launch failed" in done.out


def test_what_was_asked_by_name_and_is_not_to_be_had_is_3(small: str, bench: Bench) -> None:
    done = bench("parity", "--model", small, "--backend", "numpy", "--device", "cuda")
    assert done.code == 3
    assert "numpy does not run on cuda; it runs on cpu" in done.out
    done = bench("parity", "--model", small, "--backend", "numpy", "--quant", "fp32,Q4_K", "--threads", "1")
    assert done.code == 3
    assert "nothing ran for --quant Q4_K" in done.err


def test_too_little_memory_is_told_before_anything_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda: 2 << 30)
    done = bench("--model", "14b", "--backend", "numpy", "--quant", "fp32")
    assert done.code == 3
    assert re.search(r"needs about 55\.\d GiB of memory, 2\.0 GiB are free", done.out)
    done = bench("generate", "x", "--model", "14b")
    assert done.code == 3
    assert "GiB are free" in done.err


def test_dry_run_loads_and_stores_nothing(
    small: str, bench: Bench, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "open_model", None)
    done = bench("--model", f"{small},7b", "--backend", "numpy", "--quant", "fp32", "--dry-run")
    assert done.code in (0, 3)
    assert "nothing was run" in done.out
    assert not state.exists()
    done = bench("--model", small, "--backend", "numpy", "--quant", "fp32,Q4_K", "--dry-run", "--format", "json")
    assert done.code == 3
    cells = json.loads(done.out)["cells"]
    assert [cell["scheme"] for cell in cells] == ["fp32", "Q4_K"]
    assert cells[0]["seconds"] > 0
    assert cells[0]["reason"] is None
    assert cells[1]["reason"].startswith("UNSUPPORTED: numpy has no scheme Q4_K")


def test_the_command_of_a_row_reproduces_it(small: str, bench: Bench) -> None:
    rows = json.loads(bench(*faulty("drift", small), "--quick", "--seed", "3", "--format", "json").out)["rows"]
    (command,) = {row["command"] for row in rows}
    words = shlex.split(command)
    assert words[0] == "rwkv-bench"
    again = json.loads(bench(*words[1:], "--format", "json").out)["rows"]
    for row, other in zip(rows, again, strict=True):
        for name in (
            "backend",
            "scheme",
            "model_sha256",
            "device",
            "threads",
            "workload",
            "metric",
            "error",
            "command",
        ):
            assert row[name] == other[name]


@pytest.mark.parametrize("damage", [b"", b"no npz", b"PK\x03\x04"])
def test_a_damaged_truth_is_computed_again(
    damage: bytes, quick: tuple[str, ...], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    assert bench("parity", *quick[:-1]).code == 0
    sizes = {file: file.stat().st_size for file in (tmp_path / "truth").iterdir()}
    assert sizes
    for file in sizes:
        file.write_bytes(damage)
    assert bench("parity", *quick[:-1]).code == 0
    assert {file: file.stat().st_size for file in sizes} == sizes


def test_a_cache_that_cannot_be_written_is_done_without(
    quick: tuple[str, ...], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "file"))
    assert bench("parity", *quick[:-1]).code == 0


def test_a_user_without_a_home_has_a_store_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    from harness.cache import state_folder
    from reference.cache import cache_folder

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("RWKV_BENCH_CACHE", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path)
    assert state_folder().is_relative_to(tmp_path)
    assert cache_folder() != state_folder()


def test_warnings_are_one_line(small: str, tmp_path: Path, bench: Bench) -> None:
    import safetensors.numpy as st

    tensors = st.load_file(small)
    tensors["blocks.1.att.key.weight"][0, 0] = np.nan
    st.save_file(tensors, tmp_path / "nan.safetensors")
    done = bench("parity", "--model", str(tmp_path / "nan.safetensors"), "--backend", "numpy", "--quant", "fp32")
    assert done.code == 1
    warning = next(line for line in done.err.splitlines() if line.startswith("rwkv-bench: warning: "))
    assert "blocks.1.att.key.weight" in warning


def test_hardware_whose_published_figures_are_of_other_schemes(bench: Bench) -> None:
    done = bench("--hardware", "a800", "--quant", "fp32")
    assert done.code == 3
    assert "its published figures are of q0f16, q4f16_1" in done.err
