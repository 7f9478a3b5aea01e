"""A stand-in for faster-rwkv's Python module: its names and its habits, computing with the reference.

As in python/fr_python.cpp and model.cpp: a model holds one state, whose tensors are replaced at every call and
share their memory with whoever asks for them; logits are a view of memory that the next call may use; a path
is a ``.fr`` file for cuda and the common beginning of three files for ncnn.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from reference import forward, initial_state, load_checkpoint
from reference.forward import AA, ATT_X, BB, FFN_X, PP

ROWS = (ATT_X, AA, BB, PP, FFN_X)

#: Strategy and FR_THREADS of every model made.
MADE: list[tuple[str, str | None]] = []


class _Tensor:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def numpy(self) -> np.ndarray:
        return self._array


class Model:
    def __init__(self, path: str, strategy: str) -> None:
        MADE.append((strategy, os.environ.get("FR_THREADS")))
        self.calls = 0
        self._weights = load_checkpoint(path + ".bin" if strategy.startswith("ncnn") else path)
        self._logits = np.empty(self._weights.config.n_vocab, np.float32)
        self.reset_states()

    def reset_states(self) -> None:
        self._states = self._tensors(initial_state(self._weights.config))

    def states(self) -> list[list[_Tensor]]:
        return [list(layer) for layer in self._states]

    def __call__(self, ids: Any) -> np.ndarray:
        self.calls += 1
        state = np.empty((len(self._states), 5, self._weights.config.n_embd), np.float32)
        for i, layer in enumerate(self._states):
            for row, tensor in zip(ROWS, layer, strict=True):
                state[i, row] = tensor.numpy()
        self._logits[:], new = forward(self._weights, ids, state)
        self._states = self._tensors(new)
        return self._logits

    def _tensors(self, state: np.ndarray) -> list[list[_Tensor]]:
        return [[_Tensor(np.array(layer[row])) for row in ROWS] for layer in state]
