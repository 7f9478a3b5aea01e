"""One quantity of a loaded session, measured in turns with those of other sessions. Runs where the backend runs.

Between two turns of a cell, others have had the caches and the cores. So a turn in company begins with a
call that is not counted: the same as is timed where that is short, a single token where it is long (then
what the caches held matters little). Needs only the standard library and numpy, and Python 3.9.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from backends.api import Session
from harness.measure import Clock, DecodeTimer, PrefillTimer, Run
from harness.noise import NoiseWatch
from harness.samples import LOOP, Samples, Taken

PREFILL, DECODE = "prefill", "decode"

#: A call that takes longer than this is not made only to settle.
SETTLING_NS = 20_000_000


class Turns:
    """``begin`` once, then ``turn`` after turn, then ``end``; ``noise`` is watched during each turn."""

    def __init__(self, session: Session, noise: NoiseWatch, clock: Clock = time.perf_counter_ns) -> None:
        self._session, self._noise, self._clock = session, noise, clock
        self._timer: PrefillTimer | DecodeTimer | None = None
        self._token = 0
        self._first: Run | None = None
        self._runs: list[Run] = []

    def begin(self, what: str, prompt: Sequence[int], n: int = 0, driver: str | None = None) -> int:
        """Start on ``prefill`` or ``decode`` with one sample of warm-up; its nanoseconds.

        Raises :class:`harness.measure.MeasureError`.
        """
        if what == PREFILL:
            self._timer = PrefillTimer(self._session, prompt, self._clock)
        else:
            self._timer = DecodeTimer(self._session, prompt, n, self._clock, driver)
        self._token = int(prompt[0])
        self._first, self._runs = self._timer.take("warm-up", 0), []
        return self._first.total

    def turn(self, count: int, settle: bool) -> Taken:
        """``count`` samples; ``settle``: others have had a turn since the last one."""
        assert self._timer is not None
        assert self._first is not None
        settling = self._settle(self._timer, self._first.total) if settle else 0
        began, start = time.time(), self._clock()
        self._noise.begin()
        runs = [self._timer.take("sample", len(self._runs) + i) for i in range(count)]
        noise = self._noise.end()
        seconds = (self._clock() - start) / 1e9
        self._runs += runs
        found = self._timer.watch.found
        loop = isinstance(self._timer, DecodeTimer) and self._timer.driver == LOOP
        return Taken(
            ns=tuple(run.total for run in runs),
            first_token_ns=tuple(run.first_token_ns for run in runs) if isinstance(self._timer, PrefillTimer) else (),
            steps=tuple(run.ns for run in runs) if loop else (),
            settling_ns=settling,
            began=began,
            seconds=seconds,
            noise=noise,
            non_finite_at=found,
        )

    def end(self) -> Samples:
        """All of this session's samples, with what the last call was given and gave, for whoever checks it."""
        assert self._timer is not None
        assert self._first is not None
        taken = self._runs or [self._first]
        return self._timer.samples([self._first], taken, "")

    def _settle(self, timer: PrefillTimer | DecodeTimer, usual_ns: int) -> int:
        start = self._clock()
        if usual_ns <= SETTLING_NS:
            timer.take("settling", len(self._runs))
        else:
            self._session.forward([self._token], None)
        return self._clock() - start
