"""The far side of an isolated session: holds the backend and its states, answers one request at a time.

Started as ``python -I -c BOOT ARCHIVE READ WRITE``: the code comes from the archive, requests and answers
go over two descriptors nobody else knows. Whatever the backend prints goes to stdout and stderr, which the
near side only drains.

    request   {"do": name, "id": number, "free": [state ids], ...} and arrays
    answer    {"id", "ok": {...}} and arrays, or {"id", "error": {"kind", "name", "text", "how", "traceback"}}
    between   {"id", "event": "tap" | "progress", ...}: does not end the request

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

import backends
import harness
import reference
from backends.api import (
    Batched,
    Closing,
    Declaring,
    Generating,
    Scoring,
    StateAccess,
    Traceable,
    Unavailable,
    Unsupported,
)
from harness.batch import batched
from harness.isolation import lifeline
from harness.isolation.frames import Channel, ChannelClosed, sendable
from harness.isolation.placement import parse, pin
from harness.isolation.sources import backend_of, loaded, optional, weights_of
from harness.measure import (
    MeasureError,
    measure_decode,
    measure_first_call,
    measure_prefill,
    timed_load,
)
from harness.memory import MemorySpan
from harness.noise import NoiseWatch
from harness.samples import Samples, Sampling
from harness.turns import DECODE, PREFILL, Turns
from reference import errors
from reference.errors import InputError

Answer = tuple  # (mapping, arrays)

#: Capability protocols by name: what the near side's session will offer.
CAPABILITIES: dict[str, Any] = {
    "scoring": Scoring,
    "trace": Traceable,
    "state": StateAccess,
    "greedy": Generating,
    "batch": Batched,
}


def main(archive: str, read_file: int, write_file: int) -> None:
    """Serve until the channel closes or ``close`` is asked."""
    lifeline.hold()
    _die_first()
    _check_code(archive)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is told in the row, not left in the user's folder
    for file in {read_file, write_file}:
        os.set_inheritable(file, False)
    channel = Channel(read_file, write_file)
    channel.greet()
    worker = Worker(channel)
    with contextlib.suppress(ChannelClosed):
        while worker.serving:
            worker.serve_one()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a library's exit handlers have nothing left to do that matters, and some hang


class Worker:
    """One session and its states, by number."""

    def __init__(self, channel: Channel) -> None:
        self.serving = True
        self._channel = channel
        self._session: Any = None
        self._span: MemorySpan | None = None
        self._states: dict[int, Any] = {}
        self._turns: dict[str, Turns] = {}
        self._count = 0
        self._asked = 0

    def serve_one(self) -> None:
        """Receive a request, answer it."""
        request, arrays = self._channel.receive()
        self._asked = request.pop("id")
        for number in request.pop("free", ()):
            self._states.pop(number, None)
        handler: Callable[..., Answer] = getattr(self, f"do_{request.pop('do')}")
        try:
            answer, out = handler(*arrays, **request)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is an answer
            self._channel.send({"id": self._asked, "error": _described(error)})
            return
        self._channel.send({"id": self._asked, "ok": answer}, out)

    def do_hello(self) -> Answer:
        """Who and where this is."""
        return {"python": platform.python_version(), "pid": os.getpid(), "machine": platform.machine()}, ()

    def do_open(
        self,
        backend: Mapping[str, str],
        model: Mapping[str, Any],
        scheme: str,
        device: str,
        threads: int | None,
        cpus: str | None,
        change: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Load a model into a backend; times and memory are taken here."""
        placed = pin(None if cpus is None else parse(cpus))
        module = backend_of(backend)
        optional(module, "check")
        weights = weights_of(model)
        optional(module, "prepare", weights, scheme, device)  # finds what do_prepare left in the cache
        self.tell("loading")
        self._span = MemorySpan()
        self._session, load_ns = timed_load(lambda: loaded(module, weights, scheme, device, threads, change))
        version, session = optional(module, "version"), self._session
        return {
            "version": None if version is None else str(version),
            "capabilities": [name for name, kind in CAPABILITIES.items() if isinstance(session, kind)],
            "arithmetic": asdict(session.declared_arithmetic()) if isinstance(session, Declaring) else None,
            "load_ns": load_ns,
            "cpus": placed,
        }, ()

    def do_prepare(self, backend: Mapping[str, str], model: Mapping[str, Any], scheme: str, device: str) -> Answer:
        """Write what ``load`` will want into the cache; seconds that took."""
        module = backend_of(backend)
        optional(module, "check")
        self.tell("preparing the model file")
        start = time.perf_counter()
        optional(module, "prepare", weights_of(model), scheme, device)
        return {"seconds": time.perf_counter() - start}, ()

    def do_call(
        self, backend: Mapping[str, str], name: str, model: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> Answer:
        """What a function that only this backend has returns for a model; for a command that is about one backend."""
        module = backend_of(backend)
        self.tell(name.replace("_", " "))
        return {"told": getattr(module, name)(weights_of(model), **arguments)}, ()

    def do_check(self, backend: Mapping[str, str]) -> Answer:
        """Whether the backend can run here; raises what its ``check`` raises."""
        module = backend_of(backend)
        optional(module, "check")
        version = optional(module, "version")
        return {"version": None if version is None else str(version)}, ()

    def do_forward(self, tokens: Sequence[int], state: int | None) -> Answer:
        logits, after = self._session.forward(tokens, self._state(state))
        return self._answer(logits, self._keep(after))

    def do_logits(self, tokens: Sequence[int], state: int | None) -> Answer:
        return self._answer(self._session.logits(tokens, self._state(state)))

    def do_trace(self, tokens: Sequence[int], state: int | None) -> Answer:
        logits, after = self._session.trace(tokens, self._state(state), self._tap)
        return self._answer(logits, self._keep(after))

    def do_forward_batch(self, tokens: Sequence[Sequence[int]], state: int | None) -> Answer:
        logits, after = self._session.forward_batch(tokens, self._state(state))
        return self._answer(logits, self._keep(after))

    def do_batch(self, name: str, size: int, n_vocab: int) -> Answer:
        """From now on every call runs that many sequences side by side (:mod:`harness.batch`)."""
        self._session = batched(name, self._session, size, n_vocab)
        return {}, ()

    def do_export_state(self, state: int | None) -> Answer:
        return self._answer(self._session.export_state(self._state(state)))

    def do_import_state(self, canonical: np.ndarray) -> Answer:
        return {"state": self._keep(self._session.import_state(canonical))}, ()

    def do_greedy(self, token: int, state: int | None, n: int) -> Answer:
        ids, after = self._session.greedy(token, self._state(state), n)
        return self._answer(ids, self._keep(after))

    def do_first_call(self, prompt: Sequence[int]) -> Answer:
        return self._measured(measure_first_call(self._session, prompt))

    def do_prefill(self, prompt: Sequence[int], sampling: Mapping[str, Any]) -> Answer:
        return self._measured(measure_prefill(self._session, prompt, Sampling(**sampling), tell=self.tell))

    def do_decode(self, prompt: Sequence[int], n: int, sampling: Mapping[str, Any], driver: str | None) -> Answer:
        found = measure_decode(self._session, prompt, n, Sampling(**sampling), driver=driver, tell=self.tell)
        return self._measured(found)

    def do_rates(self, device: str, threads: int) -> Answer:
        """Read bandwidth and matrix rate of where this runs (:mod:`harness.machine.work`)."""
        from harness.machine.facts import facts
        from harness.machine.work import measure_cpu, measure_device

        self.tell("measuring read bandwidth and matrix rate")
        if device != "cpu":
            return measure_device(device), ()
        return measure_cpu(threads, facts().cpu.last_level_bytes or 0), ()

    def do_prefill_begin(self, prompt: Sequence[int], n: int, device: str) -> Answer:
        return self._begin(PREFILL, prompt, n, device)

    def do_prefill_turn(self, count: int, settle: bool) -> Answer:
        return {"taken": self._turns[PREFILL].turn(count, settle).to_dict()}, ()

    def do_prefill_end(self) -> Answer:
        return self._measured(self._turns[PREFILL].end())

    def do_decode_begin(self, prompt: Sequence[int], n: int, device: str) -> Answer:
        return self._begin(DECODE, prompt, n, device)

    def do_decode_turn(self, count: int, settle: bool) -> Answer:
        return {"taken": self._turns[DECODE].turn(count, settle).to_dict()}, ()

    def do_decode_end(self) -> Answer:
        return self._measured(self._turns[DECODE].end())

    def _begin(self, what: str, prompt: Sequence[int], n: int, device: str) -> Answer:
        turns = self._turns[what] = Turns(self._session, NoiseWatch(device))
        return {"ns": turns.begin(what, prompt, n)}, ()

    def do_peak(self) -> Answer:
        """Growth of resident memory since load, in bytes."""
        return {"growth": None if self._span is None else self._span.peak().growth_bytes}, ()

    def do_forget(self) -> Answer:
        """Leave the peak so far out of account."""
        if self._span is not None:
            self._span.forget()
        return {}, ()

    def do_close(self) -> Answer:
        """Free what the backend holds; the last request."""
        self.serving = False
        self._states.clear()
        if isinstance(self._session, Closing):
            self._session.close()
        return {}, ()

    def tell(self, text: str) -> None:
        """Say what is being done: a sign of life for the near side's time limit."""
        self._channel.send({"id": self._asked, "event": "progress", "text": text})

    def _tap(self, name: str, array: np.ndarray) -> None:
        self._channel.send({"id": self._asked, "event": "tap", "name": name}, [np.asarray(array)])

    def _state(self, number: int | None) -> Any:
        return None if number is None else self._states[number]

    def _keep(self, state: Any) -> int:
        self._count += 1
        self._states[self._count] = state
        return self._count

    @staticmethod
    def _answer(value: Any, state: int | None = None) -> Answer:
        """An array as it is; anything else by its type, for the near side to judge."""
        told: dict[str, Any] = {"state": state}
        if sendable(value):
            return told, (value,)
        if isinstance(value, np.ndarray):
            told.update(dtype=str(value.dtype), shape=list(value.shape))
        return {**told, "type": type(value).__name__}, ()

    def _measured(self, samples: Samples) -> Answer:
        """Samples as plain JSON, the logits of the last call as an array."""
        logits = samples.last_logits
        told, arrays = ({}, ()) if logits is None else self._answer(logits)
        return {**told, "samples": samples.to_dict()}, arrays


def _described(error: Exception) -> dict[str, Any]:
    """``kind`` is never a name that the backend chose: it may call its own exception like one of ours."""
    kinds = (Unavailable, Unsupported, MeasureError, InputError)
    kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "other")
    if isinstance(error, InputError) and hasattr(errors, type(error).__name__):
        kind = type(error).__name__
    text = error.reason if isinstance(error, Unavailable) else str(error)
    how = error.how_to_get_it if isinstance(error, Unavailable) else ""
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"kind": kind, "name": type(error).__name__, "text": text, "how": how, "traceback": lines}


def _check_code(archive: str) -> None:
    """Refuse to run other code than the near side's own: results would be compared with what was not asked."""
    for package in (harness, reference, backends):
        found = os.path.realpath(str(package.__file__))
        if not found.startswith(os.path.realpath(archive) + os.sep):
            sys.exit(f"{package.__name__} comes from {found}, not from {archive}; the environment holds a copy of it")


def _die_first() -> None:
    """Linux: where memory ends, the kernel is to end this process, not the harness beside it."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        file.write("800")
