"""Power of a Mac while something runs, from ``powermetrics``, which only root may start.

It tells the mean power of one window after another. One process of it runs beside everything that is measured; what
counts for a span are the windows that lie wholly in it, so that no idle moment before or after is charged to it.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import atexit
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

COMMAND = ("powermetrics", "--samplers", "cpu_power,gpu_power", "-b", "0", "-i", "100")

_WINDOW = re.compile(r"Sampled system activity .*\((\d+(?:\.\d+)?)ms elapsed\)")


@dataclass
class _Window:
    """``began`` and ``ended`` by our clock, in ns; ``text`` as far as it has come."""

    began: int
    ended: int
    text: str = ""


class Windows:
    """Reads what powermetrics prints, as it comes."""

    source = "powermetrics, CPU and GPU"

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._windows: list[_Window] = []
        self._began = 0
        self._over = False

    def read(self, lines: Iterable[str]) -> None:
        """Until ``lines`` end. A window is told of the moment it ends."""
        for line in lines:
            found = _WINDOW.search(line)
            with self._lock:
                if found:
                    now = self._clock()
                    self._windows.append(_Window(now - int(float(found[1]) * 1e6), now))
                elif self._windows:
                    self._windows[-1].text += line
        self._over = True

    def begin(self) -> None:
        """A span begins now."""
        with self._lock:
            self._began = self._clock()
            del self._windows[:-1]

    def end(self) -> tuple[float, float] | None:
        """Joules and seconds of the windows since, 0 and 0 for a span too short to hold one.

        ``None`` once powermetrics no longer tells.
        """
        with self._lock:
            inside = [window for window in self._windows if window.began >= self._began]
            told = [(parse(window.text), (window.ended - window.began) / 1e9) for window in inside]
        known = [(watts * seconds, seconds) for watts, seconds in told if watts is not None]
        if not known and self._over:
            return None
        return sum(joules for joules, _ in known), sum(seconds for _, seconds in known)


@lru_cache(maxsize=1)
def windows(command: Sequence[str] = COMMAND) -> Windows | None:
    """Started once in this process, and ended with it; ``None`` where it does not start."""
    try:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    atexit.register(running.kill)
    found = Windows()
    threading.Thread(target=found.read, args=(running.stdout,), daemon=True).start()
    return found


def parse(text: str) -> float | None:
    """Watts of processor and graphics together; ``None`` where the text does not say."""
    found = re.search(r"^Combined Power.*?:\s*(\d+(?:\.\d+)?)\s*mW", text, re.MULTILINE)
    if found:
        return float(found[1]) / 1e3
    parts = dict(re.findall(r"^(CPU|GPU) Power:\s*(\d+(?:\.\d+)?)\s*mW", text, re.MULTILINE))
    return sum(map(float, parts.values())) / 1e3 if len(parts) == 2 else None
