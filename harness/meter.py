"""Measuring a session where it runs: in this process, or on the far side of a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from backends.api import Session
from harness.isolation.child import alone
from harness.measure import Samples, Sampling, measure_decode, measure_first_call, measure_prefill
from harness.memory import MemorySpan
from harness.noise import NoiseWatch
from harness.samples import Taken
from harness.turns import Turns

#: Called between samples with what has been taken so far.
Tell = Callable[[str], None]


class Meter(Protocol):
    """What can be measured of one loaded session; see :mod:`harness.measure`."""

    def first_call(self, prompt: Sequence[int]) -> Samples:
        """The very first ``forward``, over the prompt."""

    def prefill(self, prompt: Sequence[int], sampling: Sampling, tell: Tell) -> Samples:
        """The prompt in one call."""

    def decode(
        self, prompt: Sequence[int], n: int, sampling: Sampling, tell: Tell, driver: str | None = None
    ) -> Samples:
        """``n`` greedy steps after the prompt."""

    def begin(self, what: str, prompt: Sequence[int], n: int = 0, device: str = "cpu") -> int:
        """Start on ``prefill`` or ``decode`` of ``n`` steps; nanoseconds of the first sample, which is not counted."""

    def turn(self, what: str, count: int, settle: bool) -> Taken:
        """``count`` samples of what was begun; ``settle``: another session was measured in between."""

    def end(self, what: str) -> Samples:
        """All samples of what was begun, with what is needed to check them."""

    def peak_bytes(self) -> int | None:
        """Growth of resident memory since before load, or since :meth:`forget`."""

    def forget(self) -> None:
        """Leave the peak so far out of account."""

    def close(self) -> None:
        """Stop watching memory."""


class HereMeter:
    """Of a session in this process; opened before load, so that load's memory counts."""

    def __init__(self) -> None:
        self._span = MemorySpan()
        self.session: Session | None = None
        self._turns: dict[str, Turns] = {}

    def first_call(self, prompt: Sequence[int]) -> Samples:
        with alone(None):
            return measure_first_call(self._loaded(), prompt)

    def prefill(self, prompt: Sequence[int], sampling: Sampling, tell: Tell) -> Samples:
        with alone(None):
            return measure_prefill(self._loaded(), prompt, sampling, tell=tell)

    def decode(
        self, prompt: Sequence[int], n: int, sampling: Sampling, tell: Tell, driver: str | None = None
    ) -> Samples:
        with alone(None):
            return measure_decode(self._loaded(), prompt, n, sampling, driver=driver, tell=tell)

    def begin(self, what: str, prompt: Sequence[int], n: int = 0, device: str = "cpu") -> int:
        turns = self._turns[what] = Turns(self._loaded(), NoiseWatch(device))
        with alone(None):
            return turns.begin(what, prompt, n)

    def turn(self, what: str, count: int, settle: bool) -> Taken:
        with alone(None):
            return self._turns[what].turn(count, settle)

    def end(self, what: str) -> Samples:
        return self._turns[what].end()

    def peak_bytes(self) -> int | None:
        return self._span.peak().growth_bytes

    def forget(self) -> None:
        self._span.forget()

    def close(self) -> None:
        self._span.close()

    def _loaded(self) -> Session:
        assert self.session is not None
        return self.session
