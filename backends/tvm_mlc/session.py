"""The contract of backends.api over a compiled library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backends.api import State, Tap
from backends.tvm_mlc import mlc_library
from backends.tvm_mlc.instrument import Recorder
from backends.tvm_mlc.library import Library, has, machine, runtime
from backends.tvm_mlc.points import trace_points, unit
from backends.tvm_mlc.states import Caches, Tensors
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens
from reference.numerics import Arithmetic

#: Canonical row of each row of a state of MLC's order.
ROWS = (ATT_X, AA, BB, PP, FFN_X)

#: MLC-LLM planned the memory of ``prefill`` for so many tokens, unless the model's configuration said otherwise.
MLC_PROMPT = 1024


class TvmSession:
    """A :class:`backends.api.Session` over the entry points that every library has."""

    def __init__(self, library: Library, parameters: Any, device: Any) -> None:
        self._library, self._parameters, self._device = library, parameters, device
        self._vm = library.vm
        self._states = _states(library, self._vm)

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        ids, after = self._ids(tokens), self._states.initial if state is None else state
        logits = np.empty(0, np.float32)
        step = len(ids) if self._library.ours else MLC_PROMPT if has(self._vm, "prefill") else 1
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            logits, after, *_ = self._run("decode" if len(part) == 1 else "prefill", part, after)
        return logits.reshape(-1), after

    def export_state(self, state: State) -> np.ndarray:
        config = self._library.config
        rows = np.empty((config.n_layer, len(STATE_ROWS), config.n_embd), dtype=np.float32)
        for i, row in enumerate(self._states.rows(state)):
            rows[i // len(ROWS), ROWS[i % len(ROWS)]] = row
        return rows

    def import_state(self, canonical: np.ndarray) -> State:
        config = self._library.config
        shape = (config.n_layer, len(STATE_ROWS), config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        return self._states.state([layer[row] for layer in canonical for row in ROWS])

    def close(self) -> None:
        del self._states, self._parameters, self._vm, self._library

    def _ids(self, tokens: Sequence[int]) -> np.ndarray:
        # An id outside the vocabulary is an address outside the embedding there.
        return check_tokens(tokens, self._library.config.n_vocab).astype(np.int32)

    def _run(self, entry: str, ids: np.ndarray, state: State) -> list[Any]:
        """Logits, the new state, and what the entry returns besides."""
        taken = self._states.enter(state)
        logits, after, *more = self._vm[entry](_tensor(ids, self._device), None, taken, self._parameters)
        return [np.array(logits.numpy(), dtype=np.float32), self._states.leave(after), *more]


class MlcSession(TvmSession):
    """A library of MLC-LLM's: only its ABI is known of it."""

    def declared_arithmetic(self) -> Arithmetic:
        """That of ``op.matmul`` of the model's type as TVM lowers it: one accumulator of that type for a whole row."""
        return mlc_library.arithmetic(self._library.config, self._library.scheme)


class WatchedSession(MlcSession):
    """A library whose parameters are known by name: its trace is what is seen of its kernels from outside."""

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        """Points that a kernel's output is, and no others; see :mod:`backends.tvm_mlc.instrument`."""
        # A machine of its own: an instrument is never taken off again, and slows every kernel.
        watched = WatchedSession(self._library, self._parameters, self._device)
        watched._vm = machine(self._library.module, self._device)
        watched._states = _states(self._library, watched._vm)
        recorder = Recorder(self._library, self._parameters)
        watched._vm.set_instrument(recorder)
        before = self._states.initial if state is None else state
        found = watched.forward(tokens, before)
        for name, array in recorder.points(len(tokens)):
            tap(name, array)
        return found


class FullSession(TvmSession):
    """A library of ours: it scores, and shows every trace point."""

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        rows: np.ndarray = self._run("score", self._ids(tokens), self._states.initial if state is None else state)[0]
        return rows

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        """Every point; logits and state are those of ``forward`` to the last bit."""
        ids = self._ids(tokens)
        entry = "trace_decode" if len(ids) == 1 else "trace_prefill"
        logits, after, points = self._run(entry, ids, self._states.initial if state is None else state)
        for name, point in zip(trace_points(self._library.config.n_layer), points):
            tap(name, np.array(point.numpy(), np.float32) * np.float32(unit(name, self._library.rescale_every)))
        return logits.reshape(-1), after


def _states(library: Library, vm: Any) -> Tensors:
    return Tensors(vm) if library.ours else Caches(vm, library.config.n_embd)


def _tensor(ids: np.ndarray, device: Any) -> Any:
    return runtime().runtime.tensor(ids[None], device)
