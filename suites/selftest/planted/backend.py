"""A correct backend in emulated arithmetic, with a fault of your choice and as many capabilities as you like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from backends.api import Session, Tap
from reference.forward import initial_state
from reference.mixed import emulated
from reference.numerics import Arithmetic, Exact, Op
from reference.operations import run
from reference.weights import Weights
from suites.selftest.planted.fault import Call, Carried, Patch, Ran

#: What a session shows.
TRACE, STATE, LOGITS = "trace", "state", "logits"

#: Links of the backend's own sums where they are kept in fp32: fewer than are declared, as a library's would be.
_LINKS = 8


class LogitsSession:
    """The one method every backend has."""

    def __init__(self, weights: Weights, make_op: Callable[[], Op], patch: Patch, shared: Any, threads: int) -> None:
        self._weights = weights
        self._make_op = make_op
        self._patch = patch
        self._shared = shared
        self._memory = SimpleNamespace(calls=0)
        self._threads = threads

    def forward(self, tokens: Sequence[int], state: Carried | None) -> tuple[np.ndarray, Carried]:
        ran = self._call(tokens, state, None)
        return self._shown(ran.logits[-1]), ran.after

    def _call(self, tokens: Sequence[int], state: Carried | None, tap: Tap | None) -> Ran:
        self._memory.calls += 1

        def compute(tokens: Sequence[int], past: Carried | None, replaced: Any = None) -> Ran:
            op = self._make_op()
            rows = None if past is None else past.rows
            wrong = {**self._patch.replaced, **(replaced or {})}
            logits, after = run(self._weights, tokens, rows, op, tap, wrong)
            return Ran(logits, Carried((0 if past is None else past.position) + len(tokens), after))

        empty = Carried(0, initial_state(self._weights.config, self._make_op().dtype))
        call = Call([int(t) for t in tokens], state, empty, compute, self._memory, self._shared, self._threads)
        return (self._patch.around or Call.usual)(call)

    def _shown(self, logits: np.ndarray) -> np.ndarray:
        """In the type of the compute: float32, or float64 of an exact session."""
        return np.ascontiguousarray(logits)


class StateSession(LogitsSession):
    """Shows and takes its state as well."""

    def export_state(self, state: Carried) -> np.ndarray:
        given = self._patch.given or np.array
        return np.asarray(given(state.rows.copy()))

    def import_state(self, canonical: np.ndarray) -> Carried:
        taken = self._patch.taken or np.array
        return Carried(0, np.asarray(taken(canonical.astype(self._make_op().dtype))))


class TraceSession(StateSession):
    """Shows everything."""

    def logits(self, tokens: Sequence[int], state: Carried | None) -> np.ndarray:
        return self._shown(self._call(tokens, state, None).logits)

    def trace(self, tokens: Sequence[int], state: Carried | None, tap: Tap) -> tuple[np.ndarray, Carried]:
        ran = self._call(tokens, state, lambda name, x: tap(name, np.array(x, dtype=np.float32)))
        return self._shown(ran.logits[-1]), ran.after


SESSIONS: dict[str, type[LogitsSession]] = {TRACE: TraceSession, STATE: StateSession, LOGITS: LogitsSession}


class PlantedBackend:
    """Opens sessions over given weights, all with the same fault; they share what a faulty process would share.

    arithmetic  that it computes in; ``None``: exactly, in float64
    shows       ``trace``, ``state`` or ``logits``
    seed        of the summation orders and roundings, the same at every call
    """

    def __init__(
        self, arithmetic: Arithmetic | None, patch: Patch, shows: str = TRACE, seed: int = 0, threads: int = 2
    ) -> None:
        self._arithmetic = arithmetic
        self._patch = patch
        self._shows = shows
        self._seed = seed
        self._threads = threads
        self._shared = SimpleNamespace()

    def open(self, weights: Weights) -> Session:
        """A session over ``weights`` as stored, or over what the fault makes of them."""
        return self.open_other(self._patch.weights or weights)

    def open_other(self, weights: Weights) -> Session:
        """A session over another model, whose weights the fault leaves alone."""
        return SESSIONS[self._shows](weights, self._op, self._patch, self._shared, self._threads)

    def _op(self) -> Op:
        if self._arithmetic is None:
            return Exact(np.float64)
        arithmetic = self._arithmetic
        if arithmetic.accumulation == "fp32":
            arithmetic = replace(arithmetic, chain=min(arithmetic.chain, _LINKS))
        return emulated(arithmetic, self._seed)
