"""The store: what was appended is there, whatever happened to the writers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from harness import store
from harness.rows import Row, line
from harness.store import StoreError, TruncatedStore, append, check_writable, duplicates, read

ROOT = Path(store.__file__).parents[1]

#: What a writing process runs: ``writer(name, i)`` is its i-th row.
WRITER = """
import sys
from harness.rows import Row
from harness.store import append
def writer(name, i):
    return Row(kind="measured", run=name, time=str(i), hardware="cpu", backend="b", model="m", scheme="s",
               metric="decode", value=float(i), reason="x" * (i % 7) * 900)
"""


def row(i: int = 0, **fields: Any) -> Row:
    names = {"hardware": "cpu", "backend": "b", "model": "tiny", "scheme": "fp32", "run": "r", "time": str(i)}
    return Row(**{"kind": "measured", "metric": "decode", "value": float(i), **names, **fields})


def append_one(path: Path) -> None:
    append(path, row())


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER + code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture(autouse=True)
def _no_warning_unasked() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestAppend:
    def test_one_line_a_row_in_order(self, path: Path) -> None:
        rows = [row(i) for i in range(5)]
        for i, each in enumerate(rows):
            append(path, each)
            assert read(path) == rows[: i + 1]
        assert path.read_text() == "".join(map(line, rows))
        assert json.loads(path.read_text().splitlines()[0])["schema"] == 1

    def test_one_write_then_one_flush(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        write = os.write

        def spy(file: int, data: bytes) -> int:
            calls.append(data)
            return write(file, data)

        monkeypatch.setattr(os, "write", spy)
        monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
        append(path, row(1))
        assert calls == [line(row(1)).encode(), "fsync"]

    def test_after_a_killed_writer_starts_a_new_line(self, path: Path) -> None:
        append(path, row(0))
        with path.open("a") as file:
            file.write(line(row(1))[:50])
        append(path, row(2))
        append(path, row(3))
        with pytest.warns(TruncatedStore, match=r"rows\.jsonl, line 2: never finished"):
            assert read(path) == [row(0), row(2), row(3)]

    def test_after_a_last_line_without_its_newline(self, path: Path) -> None:
        path.write_text(line(row(0)).rstrip("\n"))
        append(path, row(1))
        assert read(path) == [row(0), row(1)]

    def test_a_write_that_takes_part_is_continued(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda f, b: write(f, b[:10]))
        append(path, row(0))
        assert read(path) == [row(0)]

    def test_where_there_are_no_locks(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        append(path, row(0))
        assert read(path) == [row(0)]


class TestTwoProcesses:
    def test_lose_nothing(self, path: Path) -> None:
        code = "for i in range(60): append(sys.argv[1], writer(sys.argv[2], i))"
        writers = [start(code, str(path), name) for name in ("one", "two")]
        for writer in writers:
            writer.communicate(timeout=30)
            assert writer.returncode == 0
        rows = read(path)
        for name in ("one", "two"):
            assert [r.time for r in rows if r.run == name] == [str(i) for i in range(60)]
        assert len(rows) == 120

    def test_what_a_killed_writer_reported_is_there(self, path: Path) -> None:
        code = "for i in range(10**6): append(sys.argv[1], writer('w', i)); print(i, flush=True)"
        writer = start(code, str(path))
        assert writer.stdout is not None
        for _ in range(20):
            reported = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate(timeout=10)
        reported = max([reported, *map(int, rest.split())])
        assert writer.returncode == -signal.SIGKILL
        append(path, row(0))  # the dead writer's lock is gone with it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncatedStore)
            rows = read(path)
        assert rows[-1] == row(0)
        assert [r.time for r in rows[:-1]][: reported + 1] == [str(i) for i in range(reported + 1)]

    def test_a_full_disk_takes_back_the_half_line(self, path: Path) -> None:
        """A limit on file size: the system takes part of the line, then refuses, as a full disk does."""
        append(path, row(0))
        code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    for i in range(9): append(sys.argv[1], writer("w", i)); print(i)
except ValueError as error: print(error)
"""
        out, _ = start(code, str(path)).communicate(timeout=30)
        *done, said = out.splitlines()
        assert done == ["0"]
        assert said.startswith(f"cannot write results to {path}: File too large; make room")
        assert path.read_text().endswith("\n")
        assert [r.run for r in read(path)] == ["r", "w"]

    @pytest.mark.parametrize("held", [fcntl.LOCK_EX, fcntl.LOCK_SH])
    def test_a_lock_that_is_never_freed(self, path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
        monkeypatch.setattr(store, "_LOCK_SECONDS", 0.05)
        with path.open("w") as other:
            fcntl.flock(other, held)
            with pytest.raises(StoreError, match="another process has held its lock"):
                append(path, row(0))
        append(path, row(1))
        assert read(path) == [row(1)]


class TestUnwritable:
    """One line: what, where, what to do. Root may write anywhere, so permissions are faked."""

    def cases(self, tmp_path: Path) -> list[tuple[Path, str]]:
        (tmp_path / "file").touch()
        return [
            (tmp_path / "none" / "rows.jsonl", f"the folder {tmp_path / 'none'} does not exist; create it"),
            (tmp_path / "file" / "rows.jsonl", "Not a directory"),
            (tmp_path, "it is a folder"),
            (tmp_path / ("x" * 300), "File name too long"),
        ]

    @pytest.mark.parametrize("case", range(4))
    def test_place(self, tmp_path: Path, case: int) -> None:
        path, says = self.cases(tmp_path)[case]
        for attempt in (append_one, check_writable):
            with pytest.raises(StoreError) as raised:
                attempt(path)
            assert str(raised.value).startswith(f"cannot write results to {path}: {says}")
            assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_permission(self, path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        def refuse(*_: Any) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "open", refuse)
        for attempt in (append_one, check_writable):
            with pytest.raises(StoreError, match=f"{os.strerror(code)}; give a file that you may write"):
                attempt(path)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_full_device(self) -> None:
        with pytest.raises(StoreError, match="/dev/full: No space left on device; make room"):
            append("/dev/full", row())

    def test_a_disk_that_fails_on_flush(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreError, match="Input/output error"):
            append(path, row())

    def test_checking_leaves_rows_alone(self, path: Path) -> None:
        check_writable(path)
        assert read(path) == []
        append(path, row())
        check_writable(path)
        assert read(path) == [row()]


def test_duplicates() -> None:
    rows = [row(0), row(1), row(0), row(0, metric="prefill"), row(1, value=9.0), row(0)]
    assert duplicates(rows) == [(0, 2), (1, 4), (0, 5)]
    assert duplicates([]) == []
