"""Peak resident memory of this process over a span, and which method told it.

A span opens before load; its *growth* is the highest resident size since, less what was resident when
it opened. So an interpreter that is already running does not count, while the runtime that load
imports, the weights and every work buffer do. Memory-mapped weights count once they are touched.
Device memory is not in it.

    VmHWM         Linux: the kernel's own high-water mark, reset when the span opened, or not reset but
                  since exceeded, which is as exact
    sampled RSS   the mark can be neither reset nor trusted: resident size every 20 ms, a lower bound
    ru_maxrss     elsewhere: the process's mark cannot be reset; growth is known only once it is exceeded
    None          this system tells nothing, or the mark was not exceeded; ``growth_bytes`` is then None

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Peak:
    """Bytes: growth over the span, resident when it opened, highest since; and the method."""

    growth_bytes: int | None
    baseline_bytes: int | None
    peak_bytes: int | None
    method: str | None


class MemorySpan:
    """Open from construction to :meth:`close`; :meth:`peak` may be asked at any time in between.

    ``proc`` is the process's folder in procfs. Only the method ``sampled RSS`` has a thread of its own,
    which can disturb timing by the little it runs; the others cost nothing between calls.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        _give_back()
        self._baseline = _status_bytes(proc, "VmRSS")
        self._opened_mark = _max_rss() if self._baseline is None else None
        self.forget()

    def forget(self) -> None:
        """Leave the peak so far out of account, for work that was not the backend's. The baseline stays."""
        _give_back()
        if self._baseline is None:
            self._mark = _max_rss()
            return
        self._reset = _reset_mark(self._proc)
        self._mark = _status_bytes(self._proc, "VmHWM")
        with self._lock:
            self._highest = _status_bytes(self._proc, "VmRSS") or 0
        if self._thread is None and (self._mark is None or not self._reset):
            self._thread = threading.Thread(target=self._sample, name="memory-span", daemon=True)
            self._thread.start()

    def peak(self) -> Peak:
        """Peak so far."""
        if self._baseline is None:
            now = _max_rss()
            if now is None or self._mark is None or self._opened_mark is None or now <= self._mark:
                return Peak(None, None, None, None)
            return Peak(now - self._opened_mark, self._opened_mark, now, "ru_maxrss")
        mark = _status_bytes(self._proc, "VmHWM")
        if mark is not None and self._mark is not None and (self._reset or mark > self._mark):
            return self._grown_to(mark, "VmHWM")
        self._look()
        return self._grown_to(self._highest, "sampled RSS")

    def close(self) -> None:
        """End the sampling thread, if there is one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> MemorySpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _grown_to(self, peak: int, method: str) -> Peak:
        baseline = self._baseline or 0
        return Peak(max(0, peak - baseline), baseline, max(peak, baseline), method)

    def _look(self) -> None:
        with self._lock:
            self._highest = max(self._highest, _status_bytes(self._proc, "VmRSS") or 0)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._look()


def _give_back() -> None:
    """Return freed memory to the system: kept by the allocator, it would hide what is allocated next.

    glibc keeps freed pages in its heap; elsewhere nothing is done.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _reset_mark(proc: Path) -> bool:
    """Set VmHWM to the present VmRSS; False where that is not permitted. See proc(5), clear_refs."""
    try:
        # Not Path.write_text: a system without procfs must not find a new file there.
        with open(proc / "clear_refs", "r+") as file:
            file.write("5")
    except (OSError, ValueError):
        return False
    return True


def _status_bytes(proc: Path, field: str) -> int | None:
    """A field of ``/proc/self/status`` given in kB, as bytes; None if there is none."""
    try:
        lines = (proc / "status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if name == field and words and words[0].isdigit():
            return int(words[0]) * 1024
    return None


def _max_rss() -> int | None:
    """Highest resident size of the process's life, in bytes; macOS counts bytes, others kB."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
