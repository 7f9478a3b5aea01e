"""A run that was broken off goes on where it stopped: by Ctrl-C, by a kill, and not with what other code measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import resume
from harness.store import read
from suites.selftest.conftest import Done
from suites.selftest.test_nothing_lost import COMMAND, environment

Bench = Callable[..., Done]


@pytest.fixture
def two(small: str, tmp_path: Path) -> tuple[str, ...]:
    """Two models, so that the first one's cells are finished before the second one's begin."""
    other = tmp_path / "other.safetensors"
    other.write_bytes(Path(small).read_bytes())
    return ("--model", f"{small},{other}", "--backend", "numpy", "--quant", "fp32,bf16", "--threads", "1")


def decodes(done: Done) -> list[tuple[str, str, str]]:
    rows = [row for row in json.loads(done.out)["rows"] if row["metric"] == "decode"]
    return [(Path(row["model"]).stem, row["scheme"], row["run"]) for row in rows]


SIZES = ("--repeats", "6", "--prompt-tokens", "16", "--decode-tokens", "8")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["SIGINT", "SIGKILL"]
)
def test_what_was_finished_before_the_end_is_not_measured_again(
    number: int, code: int, two: tuple[str, ...], bench: Bench, state: Path
) -> None:
    running = subprocess.Popen(
        [*COMMAND, *two, *SIZES],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(state),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    store = state / "rows.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if store.exists() and store.read_text().count('"metric":"decode"') == 2:
            break
        time.sleep(0.005)
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == code
    before = read(store)
    (run,) = {row.run for row in before}
    finished = [row for row in before if row.metric == "decode" and row.stopped != "interrupted"]
    done = bench(*two, *SIZES, "--resume", "--format", "json")
    assert done.code == 0
    assert f"resume: {len(finished)} of 4 cells taken over from run {run}" in done.err
    found = decodes(done)
    assert len({(model, scheme) for model, scheme, _ in found}) == 4
    assert sum(told == run for _, _, told in found) == len(finished) >= 2
    again = bench(*two, *SIZES, "--resume", "--format", "json")
    assert "4 of 4 cells taken over" in again.err
    assert "nothing is left to measure" in again.err
    assert "added to" not in again.err
    assert sorted(decodes(again)) == sorted(found)


@pytest.mark.parametrize(
    "other",
    [("--decode-tokens", "9"), ("--seed", "1"), ("--repeats", "7"), ("--isolate",), ("--precision", "50%")],
    ids=lambda words: words[0],
)
def test_other_options_are_another_plan(other: tuple[str, ...], small: str, bench: Bench) -> None:
    one = ("--model", small, "--backend", "numpy", "--quant", "fp32", "--threads", "1", "--time-budget", "0")
    assert bench(*one, *SIZES).code == 0
    done = bench(*one, *SIZES, *other, "--resume")
    assert "is unfinished, or of other options or code; everything is measured" in done.err


def test_other_code_is_another_plan(small: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ("--model", small, "--backend", "numpy", "--quant", "fp32", "--threads", "1", "--quick")
    assert bench(*one).code == 0
    assert "1 of 1 cells taken over" in bench(*one, "--resume").err
    monkeypatch.setattr(resume, "code_version", lambda backend: "other")
    assert "everything is measured" in bench(*one, "--resume").err


@pytest.mark.parametrize("package", ["numpy", "torch"])
def test_another_version_of_what_computes_is_another_plan(
    package: str, small: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ("--model", small, "--backend", "numpy", "--quant", "fp32", "--threads", "1", "--quick")
    assert bench(*one).code == 0
    assert "1 of 1 cells taken over" in bench(*one, "--resume").err
    here = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == package else here(name))
    assert "everything is measured" in bench(*one, "--resume").err


def test_the_runtime_is_what_the_backend_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cell: Any = SimpleNamespace(backend="numpy", hardware=SimpleNamespace(host=None))
    told = {}
    for answer in (lambda: "1.0", lambda: "2.0", lambda: 1 / 0):
        monkeypatch.setattr("backends.numpy_reference.version", answer, raising=False)
        told[answer] = resume.runtime(cell)
    assert len({str(found) for found in told.values()}) == 3
    apart = SimpleNamespace(version="3.10", lock=("torch==2.1",))
    monkeypatch.setattr(resume, "environment", lambda name, module: apart)
    assert resume.runtime(cell) == ["3.10", "torch==2.1"]
    assert resume.runtime(SimpleNamespace(backend="numpy", hardware=SimpleNamespace(host="far"))) is None  # type: ignore[arg-type]


def test_a_failure_is_finished_and_a_crash_is_not(small: str, bench: Bench) -> None:
    one = ("--model", small, "--backend", "faulty", "--device", "nan,exception", "--threads", "1", "--quick")
    assert bench(*one).code == 4
    done = bench(*one, "--resume", "--format", "json")
    assert "1 of 2 cells taken over" in done.err
    assert done.code == 4
    assert {row["verdict"] for row in json.loads(done.out)["rows"]} >= {"FAIL", "CRASHED"}


def test_nothing_to_resume(small: str, bench: Bench, state: Path) -> None:
    done = bench("--model", small, "--backend", "numpy", "--quant", "fp32", "--threads", "1", "--quick", "--resume")
    assert done.code == 0
    assert f"resume: {state / 'rows.jsonl'} has no finished cell of this plan; everything is measured" in done.err


def test_the_code_version_is_of_the_source(tmp_path: Path) -> None:
    backend = tmp_path / "mine.py"
    source = "from backends.numpy_reference import INFO, load\n"
    script = f"from harness.resume import code_version; print(code_version({str(backend)!r}))"
    found = []
    for text in (source, source, source + "# changed\n"):
        backend.write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        found.append(done.stdout)
    assert found[0] == found[1] != found[2]
