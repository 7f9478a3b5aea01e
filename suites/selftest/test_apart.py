"""An isolated session is the session: the same numbers, capabilities, verdicts and errors."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.api import Generating, Scoring, StateAccess, Traceable
from harness.checks import problem
from harness.isolation.answers import check_answer
from harness.isolation.frames import FrameError
from harness.isolation.remote import RemoteError
from harness.measure import MeasureError, Sampling
from harness.session import Apart, Opened, open_session
from reference.errors import InputError

TOKENS = [5, 7, 250, 0, 1, 1, 3]

#: A backend of the test's own: counts the states that are alive, and returns what it is told to.
SCRIPTED = """\
import gc, os, time
import numpy as np
from backends.api import BackendInfo
from reference.numerics import Arithmetic

INFO = BackendInfo("scripted", "for a test", "a test", ("cpu",), {"fp32": Arithmetic()})
ALIVE = []


class State:
    def __init__(self, count):
        self.count = count
        ALIVE.append(1)

    def __del__(self):
        ALIVE.pop()


class Session:
    def forward(self, tokens, state):
        if tokens == [100]:
            return np.full(4, len(ALIVE), np.float32), State(0)
        if tokens == [101]:
            time.sleep(0.02)
        if tokens == [102]:
            raise RuntimeError("kernel launch failed")
        if tokens[0] in range(110, 110 + len(ALIKE)):
            raise type(ALIKE[tokens[0] - 110], (Exception,), {})("out of memory")
        return np.zeros(4, np.float32), State((state.count if state else 0) + len(tokens))

    def export_state(self, state):
        return np.full((1, 5, 1), state.count, np.float32)

    def import_state(self, canonical):
        return State(int(canonical[0, 0, 0]))

    def logits(self, tokens, state):
        return eval(GARBAGE[tokens[0]], {"np": np})


def load(checkpoint, scheme, device, threads):
    return Session()
"""

#: What a backend may return in place of float32 logits.
GARBAGE = [
    "None",
    "3",
    "'logits'",
    "[1.0, 2.0]",
    "(np.zeros(4, np.float32),)",
    "np.float32(3)",
    "np.zeros((7, 4))",
    "np.zeros((7, 4), np.float16)",
    "np.zeros((7, 4), np.int64)",
    "np.zeros((7, 4), bool)",
    "np.zeros((7, 4), object)",
    "np.array([None, 'x'], object)",
    "np.zeros((7, 4), complex)",
    "np.zeros((7, 4), '>f4')",
    "np.zeros((7, 4), 'U3')",
    "np.zeros((7, 4), 'M8[s]')",
    "np.zeros((7, 4), np.longdouble)",
    "np.zeros((7, 3), np.float32)",
    "np.zeros((0,), np.float32)",
    "np.zeros((), np.float32)",
    "np.full((7, 4), np.nan, np.float32)",
    "np.ma.masked_array(np.zeros((7, 3), np.float32))",
    "np.broadcast_to(np.float32(0), (7, 4))",
    "np.zeros((4, 7), np.float32).T",
]


#: What a runtime may call its own exceptions.
ALIKE = ["ChildDied", "ChildTimedOut", "Unavailable", "Unsupported", "MeasureError", "InputError", "died", "other"]


@pytest.fixture
def scripted(tmp_path: Path) -> str:
    path = tmp_path / "my backends" / "scripted.py"
    path.parent.mkdir()
    path.write_text(f"GARBAGE = {GARBAGE!r}\nALIKE = {ALIKE!r}\n{SCRIPTED}")
    return str(path)


@pytest.fixture
def apart(scripted: str, small: str) -> Iterator[Opened]:
    with open_session(scripted, small, isolate=True, apart=Apart(timeout=20)) as opened:
        yield opened


@pytest.mark.parametrize(("backend", "scheme"), [("numpy", "fp32"), ("numpy", "q4f16_1"), ("torch", "fp16")])
def test_numbers_are_the_same_bit_for_bit(backend: str, scheme: str, small: str) -> None:
    pytest.importorskip(backend)
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(open_session(backend, small, scheme, threads=1, isolate=isolate))
            for isolate in (False, True)
        )
        assert (here.isolated, there.isolated) == (False, True)
        assert (here.info, here.version, here.arithmetic) == (there.info, there.version, there.arithmetic)
        for kind in (Scoring, Traceable, StateAccess, Generating):
            assert isinstance(here.session, kind) == isinstance(there.session, kind)
        for left, right in zip(_everything(here.session), _everything(there.session), strict=True):
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            assert left.tobytes() == right.tobytes()


def _everything(session: Any) -> Iterator[np.ndarray]:
    """Whatever the contract offers, in order."""
    logits, state = session.forward(TOKENS, None)
    yield logits
    after, again = session.forward([9], state)
    yield after
    if isinstance(session, Scoring):
        yield session.logits(TOKENS, None)
        yield session.logits(TOKENS, again)
    if isinstance(session, StateAccess):
        canonical = session.export_state(again)
        yield canonical
        imported = session.import_state(canonical)
        yield any_of(session).forward([4], imported)[0]
        yield session.export_state(state)  # left as it was
    if isinstance(session, Traceable):
        seen: dict[str, np.ndarray] = {}
        traced, state = session.trace(TOKENS, again, lambda name, array: seen.update({name: np.array(array)}))
        yield traced
        yield np.frombuffer(" ".join(seen).encode(), np.uint8)
        yield from seen.values()
    if isinstance(session, Generating):
        ids, state = session.greedy(3, state, 12)
        yield ids
        yield any_of(session).forward([4], state)[0]


def any_of(session: object) -> Any:
    """A session whose type was narrowed to one capability, as what it is."""
    return session


@pytest.mark.parametrize("tokens", [[], [256], [-1], [1.5], np.array([1, 2, 3]), (1, 2)], ids=str)
def test_tokens_are_judged_as_in_this_process(tokens: Any, small: str) -> None:
    told: list[object] = []
    for isolate in (False, True):
        with open_session("numpy", small, "fp32", threads=1, isolate=isolate) as opened:
            try:
                told.append(opened.session.forward(tokens, None)[0].tobytes())
            except InputError as error:
                told.append(str(error))
    assert told[0] == told[1]


def test_garbage_gets_the_same_verdict(scripted: str, small: str) -> None:
    told: list[list[str | None]] = []
    for isolate in (False, True):
        with open_session(scripted, small, isolate=isolate) as opened:
            assert isinstance(opened.session, Scoring)
            told.append([problem(opened.session.logits([i], None), (7, 4)) for i in range(len(GARBAGE))])
    assert dict(zip(GARBAGE, told[0], strict=True)) == dict(zip(GARBAGE, told[1], strict=True))
    assert None in told[0]
    assert len(set(told[0])) > 12


@pytest.mark.parametrize("device", ["dtype", "shape", "list", "empty", "nan", "exception"])
def test_what_measuring_refuses_is_told_alike(device: str, small: str) -> None:
    told = []
    for isolate in (False, True):
        with open_session("faulty", small, "fp32", device, isolate=isolate) as opened:
            try:
                found = opened.meter.first_call(list(range(48)))
                told.append((str(found.non_finite_at), problem(found.last_logits, (256,))))
            except (MeasureError, RemoteError, RuntimeError) as error:
                told.append((str(error).removeprefix("RuntimeError: "), None))
    assert told[0] == told[1]


def test_states_are_freed_when_nobody_holds_them(apart: Opened) -> None:
    session = apart.session
    _, state = session.forward([1, 2], None)
    kept = [session.forward([1], state)[1] for _ in range(10)]
    assert session.forward([100], None)[0][0] == 11
    del kept
    gc.collect()
    assert session.forward([100], None)[0][0] == 1
    for _ in range(50):
        _, state = session.forward([1], state)
    assert session.forward([100], None)[0][0] <= 2
    assert isinstance(apart.session, StateAccess)
    assert apart.session.export_state(state)[0, 0, 0] == 52


def test_states_of_others_are_refused(apart: Opened, small: str) -> None:
    _, state = apart.session.forward([1], None)
    with open_session("numpy", small, "fp32", isolate=True) as other:
        with pytest.raises(MeasureError, match="a state of another session"):
            other.session.forward([1], state)
        with pytest.raises(MeasureError, match="a state of another kind, ndarray"):
            other.session.forward([1], np.zeros(3))
        assert isinstance(other.session, StateAccess)
        with pytest.raises(MeasureError, match="not list"):
            other.session.import_state([1.0])  # type: ignore[arg-type]
        assert other.session.forward([1], None)[0].shape == (256,)


def test_an_exception_of_the_backend_leaves_the_session_usable(apart: Opened) -> None:
    with pytest.raises(RemoteError, match="RuntimeError: kernel launch failed") as caught:
        apart.session.forward([102], None)
    assert "scripted.py" in caught.value.traceback
    assert apart.session.forward([1], None)[0].shape == (4,)


@pytest.mark.parametrize("number", range(len(ALIKE)), ids=ALIKE)
def test_an_exception_called_like_one_of_ours_is_the_backends(number: int, apart: Opened) -> None:
    with pytest.raises(RemoteError, match=f"^{ALIKE[number]}: out of memory$"):
        apart.session.forward([110 + number], None)
    assert apart.session.forward([1], None)[0].shape == (4,)


#: Headers that may follow request 3, one to ``forward``: whether they do.
_HEADERS: list[tuple[dict[str, Any], bool]] = [
    ({"id": 3, "ok": {"state": 1, "type": "list"}}, True),
    ({"id": 3, "ok": {"state": 1}}, False),
    ({"id": 3, "ok": {"type": "list"}}, False),
    ({"id": 3, "ok": {}}, False),
    ({"id": 3, "ok": []}, False),
    ({"id": 3}, False),
    ({"id": 2, "ok": {"state": 1, "type": "list"}}, False),
    ({"ok": {"state": 1, "type": "list"}}, False),
    ({"id": 3, "event": "progress", "text": "loading"}, True),
    ({"id": 3, "event": "progress"}, False),
    ({"id": 3, "event": "tap", "name": "emb"}, False),
    ({"id": 3, "event": ["tap"]}, False),
    ({"event": "progress", "text": "loading"}, False),
    ({"id": 3, "error": {"kind": "other", "name": "E", "text": "", "how": "", "traceback": ""}}, True),
    ({"id": 3, "error": {"kind": "other"}}, False),
    ({"id": 3, "error": "E"}, False),
    ({"died": "of nothing"}, False),
]


@pytest.mark.parametrize(("header", "right"), _HEADERS, ids=str)
def test_an_answer_is_to_what_was_asked_and_complete(header: dict[str, Any], right: bool) -> None:
    with nullcontext() if right else pytest.raises(FrameError, match=r"^an answer "):
        check_answer(header, [], "forward", 3)


def test_an_array_stands_for_its_type() -> None:
    check_answer({"id": 3, "ok": {"state": 1}}, [np.zeros(3)], "forward", 3)
    check_answer({"id": 3, "event": "tap", "name": "emb"}, [np.zeros(3)], "trace", 3)


def test_a_callback_that_raises_does_not_shift_the_answers(small: str) -> None:
    with open_session("numpy", small, "fp32", threads=1, isolate=True) as opened:
        session = opened.session
        assert isinstance(session, Traceable)
        expected = session.forward(TOKENS, None)[0]

        def tap(name: str, array: np.ndarray) -> None:
            raise LookupError(name)

        with pytest.raises(LookupError, match="emb"):
            session.trace([1, 2], None, tap)
        np.testing.assert_array_equal(session.forward(TOKENS, None)[0], expected)
        with pytest.raises(RuntimeError, match="was asked by a callback"):
            session.trace([1, 2], None, lambda name, array: session.forward([1], None) and None)
        np.testing.assert_array_equal(session.forward(TOKENS, None)[0], expected)


def test_threads_take_turns(small: str) -> None:
    with open_session("numpy", small, "fp32", threads=1, isolate=True) as opened:
        expected = {token: opened.session.forward([token], None)[0] for token in range(8)}
        wrong: list[int] = []

        def work(token: int) -> None:
            for _ in range(20):
                if not np.array_equal(opened.session.forward([token], None)[0], expected[token]):
                    wrong.append(token)

        threads = [threading.Thread(target=work, args=(token,)) for token in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_the_clock_is_read_on_the_far_side(apart: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A near side that takes its time, as over a slow line, is in no sample."""
    line = apart.session._line  # type: ignore[attr-defined]
    receive = line.child.channel.receive

    def slowly() -> Any:
        time.sleep(0.1)
        return receive()

    monkeypatch.setattr(line.child.channel, "receive", slowly)
    said: list[str] = []
    found = apart.meter.prefill([101], Sampling(repeats=5, warmup=1), said.append)
    assert said == ["warm-up", *(f"sample {i} of 5" for i in range(1, 6))]
    assert 20e6 <= min(found.ns) < 60e6  # the call sleeps 20 ms; with the line it would be over 100
    monkeypatch.undo()
    decode = apart.meter.decode([101], 4, Sampling(repeats=3, warmup=0), said.append)
    assert (len(decode.steps), {len(steps) for steps in decode.steps}) == (3, {4})


def test_a_close_that_hangs_is_not_waited_for_as_long_as_work(
    scripted: str, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.isolation.remote.CLOSING_SECONDS", 0.5)
    with open(scripted, "a") as file:
        file.write("\nSession.close = lambda self: time.sleep(1e6)\n")
    with open_session(scripted, small, isolate=True) as opened:
        opened.session.forward([1], None)
        began = time.monotonic()
    assert time.monotonic() - began < 5
