"""The near side of an isolated session: the contract of a backend, spoken over a channel.

States stay on the far side; what the caller holds is a handle that frees its state when it is dropped.

    RemoteError  the backend raised something that is not of the contract; ``traceback`` is the far side's
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from backends.api import State, Tap, Unavailable, Unsupported
from harness.isolation.answers import check_answer
from harness.isolation.child import CLOSING_SECONDS, Child, ChildDied, alone
from harness.isolation.frames import sendable
from harness.measure import MeasureError, Samples, Sampling
from harness.samples import Taken
from reference import errors
from reference.errors import InputError

#: Stands, in what a host tells of a worker that has died, for what only the near side knows.
DOING = "{doing}"


#: Seconds that measuring the machine's own rates may take: a runtime is imported for it, and its device woken.
PROBING_SECONDS = 180.0


class RemoteError(Exception):
    """What the far side's backend raised, by name; ``traceback`` as it was there."""

    def __init__(self, text: str, traceback: str) -> None:
        super().__init__(text)
        self.traceback = traceback


class Handle:
    """A state on the far side of ``line``, which is told its number when nobody holds it any more."""

    __slots__ = ("line", "number")

    def __init__(self, number: int, line: Line) -> None:
        self.number, self.line = number, line

    def __del__(self) -> None:
        self.line.dropped(self.number)


class Line:
    """Requests and answers over one child's channel."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._dropped: list[int] = []
        self._count = 0
        self._lock, self._asking = threading.RLock(), False
        self.greeted()

    def greeted(self) -> None:
        """Wait until the far side says that frames follow."""
        with self.child.waiting("starting"):
            self.child.channel.await_greeting()

    def ask(
        self,
        do: str,
        arrays: Sequence[np.ndarray] = (),
        event: Callable[[Mapping[str, Any], list[np.ndarray]], None] | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """One request and its answer; ``event`` gets what comes in between.

        What ``event`` raises is raised once the answer is here, so that the next request does not get it.
        """
        problem: Exception | None = None
        with self._alone_with(do) as freed:
            self._count += 1
            self.child.channel.send({"do": do, "id": self._count, "free": freed, **arguments}, arrays)
            while True:
                header, found = self.child.channel.receive()
                if not (self.child.elsewhere and "died" in header):  # which the host says, not the worker
                    check_answer(header, found, do, self._count)
                self.child.sign_of_life()
                if "event" not in header:
                    break
                if event is not None and problem is None:
                    try:
                        event(header, found)
                    except Exception as error:  # noqa: BLE001 - the caller's own, raised below
                        problem = error
        if problem is not None:
            raise problem
        if "died" in header:
            raise ChildDied(str(header["died"]).replace(DOING, do.replace("_", " ")))
        if "error" in header:
            _raise(header["error"])
        return header["ok"], found

    @contextmanager
    def _alone_with(self, do: str) -> Iterator[list[int]]:
        """One request at a time: other threads wait their turn. Gives the states to be freed."""
        with self._lock:
            if self._asking:
                raise RuntimeError(f"{do} was asked by a callback of a request that is still being answered")
            freed, self._dropped = self._dropped, []
            self._asking = True
            try:
                with self.child.waiting(do.replace("_", " "), self._limit(do)):
                    yield freed
            finally:
                self._asking = False

    def _limit(self, do: str) -> float | None:
        """Seconds without a sign of life; ``None``: as long as the backend may take."""
        if do == "rates":  # not the backend's work, so its limit, which may be short, says nothing of it
            return max(self.child.timeout, PROBING_SECONDS)
        return CLOSING_SECONDS if do == "close" else None

    def open(self, tell: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
        """Load a model; what the far side says of the session."""
        answer, _ = self.ask("open", event=_progress(tell), **arguments)
        return answer

    def prepare(self, tell: Callable[[str], None], **arguments: Any) -> float:
        """Have the model file written; seconds that took."""
        answer, _ = self.ask("prepare", event=_progress(tell), **arguments)
        return float(answer["seconds"])

    def handle(self, number: int) -> Handle:
        """What the caller holds for a state."""
        return Handle(number, self)

    def number(self, state: State | None) -> int | None:
        """The number of a state of this session's."""
        if state is None:
            return None
        if not isinstance(state, Handle) or state.line is not self:
            what = "another session" if isinstance(state, Handle) else f"another kind, {type(state).__name__},"
            raise MeasureError(f"a state of {what} was given to an isolated session")
        return state.number

    def dropped(self, number: int) -> None:
        """Nobody holds that state any more; told with the next request, since a destructor must not talk."""
        self._dropped.append(number)


class RemoteSession:
    """``forward`` of a session elsewhere; the optional capabilities are mixed in by :func:`remote_session`."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def line(self) -> Line:
        """For what is asked of the far side besides the contract."""
        return self._line

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        answer, arrays = self._line.ask("forward", tokens=_ids(tokens), state=self._line.number(state))
        return _array(answer, arrays), self._line.handle(answer["state"])


class _Scoring(RemoteSession):
    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        answer, arrays = self._line.ask("logits", tokens=_ids(tokens), state=self._line.number(state))
        return _array(answer, arrays)


class _Traceable(RemoteSession):
    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        def event(header: Mapping[str, Any], arrays: list[np.ndarray]) -> None:
            if header["event"] == "tap":
                tap(header["name"], arrays[0])

        answer, arrays = self._line.ask("trace", event=event, tokens=_ids(tokens), state=self._line.number(state))
        return _array(answer, arrays), self._line.handle(answer["state"])


class _StateAccess(RemoteSession):
    def export_state(self, state: State) -> np.ndarray:
        answer, arrays = self._line.ask("export_state", state=self._line.number(state))
        return _array(answer, arrays)

    def import_state(self, canonical: np.ndarray) -> State:
        if not sendable(canonical):
            raise MeasureError(f"a canonical state is a float32 array, not {type(canonical).__name__}")
        answer, _ = self._line.ask("import_state", [canonical])
        return self._line.handle(answer["state"])


class _Generating(RemoteSession):
    def greedy(self, token: int, state: State, n: int) -> tuple[np.ndarray, State]:
        answer, arrays = self._line.ask("greedy", token=int(token), state=self._line.number(state), n=int(n))
        return _array(answer, arrays), self._line.handle(answer["state"])


class _Batched(RemoteSession):
    def forward_batch(self, tokens: Sequence[Sequence[int]], states: State | None) -> tuple[np.ndarray, State]:
        rows = [_ids(row) for row in tokens]
        answer, arrays = self._line.ask("forward_batch", tokens=rows, state=self._line.number(states))
        return _array(answer, arrays), self._line.handle(answer["state"])


_MIXINS: dict[str, type[RemoteSession]] = {
    "scoring": _Scoring,
    "trace": _Traceable,
    "state": _StateAccess,
    "greedy": _Generating,
    "batch": _Batched,
}


def remote_session(line: Line, capabilities: Sequence[str]) -> RemoteSession:
    """A session with exactly the methods that the far side's has."""
    bases = tuple(_MIXINS[name] for name in capabilities) or (RemoteSession,)
    made: RemoteSession = type("RemoteSession", bases, {})(line)
    return made


class RemoteMeter:
    """Measuring on the far side: its clock, its memory; what comes back are samples."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def first_call(self, prompt: Sequence[int]) -> Samples:
        return self._samples("first_call", None, prompt=_ids(prompt))

    def prefill(self, prompt: Sequence[int], sampling: Sampling, tell: Callable[[str], None]) -> Samples:
        return self._samples("prefill", tell, prompt=_ids(prompt), sampling=asdict(sampling))

    def decode(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        tell: Callable[[str], None],
        driver: str | None = None,
    ) -> Samples:
        return self._samples("decode", tell, prompt=_ids(prompt), n=n, sampling=asdict(sampling), driver=driver)

    def begin(self, what: str, prompt: Sequence[int], n: int = 0, device: str = "cpu") -> int:
        with alone(self._line.child):
            answer, _ = self._line.ask(f"{what}_begin", prompt=_ids(prompt), n=n, device=device)
        return int(answer["ns"])

    def turn(self, what: str, count: int, settle: bool) -> Taken:
        with alone(self._line.child):
            answer, _ = self._line.ask(f"{what}_turn", count=count, settle=settle)
        return Taken.from_dict(answer["taken"])

    def end(self, what: str) -> Samples:
        return self._samples(f"{what}_end", None)

    def peak_bytes(self) -> int | None:
        answer, _ = self._line.ask("peak")
        growth: int | None = answer["growth"]
        return growth

    def forget(self) -> None:
        self._line.ask("forget")

    def close(self) -> None:
        """Nothing is watched here."""

    def _samples(self, do: str, tell: Callable[[str], None] | None, **arguments: Any) -> Samples:
        with alone(self._line.child):
            answer, arrays = self._line.ask(do, event=_progress(tell), **arguments)
        logits = _array(answer, arrays) if arrays or "type" in answer else None
        return replace(Samples.from_dict(answer["samples"]), last_logits=logits)


def _progress(
    tell: Callable[[str], None] | None,
) -> Callable[[Mapping[str, Any], list[np.ndarray]], None]:
    def event(header: Mapping[str, Any], arrays: list[np.ndarray]) -> None:
        if tell is not None and header["event"] == "progress":
            tell(header["text"])

    return event


def _raise(error: Mapping[str, str]) -> None:
    kind, text = error["kind"], error["text"]
    if kind == "Unavailable":
        raise Unavailable(text, error["how"])
    if kind in (Unsupported.__name__, MeasureError.__name__):
        raise (Unsupported if kind == Unsupported.__name__ else MeasureError)(text)
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, InputError):
        raise known(text)
    raise RemoteError(f"{error['name']}: {text}", error["traceback"])


def _array(answer: Mapping[str, Any], arrays: list[np.ndarray]) -> np.ndarray:
    """What the backend returned; for what is no array, something that is called like it, for the checks to refuse."""
    if arrays:
        return arrays[0]
    if "dtype" in answer:
        with suppress(TypeError, ValueError):  # a structured type has no name that numpy reads
            return np.broadcast_to(np.zeros((), np.dtype(answer["dtype"])), answer["shape"])
    name = f"an array of {answer['dtype']}" if "dtype" in answer else answer["type"]
    stand_in: np.ndarray = type(name, (), {})()
    return stand_in


def _ids(tokens: Sequence[int]) -> list[Any]:
    """As they are, for the far side to refuse what is no token; numpy's integers as Python's."""
    return [token.item() if isinstance(token, np.generic) else token for token in tokens]
