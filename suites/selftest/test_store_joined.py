"""Files joined, mixed, of other programs, or given by mistake: read whole, or named."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import store
from harness.rows import Row, document, line
from harness.store import StoreError, TruncatedStore, append, read
from suites.selftest.test_store import row

ROOT = Path(store.__file__).parents[1]


def as_file(rows: Sequence[Row], kind: str) -> str:
    if kind == "lines":
        return "".join(map(line, rows))
    return json.dumps(document(rows), indent=1 if kind == "tall" else None) + "\n"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["lines", "tall", "flat"]), st.integers(1, 3)), max_size=5), st.booleans())
def test_documents_and_lines_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, int]], ends: bool
) -> None:
    path = tmp_path_factory.mktemp("joined") / "all"
    every: list[Row] = []
    text = ""
    for kind, n in parts:
        rows = [row(len(every) + i, reason="} { é") for i in range(n)]
        every += rows
        text += as_file(rows, kind)
    path.write_text(text if ends else text.rstrip("\n"), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path) == every


def test_documents_without_a_newline_between(tmp_path: Path) -> None:
    path = tmp_path / "all"
    path.write_text((as_file([row(0)], "flat") + as_file([row(1)], "tall")).replace("\n{", "{") + line(row(2)))
    assert read(path) == [row(0), row(1), row(2)]


def test_a_document_cut_short_among_lines_is_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "all"
    path.write_text(line(row(0)) + as_file([row(1), row(2)], "tall")[:-40])
    with pytest.raises(StoreError, match="line 2: the JSON document is damaged or cut short"):
        read(path)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "pytest-benchmark": (b'{"machine_info": {}, "benchmarks": [{"stats": {}}]}', "record of pytest-benchmark"),
    "pytest-benchmark, as it writes it": (
        json.dumps({"machine_info": {"node": "x"}, "commit_info": {}, "benchmarks": []}, indent=4).encode(),
        "record of pytest-benchmark",
    ),
    "hyperfine": (b'{\n  "results": [{"command": "x", "mean": 1}]\n}', "hyperfine"),
    "llama-bench": (b'[\n {"build_commit": "1", "avg_ts": 2.0}\n]', "llama-bench"),
    "llama-bench, lines": (b'{"build_commit": "1", "avg_ts": 2.0}\n', "llama-bench"),
    "github-action-benchmark": (b'[{"name": "x", "unit": "s", "value": 1}]', "github-action-benchmark"),
    "lm-eval": (b'{"results": {}, "versions": {}}', "lm-evaluation-harness"),
    "a bare list of our rows": (json.dumps([row().to_dict()]).encode(), "a bare list of rows"),
    "gzip": (gzip.compress(line(row()).encode()), "gunzip"),
    "a CI artifact": (b"PK\x03\x04rest", "zip archive"),
    "PowerShell": (line(row()).encode("utf-16"), "UTF-16"),
    "our page": (b"<!doctype html><html>", "HTML"),
    "our table": (b"**model tiny**\n\n| backend |", "Markdown"),
    "our CSV": (b"kind,run,time,hardware\nmeasured,r,1,cpu\n", "CSV of ours"),
    "words": (b"no results here", "not JSON"),
    "words with an end": (b"no results here\n", "not JSON"),
    "another object": (b'{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}', 'JSON object with "a", "b", "c", "d", ...'),
    "a list": (b"[1, 2]", "a list, not an object"),
    "a number": (b"7\n", "a int, not an object"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, says = FOREIGN[name]
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StoreError, match=says) as raised:
            read(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_real_record_of_pytest_benchmark(tmp_path: Path) -> None:
    """As its plugin writes it, not as we remember it."""
    (tmp_path / "test_it.py").write_text("def test_it(benchmark):\n    benchmark(lambda: None)\n")
    path = tmp_path / "now.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json", str(path)]
    fast = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", str(tmp_path / "test_it.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run([*command, *fast], cwd=tmp_path, env=environment, check=True, capture_output=True)
    with pytest.raises(StoreError, match="record of pytest-benchmark; give the store that the run wrote"):
        read(path)


TWO_RUNS = """
import sys
from pathlib import Path
from harness.rows import Row
from harness.store import append
go, path, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
while not go.exists():
    pass
for i in range(40):
    append(path, Row(kind="measured", run=name, time=str(i), hardware="cpu", backend="b", model="m", scheme="s",
                     metric="decode", value=float(i), samples=tuple(float(n) for n in range(i * 97 % 4000))))
"""


def test_runs_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    path, go = tmp_path / "rows.jsonl", tmp_path / "go"
    names = ("one", "two", "three")
    running = [subprocess.Popen([sys.executable, "-c", TWO_RUNS, str(go), str(path), name], cwd=ROOT) for name in names]
    go.touch()
    assert [process.wait(60) for process in running] == [0, 0, 0]
    found = read(path)
    assert len(found) == 120
    for name in names:
        own = [row for row in found if row.run == name]
        assert [row.time for row in own] == [str(i) for i in range(40)]
        assert [len(row.samples or ()) for row in own] == [i * 97 % 4000 for i in range(40)]


FILL = """
import sys
from harness.rows import Row
from harness.store import StoreError, append
for i in range(1000):
    try:
        append(sys.argv[1], Row(kind="measured", run="r", time=str(i), hardware="cpu", backend="b", model="m",
                                scheme="s", metric="decode", value=float(i), reason="x" * 1000))
    except StoreError as error:
        print(i, error)
        break
"""


def test_a_disk_that_fills_up_keeps_every_earlier_row(tmp_path: Path) -> None:
    """A real file system of 64 KiB; what was reported as stored is there, and goes on once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    try:
        path = small / "rows.jsonl"
        done = subprocess.run([sys.executable, "-c", FILL, str(path)], cwd=ROOT, capture_output=True, text=True)
        stored, _, why = done.stdout.strip().partition(" ")
        assert "No space left on device; make room or give another file, the rows before this one are kept" in why
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [row.time for row in read(path)] == [str(i) for i in range(int(stored))]
        assert int(stored) > 20
        subprocess.run(["mount", "-o", "remount,size=256k", str(small)], check=True)
        append(path, row(5))
        assert read(path)[-1] == row(5)
    finally:
        subprocess.run(["umount", str(small)], check=True)


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
"""


def test_a_file_that_may_not_grow_keeps_every_earlier_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, "-c", LIMITED + FILL, str(path)], cwd=ROOT, capture_output=True, text=True)
    stored, _, why = done.stdout.strip().partition(" ")
    assert "File too large; make room or give another file" in why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row.time for row in read(path)] == [str(i) for i in range(int(stored))]
    assert path.stat().st_size <= 50_000 < path.stat().st_size + 2 * len(line(row(reason="x" * 1000)))


def test_a_store_behind_a_pipe_is_read_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(
        [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", str(pipe), line(row())]
    )
    assert read(pipe) == [row()]
    assert writer.wait(30) == 0


def test_what_a_cut_line_says_names_the_file_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line(row(0)) + line(row(1))[:50])
    caught: list[Any]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(path)
    assert [w.category for w in caught] == [TruncatedStore]
    assert str(caught[0].message) == f"{path}, line 2: never finished, its writer was killed; left out"
