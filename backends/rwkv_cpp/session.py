"""A session over a model that ``librwkv`` has loaded. Its state is one flat array, the canonical one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backends.api import State, Unavailable, Unsupported
from backends.rwkv_cpp.library import APRIL, Library
from reference.config import Config
from reference.forward import STATE_ROWS, check_tokens, initial_state

#: Longest sequence worth building a graph for; rwkv.h recommends up to 64.
_LONGEST = 64


def chunk_length(n_layer: int) -> int:
    """Tokens in one sequence whose graph stays within three quarters of the library's pool.

    The pool is of 80,000 tensors, and the library aborts where a graph needs more. In RWKV-4 a layer needs
    some 61, and 31 more for every token: found from where it aborts, 217 tokens at 12 layers and 108 at 24.
    """
    per_layer = 60_000 / n_layer
    return max(1, min(_LONGEST, int((per_layer - 61) / 31)))


#: In the library of April 2023 a graph holds 4096 nodes, of which a layer takes 69 and the rest 8; it aborts beyond.
_APRIL_LAYERS = 59


def open_session(library: Library, path: Path, config: Config, threads: int | None) -> RwkvCppSession:
    """Load a file. ``threads=None`` is half the CPUs, as in rwkv.cpp's Python wrapper."""
    if threads is not None and threads < 1:
        raise Unsupported(f"rwkv.cpp needs at least one thread; {threads} were asked for")
    if library.api is APRIL and config.n_layer > _APRIL_LAYERS:
        raise Unsupported(
            f"the graph of {config.n_layer} layers is too large for this rwkv.cpp, which takes {_APRIL_LAYERS}; "
            "name a newer librwkv in RWKV_CPP_LIBRARY"
        )
    context = library.open(path, threads or max(1, (os.cpu_count() or 1) // 2))
    sizes = library.sizes(context)
    if sizes != (config.n_layer * len(STATE_ROWS) * config.n_embd, config.n_vocab):
        library.free(context)
        raise Unavailable(f"rwkv.cpp reports a state of {sizes[0]} and {sizes[1]} logits for {path}", "rebuild it")
    return RwkvCppSession(library, context, config)


class RwkvCppSession:
    """Every call gets its state explicitly, so one ``context`` of the library serves any number of states."""

    def __init__(self, library: Library, context: int, config: Config) -> None:
        self._library = library
        self.context = context
        self._config = config
        self._chunk = chunk_length(config.n_layer) if library.api.chunks else 1
        # Never NULL for a fresh state: for that the library of April 2023 takes memory it does not give back.
        self._initial = initial_state(config).reshape(-1)

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        ids = self._ids(tokens)
        past = self._initial if state is None else state
        new = np.empty_like(self._initial)
        logits = np.empty(self._config.n_vocab, dtype=np.float32)
        if len(ids) > 1 and self._chunk > 1:
            # Pieces of about one length: each other length makes the library build its graph anew.
            pieces = -(-len(ids) // self._chunk)
            chunk = -(-len(ids) // pieces)
            self._library.chunks(self.context, np.array(ids, dtype=np.uint32), chunk, past, new, logits)
        else:
            for token in ids:
                self._library.step(self.context, token, past, new, logits)
                past = new
        return logits, new

    def _ids(self, tokens: Sequence[int]) -> Sequence[int]:
        """Checked ids. A step's one id is not made an array of first, which cost 1 % of a step of a 169M model."""
        if len(tokens) == 1 and type(tokens[0]) is int and 0 <= tokens[0] < self._config.n_vocab:
            return tokens
        return list(check_tokens(tokens, self._config.n_vocab).tolist())

    def export_state(self, state: State) -> np.ndarray:
        return np.array(state.reshape(self._config.n_layer, len(STATE_ROWS), self._config.n_embd))

    def import_state(self, canonical: np.ndarray) -> State:
        shape = (self._config.n_layer, len(STATE_ROWS), self._config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        return np.array(canonical, dtype=np.float32).reshape(-1)

    def close(self) -> None:
        self._library.free(self.context)
