"""The contract of :mod:`backends.api` over an exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from backends.api import State
from backends.onnx_cpu.export import MODEL
from reference.config import Config
from reference.forward import check_tokens, initial_state

#: Tokens of one run: more gained less than a tenth at 169M and 2 threads, and take memory.
CHUNK = 256

_EVERY, _LAST = 0, -1


def open_graph(folder: Path, threads: int | None) -> Any:
    """The graph loaded with ``threads`` threads, ``None``: as many as the runtime takes to be right."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads or 0
    # Threads spin between the nodes of a run, which are microseconds apart, but not between runs, where they
    # would take the cores from whatever else runs: another session, or the sampling of the next token.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])


class OnnxSession:
    """A :class:`backends.api.Session` whose state is a float32 array ``(1, 5 L, C)``.

    The runtime reads the arrays of its inputs and writes those of its outputs where they lie.
    """

    def __init__(self, graph: Any, config: Config) -> None:
        self._graph, self._config = graph, config
        self._binding = graph.io_binding()
        self._initial = self.import_state(initial_state(config))
        # For greedy(): one token, its logits, and two states that are read and written in turn.
        self._last = np.array([_LAST], dtype=np.int64)
        self._token = np.zeros((1, 1), dtype=np.int64)
        self._one = np.empty((1, 1, config.n_vocab), dtype=np.float32)
        self._pair = (np.empty_like(self._initial), np.empty_like(self._initial))
        self._turns: list[Any] = []

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        ids = self._checked(tokens)
        past = self._initial if state is None else state
        for start in range(0, ids.shape[1], CHUNK):
            logits, past = self._run(ids[:, start : start + CHUNK], past, _LAST)
        return logits[0], past

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        ids = self._checked(tokens)
        past = self._initial if state is None else state
        rows = []
        for start in range(0, ids.shape[1], CHUNK):
            logits, past = self._run(ids[:, start : start + CHUNK], past, _EVERY)
            rows.append(logits)
        return np.concatenate(rows)

    def greedy(self, token: int, state: State, n: int) -> tuple[np.ndarray, State]:
        self._token[:] = self._checked([token])
        logits, past = self._run(self._token, state, _LAST)
        ids = np.empty(n, dtype=np.int64)
        ids[0] = logits[0].argmax()
        if n == 1:
            return ids, past
        self._pair[0][:] = past
        turns = self._turns = self._turns or [self._bound(*self._pair), self._bound(*self._pair[::-1])]
        for i in range(1, n):
            self._token[0, 0] = ids[i - 1]
            self._graph.run_with_iobinding(turns[(i - 1) % 2])
            ids[i] = self._one[0, 0].argmax()
        return ids, self._pair[(n - 1) % 2].copy()

    def export_state(self, state: State) -> np.ndarray:
        return np.array(state, dtype=np.float32).reshape(self._config.n_layer, 5, self._config.n_embd)

    def import_state(self, canonical: np.ndarray) -> State:
        return np.array(canonical, dtype=np.float32).reshape(1, 5 * self._config.n_layer, self._config.n_embd)

    def close(self) -> None:
        self._turns, self._binding, self._graph = [], None, None

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        return np.array(check_tokens(tokens, self._config.n_vocab), dtype=np.int64)[None]

    def _run(self, ids: np.ndarray, past: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits from position ``first`` on ``(positions, V)``, and the state after ``ids (1, T)``."""
        ids, where = np.ascontiguousarray(ids), np.array([first], dtype=np.int64)
        positions = ids.shape[1] if first == _EVERY else 1
        logits = np.empty((1, positions, self._config.n_vocab), dtype=np.float32)
        new = np.empty_like(self._initial)
        _bind(self._binding, {"tokens": ids, "state": past, "first": where}, {"logits": logits, "new_state": new})
        self._graph.run_with_iobinding(self._binding)
        return logits[0], new

    def _bound(self, past: np.ndarray, new: np.ndarray) -> Any:
        binding = self._graph.io_binding()
        inputs = {"tokens": self._token, "state": past, "first": self._last}
        _bind(binding, inputs, {"logits": self._one, "new_state": new})
        return binding


def _bind(binding: Any, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    """Arrays as they lie in memory; the caller keeps them until the run has ended."""
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
