"""A backend with a fault of your choice, for testing the tools that judge backends.

It runs the numpy reference and then spoils the result by the rule its device name gives:
``--backend faulty --device nan`` is right until it returns NaN. ``clean`` is the control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backends.api import BackendInfo, Session, State, Unsupported
from reference.forward import AA, PP, forward
from reference.numerics import Arithmetic
from reference.weights import Weights

Result = tuple[Any, State]

#: Position from which the faults that start late are active.
LATE = 40


class FaultySession:
    """The reference with ``spoil(logits, state, position)`` applied to each result."""

    def __init__(self, weights: Weights, fault: str) -> None:
        self._weights = weights
        self._fault = fault
        self._calls = 0

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        self._calls += 1
        position, past = (0, None) if state is None else state
        logits, new = forward(self._weights, tokens, past)
        if self._fault == "mutation" and past is not None:
            past[...] = new
        last = position + len(tokens)
        return FAULTS[self._fault](logits, (last, new), self._calls)

    def export_state(self, state: State) -> np.ndarray:
        return np.array(state[1], dtype=np.float32)

    def import_state(self, canonical: np.ndarray) -> State:
        return (0, np.array(canonical, dtype=np.float32))


def _clean(logits: np.ndarray, state: State, calls: int) -> Result:
    return logits, state


def _set(value: float) -> Callable[[np.ndarray, State, int], Result]:
    def spoil(logits: np.ndarray, state: State, calls: int) -> Result:
        if state[0] >= LATE:
            logits[7] = value
        return logits, state

    return spoil


def _drift(logits: np.ndarray, state: State, calls: int) -> Result:
    """An error that grows with position: 1e-5 of the logits a token."""
    return logits * np.float32(1 + 1e-5 * state[0]), state


def _late_error(logits: np.ndarray, state: State, calls: int) -> Result:
    return (
        (logits + np.float32(0.01) * np.cos(np.arange(logits.size, dtype=np.float32)), state)
        if state[0] >= LATE
        else (
            logits,
            state,
        )
    )


def _wrong_state(logits: np.ndarray, state: State, calls: int) -> Result:
    """Numerator and exponent of the last layer are swapped in what is handed on."""
    state[1][-1, [AA, PP]] = state[1][-1, [PP, AA]]
    return logits, state


def _second_call(logits: np.ndarray, state: State, calls: int) -> Result:
    return (logits if calls == 1 else logits[::-1].copy()), state


def _raise(logits: np.ndarray, state: State, calls: int) -> Result:
    raise RuntimeError("kernel launch failed")


FAULTS: dict[str, Callable[[np.ndarray, State, int], Result]] = {
    "clean": _clean,
    "nan": _set(float("nan")),
    "inf": _set(float("inf")),
    "drift": _drift,
    "late": _late_error,
    "state": _wrong_state,
    "mutation": _clean,
    "second-call": _second_call,
    "dtype": lambda logits, state, calls: (logits.astype(np.float64), state),
    "shape": lambda logits, state, calls: (logits[:-1], state),
    "list": lambda logits, state, calls: (logits.tolist(), state),
    "empty": lambda logits, state, calls: (logits[:0], state),
    "exception": _raise,
}

INFO = BackendInfo(
    name="faulty",
    description="the numpy reference with a scripted fault, named by --device",
    origin="this project, for testing the harness",
    devices=tuple(FAULTS),
    schemes={"fp32": Arithmetic()},
)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session with the fault that ``device`` names."""
    if device not in FAULTS:
        raise Unsupported(f"faulty has no fault {device!r}; it has {', '.join(FAULTS)}")
    return FaultySession(checkpoint.in_memory(np.float32), device)
