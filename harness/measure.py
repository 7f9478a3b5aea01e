"""Timing of a loaded session: prefill, first token, decode. Runs in the process that runs the backend.

    prefill        one ``forward`` over the whole prompt from the initial state, logits on the host
    first token    the same plus the arg-max: prompt in, token id in hand, on a *warm* session. What a
                   user waits for on a cold one is load + first call, which are rows of their own
    first call     the very first ``forward`` after load, lazy compilation and page faults included
    decode         single-token steps from the state after the prompt, fed greedily

Tokenisation, sampling (the arg-max between decode steps) and every check of a result lie outside the
timed spans. All times are integer nanoseconds of an injected clock, and raw: statistics are derived
when read (:mod:`harness.stats`). Whatever the backend raises, Ctrl-C included, goes through.

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from backends.api import Generating, Session, State
from harness.logits_watch import MeasureError, Watch
from harness.samples import (
    GREEDY,
    LOOP,
    REPEATS_REACHED,
    SINGLE_CALL,
    TIME_BUDGET,
    NonFinite,
    Samples,
    Sampling,
    Workload,
)

__all__ = [
    "DecodeTimer",
    "MeasureError",
    "NonFinite",
    "PrefillTimer",
    "Run",
    "Samples",
    "Sampling",
    "Workload",
    "measure_decode",
    "measure_first_call",
    "measure_prefill",
    "timed_load",
]

Clock = Callable[[], int]
#: Called between samples, outside every timed span, with what has been taken so far.
Tell = Callable[[str], None]
T = TypeVar("T")


def timed_load(load: Callable[[], T], clock: Clock = time.perf_counter_ns) -> tuple[T, int]:
    """Call ``load`` once: what it returned, and nanoseconds.

    The garbage collector stays on: beside seconds of reading it costs nothing, and with it off the
    cycles a conversion leaves behind would count as peak memory.
    """
    start = clock()
    loaded = load()
    return loaded, clock() - start


def measure_first_call(session: Session, prompt: Sequence[int], clock: Clock = time.perf_counter_ns) -> Samples:
    """The first ``forward`` after load, over the prompt; meaningful once per loaded session."""
    watch = Watch()
    with _gc_paused():
        start = clock()
        logits, _ = session.forward(prompt, None)
        end = clock()
    watch.see(logits, "sample", 0, 0)
    tokens = tuple(int(token) for token in prompt)
    return Samples(
        len(prompt), (end - start,), SINGLE_CALL, last_prompt=tokens, last_logits=logits, non_finite_at=watch.found
    )


class PrefillTimer:
    """Times ``forward(prompt, None)``, and up to the first token id in the same samples.

    Every call gets the prompt turned by one token more, so that a runtime that remembers prompts is not
    timed at remembering.
    """

    def __init__(self, session: Session, prompt: Sequence[int], clock: Clock = time.perf_counter_ns) -> None:
        self._session, self._clock = session, clock
        self._tokens = [int(token) for token in prompt]
        self._logits: np.ndarray | None = None
        self.watch = Watch()

    def take(self, phase: str, sample: int) -> Run:
        """One sample; ``phase`` and ``sample`` name it where a logit is not finite."""
        self._tokens = self._tokens[1:] + self._tokens[:1]
        with _gc_paused():
            start = self._clock()
            logits, _ = self._session.forward(self._tokens, None)
            prefill = self._clock() - start
            self.watch.see(logits, phase, sample, 0)
            self._logits = logits
            start = self._clock()
            _argmax(logits)
            return Run((prefill,), first_token_ns=prefill + self._clock() - start)

    def samples(self, warmup: Sequence[Run], taken: Sequence[Run], stopped: str) -> Samples:
        """What has been taken, with what the last call was given and gave."""
        return Samples(
            tokens=len(self._tokens),
            ns=tuple(run.total for run in taken),
            warmup_ns=tuple(run.total for run in warmup),
            stopped=stopped,
            first_token_ns=tuple(run.first_token_ns for run in taken),
            last_prompt=tuple(self._tokens),
            last_logits=self._logits,
            non_finite_at=self.watch.found,
        )


def measure_prefill(
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    clock: Clock = time.perf_counter_ns,
    tell: Tell | None = None,
) -> Samples:
    """Time a prompt with a :class:`PrefillTimer`, warm-up first, until there are enough samples."""
    timer = PrefillTimer(session, prompt, clock)
    return timer.samples(*_collect(timer.take, sampling, clock, tell))


class DecodeTimer:
    """Times ``n`` greedy steps after the prompt; every sample starts from the same state with another token.

    So a runtime that remembers what followed what is not timed at remembering. ``driver`` is ``loop``,
    ``greedy``, or None for ``greedy`` where the session has it and ``loop`` else. Raises
    :class:`MeasureError` for a driver the session lacks or a ``greedy`` that gives other than n ids.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        n: int,
        clock: Clock = time.perf_counter_ns,
        driver: str | None = None,
    ) -> None:
        if n < 1:
            raise MeasureError(f"decode of {n} tokens; at least 1 is needed")
        self._n = n
        self.driver = driver or (GREEDY if isinstance(session, Generating) else LOOP)
        self.watch = Watch()
        logits, state = session.forward(prompt, None)
        self.watch.see(logits, "prompt", 0, 0)
        self._block = _block(session, self.driver, state, n, clock, self.watch)
        self._next, self._n_vocab = _argmax(logits), logits.size

    def take(self, phase: str, sample: int) -> Run:
        """One sample; ``phase`` and ``sample`` name it where a logit is not finite."""
        token, self._next = self._next, (self._next + _STRIDE) % self._n_vocab
        return self._block(phase, sample, token)

    def samples(self, warmup: Sequence[Run], taken: Sequence[Run], stopped: str) -> Samples:
        """What has been taken. The first sample's start is run once more, untimed: whether it gives the same
        ids is ``ids_varied``."""
        first, last = taken[0], taken[-1]
        again = self._block("repeat", 0, first.start)
        return Samples(
            tokens=self._n,
            ns=tuple(run.total for run in taken),
            warmup_ns=tuple(run.total for run in warmup),
            stopped=stopped,
            driver=self.driver,
            steps=tuple(run.ns for run in taken) if self.driver == LOOP else (),
            ids=first.ids,
            last_ids=last.ids,
            starts=(first.start, last.start),
            ids_varied=again.ids != first.ids,
            non_finite_at=self.watch.found,
        )


def measure_decode(
    session: Session,
    prompt: Sequence[int],
    n: int,
    sampling: Sampling,
    clock: Clock = time.perf_counter_ns,
    driver: str | None = None,
    tell: Tell | None = None,
) -> Samples:
    """Time greedy steps with a :class:`DecodeTimer`, warm-up first, until there are enough samples."""
    timer = DecodeTimer(session, prompt, n, clock, driver)
    return timer.samples(*_collect(timer.take, sampling, clock, tell))


@dataclass(frozen=True)
class Run:
    """One sample: the time of each timed span (a call, a step, or a block of steps), and what went in and came out.

    first_token_ns  prefill: up to the token id
    start, ids      decode: the token fed first, the ids chosen
    """

    ns: tuple[int, ...]
    first_token_ns: int = 0
    start: int = 0
    ids: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Time of the sample."""
        return sum(self.ns)


#: Between the tokens that decode samples start with: a prime, so that no vocabulary but its multiples repeats early.
_STRIDE = 7919


def _block(
    session: Session, driver: str, state: State, n: int, clock: Clock, watch: Watch
) -> Callable[[str, int, int], Run]:
    """What takes one decode sample with ``driver`` from a token."""
    if driver == LOOP:
        return lambda phase, sample, token: _loop(session, token, state, n, clock, watch, phase, sample)
    if driver != GREEDY:
        raise MeasureError(f"no decode driver {driver!r}; there are {LOOP} and {GREEDY}")
    if not isinstance(session, Generating):
        raise MeasureError("driver greedy: this backend has no greedy loop of its own; use driver loop")
    generating = session

    def take(phase: str, sample: int, token: int) -> Run:
        with _gc_paused():
            start = clock()
            ids, after = generating.greedy(token, state, n)
            end = clock()
        if len(ids) != n:
            raise MeasureError(f"greedy gave {len(ids)} ids where {n} were asked; its time would mean nothing")
        # A NaN that reached the recurrent state stays there, so the next step shows it. One that only a step's
        # logits had is out of sight here; the driver ``loop`` sees it.
        watch.see(session.forward([int(ids[-1])], after)[0], phase, sample, n)
        return Run((end - start,), start=token, ids=tuple(int(i) for i in ids))

    return take


def _loop(
    session: Session, token: int, state: State, n: int, clock: Clock, watch: Watch, phase: str, sample: int
) -> Run:
    times, ids, first = [], [], token
    for step in range(n):
        with _gc_paused():
            start = clock()
            logits, state = session.forward([token], state)
            end = clock()
        times.append(end - start)
        watch.see(logits, phase, sample, step)
        token = _argmax(logits)
        ids.append(token)
    return Run(tuple(times), start=first, ids=tuple(ids))


def _collect(
    take: Callable[[str, int], Run], sampling: Sampling, clock: Clock, tell: Tell | None = None
) -> tuple[list[Run], list[Run], str]:
    """Warm up, then ``take(phase, i)`` until there are enough samples or the budget is spent.

    The runs of the warm-up, the others, and why it ended.
    """
    tell = tell or (lambda text: None)
    limit = None if sampling.budget_s is None else clock() + int(sampling.budget_s * 1e9)
    warmup: list[Run] = []
    while len(warmup) < sampling.warmup:
        warmup.append(take("warm-up", len(warmup)))
        tell("warm-up")
        if limit is not None and clock() >= limit:
            break
    taken: list[Run] = []
    while len(taken) < sampling.repeats:
        if len(taken) >= sampling.minimum and limit is not None and clock() >= limit:
            return warmup, taken, TIME_BUDGET
        taken.append(take("sample", len(taken)))
        tell(f"sample {len(taken)} of {sampling.repeats}")
    return warmup, taken, REPEATS_REACHED


def _argmax(logits: np.ndarray) -> int:
    return int(np.argmax(logits))


@contextmanager
def _gc_paused() -> Iterator[None]:
    """No garbage collection inside; afterwards, however it ended, as it was before."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
