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
from typing import Any, Generic, TypeVar

import numpy as np

from backends.api import Generating, Session, State
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
    "MeasureError",
    "NonFinite",
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


class MeasureError(Exception):
    """A request that cannot be measured, or a session that broke its contract while measured; one line."""


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
    watch = _Watch()
    with _gc_paused():
        start = clock()
        logits, _ = session.forward(prompt, None)
        end = clock()
    watch.see(logits, "sample", 0, 0)
    tokens = tuple(int(token) for token in prompt)
    return Samples(
        len(prompt), (end - start,), SINGLE_CALL, last_prompt=tokens, last_logits=logits, non_finite_at=watch.found
    )


def measure_prefill(
    session: Session,
    prompt: Sequence[int],
    sampling: Sampling,
    clock: Clock = time.perf_counter_ns,
    tell: Tell | None = None,
) -> Samples:
    """Time ``forward(prompt, None)``, and up to the first token id in the same samples.

    Every call gets the prompt turned by one token more, so that a runtime that remembers prompts is not
    timed at remembering.
    """
    watch = _Watch()
    turned = _Turned(prompt)

    def take(phase: str, sample: int) -> tuple[int, int]:
        tokens = turned.next()
        with _gc_paused():
            start = clock()
            logits, _ = session.forward(tokens, None)
            prefill = clock() - start
            watch.see(logits, phase, sample, 0)
            turned.logits = logits
            start = clock()
            _argmax(logits)
            return prefill, prefill + clock() - start

    taken = _collect(take, sampling, clock, tell)
    return Samples(
        tokens=len(prompt),
        ns=tuple(prefill for prefill, _ in taken.samples),
        warmup_ns=tuple(prefill for prefill, _ in taken.warmup),
        stopped=taken.stopped,
        first_token_ns=tuple(first for _, first in taken.samples),
        last_prompt=tuple(turned.tokens),
        last_logits=turned.logits,
        non_finite_at=watch.found,
    )


class _Turned:
    """A prompt, turned by one token more at each ``next``; what the last call over it returned."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = [int(token) for token in prompt]
        self.logits: np.ndarray | None = None

    def next(self) -> list[int]:
        self.tokens = self.tokens[1:] + self.tokens[:1]
        return self.tokens


def measure_decode(
    session: Session,
    prompt: Sequence[int],
    n: int,
    sampling: Sampling,
    clock: Clock = time.perf_counter_ns,
    driver: str | None = None,
    tell: Tell | None = None,
) -> Samples:
    """Time ``n`` greedy steps after the prompt; every sample starts from the same state with another token.

    So a runtime that remembers what followed what is not timed at remembering. After timing, the first
    sample's start is run once more, untimed: whether it gives the same ids is ``ids_varied``.

    ``driver`` is ``loop``, ``greedy``, or None for ``greedy`` where the session has it and ``loop`` else.
    Raises :class:`MeasureError` for a driver the session lacks or a ``greedy`` that gives other than n ids.
    """
    if n < 1:
        raise MeasureError(f"decode of {n} tokens; at least 1 is needed")
    chosen = driver or (GREEDY if isinstance(session, Generating) else LOOP)
    watch = _Watch()
    logits, state = session.forward(prompt, None)
    watch.see(logits, "prompt", 0, 0)
    block, starts = _block(session, chosen, state, n, clock, watch), _Starts(_argmax(logits), logits.size)
    taken = _collect(lambda phase, sample: block(phase, sample, starts.next()), sampling, clock, tell)
    first, last = taken.samples[0], taken.samples[-1]
    again = block("repeat", 0, first.start)
    return Samples(
        tokens=n,
        ns=tuple(sum(run.ns) for run in taken.samples),
        warmup_ns=tuple(sum(run.ns) for run in taken.warmup),
        stopped=taken.stopped,
        driver=chosen,
        steps=tuple(run.ns for run in taken.samples) if chosen == LOOP else (),
        ids=first.ids,
        last_ids=last.ids,
        starts=(first.start, last.start),
        ids_varied=again.ids != first.ids,
        non_finite_at=watch.found,
    )


@dataclass(frozen=True)
class _Run:
    """One decode sample: the time of each timed span (a step, or the block), the token fed first, the ids chosen."""

    ns: tuple[int, ...]
    start: int
    ids: tuple[int, ...]


class _Starts:
    """Tokens to start decode samples with: the most likely one, then others far from each other."""

    def __init__(self, first: int, n_vocab: int) -> None:
        self._first, self._n_vocab, self._taken = first, n_vocab, 0

    def next(self) -> int:
        stride = 7919  # a prime, so that no vocabulary but its multiples repeats early
        self._taken += 1
        return (self._first + (self._taken - 1) * stride) % self._n_vocab


def _block(
    session: Session, driver: str, state: State, n: int, clock: Clock, watch: _Watch
) -> Callable[[str, int, int], _Run]:
    """What takes one decode sample with ``driver`` from a token."""
    if driver == LOOP:
        return lambda phase, sample, token: _loop(session, token, state, n, clock, watch, phase, sample)
    if driver != GREEDY:
        raise MeasureError(f"no decode driver {driver!r}; there are {LOOP} and {GREEDY}")
    if not isinstance(session, Generating):
        raise MeasureError("driver greedy: this backend has no greedy loop of its own; use driver loop")
    generating = session

    def take(phase: str, sample: int, token: int) -> _Run:
        with _gc_paused():
            start = clock()
            ids, after = generating.greedy(token, state, n)
            end = clock()
        if len(ids) != n:
            raise MeasureError(f"greedy gave {len(ids)} ids where {n} were asked; its time would mean nothing")
        # A NaN that reached the recurrent state stays there, so the next step shows it. One that only a step's
        # logits had is out of sight here; the driver ``loop`` sees it.
        watch.see(session.forward([int(ids[-1])], after)[0], phase, sample, n)
        return _Run((end - start,), token, tuple(int(i) for i in ids))

    return take


def _loop(
    session: Session, token: int, state: State, n: int, clock: Clock, watch: _Watch, phase: str, sample: int
) -> _Run:
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
    return _Run(tuple(times), first, tuple(ids))


@dataclass(frozen=True)
class _Collected(Generic[T]):
    warmup: tuple[T, ...]
    samples: tuple[T, ...]
    stopped: str


def _collect(
    take: Callable[[str, int], T], sampling: Sampling, clock: Clock, tell: Tell | None = None
) -> _Collected[T]:
    """Warm up, then ``take(phase, i)`` until there are enough samples or the budget is spent."""
    tell = tell or (lambda text: None)
    limit = None if sampling.budget_s is None else clock() + int(sampling.budget_s * 1e9)
    warmup: list[T] = []
    while len(warmup) < sampling.warmup:
        warmup.append(take("warm-up", len(warmup)))
        tell("warm-up")
        if limit is not None and clock() >= limit:
            break
    samples: list[T] = []
    while len(samples) < sampling.repeats:
        if len(samples) >= sampling.minimum and limit is not None and clock() >= limit:
            return _Collected(tuple(warmup), tuple(samples), TIME_BUDGET)
        samples.append(take("sample", len(samples)))
        tell(f"sample {len(samples)} of {sampling.repeats}")
    return _Collected(tuple(warmup), tuple(samples), REPEATS_REACHED)


@dataclass
class _Watch:
    """Remembers the first logit that is not finite, and refuses what is not host logits."""

    found: NonFinite | None = None

    def see(self, logits: Any, phase: str, sample: int, step: int) -> None:
        # An array still on a device, or a promise of one, would have been timed before it was computed.
        if not isinstance(logits, np.ndarray) or logits.ndim != 1 or logits.size == 0:
            what = f"an array of shape {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
            raise MeasureError(f"forward returned {what}; float32 numpy (n_vocab,) in host memory is the contract")
        if self.found is None and not np.isfinite(logits).all():
            bad = np.isnan(logits)
            index = int(np.argmax(bad if bad.any() else np.isinf(logits)))
            self.found = NonFinite(phase, sample, step, index, str(float(logits[index])))


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
