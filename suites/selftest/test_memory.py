"""Peak memory, on this system and on faked ones."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from harness import memory
from harness.memory import MemorySpan, Peak

MIB = 1 << 20


def procfs(folder: Path, rss_kb: int, hwm_kb: int | None, resettable: bool = False) -> Path:
    """A process's folder that says so. ``clear_refs`` takes a write but, being a file, resets nothing."""
    lines = ["Name:\tpython", f"VmRSS:\t{rss_kb:>8} kB", "Threads:\t1"]
    if hwm_kb is not None:
        lines.insert(1, f"VmHWM:\t{hwm_kb:>8} kB")
    (folder / "status").write_text("\n".join(lines) + "\n")
    if resettable:
        (folder / "clear_refs").touch()
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads this process's /proc")
def test_a_buffer_that_came_and_went_is_seen() -> None:
    with MemorySpan() as span:
        before = span.peak()
        np.ones(64 * MIB, np.uint8)  # freed at once
        after = span.peak()
    assert before.growth_bytes is not None
    assert after.growth_bytes is not None
    assert before.growth_bytes < 16 * MIB
    # A sampler may miss it; the kernel's mark may not.
    if after.method == "VmHWM":
        assert 60 * MIB <= after.growth_bytes < 96 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads this process's /proc")
def test_what_is_to_be_forgotten_is() -> None:
    with MemorySpan() as span:
        np.ones(128 * MIB, np.uint8)
        span.forget()
        np.ones(32 * MIB, np.uint8)
        found = span.peak()
    assert found.growth_bytes is not None
    assert found.growth_bytes < 96 * MIB


def test_resettable_mark(tmp_path: Path) -> None:
    with MemorySpan(procfs(tmp_path, 1000, 1000, resettable=True)) as span:
        assert (tmp_path / "clear_refs").read_text() == "5"
        procfs(tmp_path, 1200, 1500)
        assert span.peak() == Peak(500 * 1024, 1000 * 1024, 1500 * 1024, "VmHWM")


def test_mark_that_cannot_be_reset_counts_once_it_is_exceeded(tmp_path: Path) -> None:
    with MemorySpan(procfs(tmp_path, 1000, 4000)) as span:
        procfs(tmp_path, 3000, 4000)
        assert span.peak() == Peak(2000 * 1024, 1000 * 1024, 3000 * 1024, "sampled RSS")
        procfs(tmp_path, 3000, 5000)
        assert span.peak() == Peak(4000 * 1024, 1000 * 1024, 5000 * 1024, "VmHWM")


def test_without_a_mark_the_sampler_sees_what_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SAMPLE_SECONDS", 0.001)
    seen = threading.Event()
    real = memory._status_bytes

    def spy(proc: Path, field: str) -> int | None:
        found = real(proc, field)
        if found == 9000 * 1024:
            seen.set()
        return found

    monkeypatch.setattr(memory, "_status_bytes", spy)
    with MemorySpan(procfs(tmp_path, 1000, None)) as span:
        # A rename is atomic, so the sampler never reads half a file.
        other = tmp_path / "other"
        other.mkdir()
        (procfs(other, 9000, None) / "status").replace(tmp_path / "status")
        assert seen.wait(5)
        (procfs(other, 1100, None) / "status").replace(tmp_path / "status")
        assert span.peak() == Peak(8000 * 1024, 1000 * 1024, 9000 * 1024, "sampled RSS")
    assert "memory-span" not in [thread.name for thread in threading.enumerate()]


def test_memory_given_back_is_no_negative_growth(tmp_path: Path) -> None:
    with MemorySpan(procfs(tmp_path, 2000, 2000, resettable=True)) as span:
        procfs(tmp_path, 1000, 1500)
        assert span.peak() == Peak(0, 2000 * 1024, 2000 * 1024, "VmHWM")


def test_without_procfs_the_process_mark_counts_once_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = [50]
    monkeypatch.setattr(memory, "_max_rss", lambda: mark[0])
    with MemorySpan(tmp_path / "none") as span:
        assert span.peak() == Peak(None, None, None, None)  # below what the process once had: unknown, not 0
        mark[0] = 70
        assert span.peak() == Peak(20, 50, 70, "ru_maxrss")
        span.forget()
        assert span.peak().growth_bytes is None
    assert not (tmp_path / "none").exists()


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_max_rss", lambda: None)
    with MemorySpan(tmp_path) as span:
        assert span.peak() == Peak(None, None, None, None)
    assert list(tmp_path.iterdir()) == []
