"""``--output``: whole or not at all, and nothing but a regular file is ever replaced."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from harness.store import StoreError
from reports.output import check_output, write_output


def test_a_file_is_written_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out.md"
    path.write_text("old and longer than the new")
    path.chmod(0o640)
    write_output(str(path), "new ≤")
    assert path.read_text(encoding="utf-8") == "new ≤"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["out.md"]


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.md"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device; give another file"):
        write_output(str(path), "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.md"]


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_output(str(tmp_path / "link"), "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


def test_a_pipe_is_written_into_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    check_output(str(path), tmp_path / "store")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    write_output(str(path), "through")
    reader.join(10)
    assert got == ["through"]
    assert path.is_fifo()


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except (OSError, AttributeError):
        pytest.skip("making a device needs the rights of root")
    check_output(str(tmp_path / "null"), tmp_path / "store")
    write_output(str(tmp_path / "null"), "gone")
    assert (tmp_path / "null").is_char_device()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 5000, "File name too long"),
        ("no/such/out.md", "the folder .*no/such does not exist"),
        (".", "it is a folder"),
        ("file/out.md", "not exist"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_run(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=words):
        check_output(str(tmp_path / name), tmp_path / "store")
    assert os.listdir(tmp_path) == ["file"]


def test_a_read_only_file_is_told_before_the_run(tmp_path: Path) -> None:
    if os.access("/proc/version", os.W_OK) and os.geteuid() == 0:
        pytest.skip("root may write everything")
    path = tmp_path / "out.md"
    path.touch(0o444)
    with pytest.raises(StoreError, match="Permission denied"):
        check_output(str(path), tmp_path / "store")


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_output(str(tmp_path / "out.md"), tmp_path / "store")
    check_output(None, tmp_path / "store")
    assert os.listdir(tmp_path) == []
