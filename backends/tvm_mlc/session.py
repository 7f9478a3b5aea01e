"""The contract of backends.api over a compiled library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backends.api import State
from backends.tvm_mlc.library import Library, runtime
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens

#: Canonical row of each row of a state of MLC's order.
ROWS = (ATT_X, AA, BB, PP, FFN_X)


class TvmSession:
    """A :class:`backends.api.Session`; a state is what the library returned, which it never writes to again."""

    def __init__(self, library: Library, parameters: Any, device: Any) -> None:
        self._library, self._parameters, self._device = library, parameters, device
        self._tvm = runtime()
        self._initial = library.vm["create_kv_cache"]()
        self._dtypes = [str(row.dtype) for row in self._initial]
        self._entries = {name: library.vm[name] for name in ("decode", "prefill", "score")}

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        logits, after = self._run("decode" if len(tokens) == 1 else "prefill", tokens, state)
        return logits.reshape(-1), after

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        return self._run("score", tokens, state)[0]

    def export_state(self, state: State) -> np.ndarray:
        config = self._library.config
        rows = np.empty((config.n_layer, len(STATE_ROWS), config.n_embd), dtype=np.float32)
        for i, row in enumerate(state):
            rows[i // len(ROWS), ROWS[i % len(ROWS)]] = row.numpy()[0]
        return rows

    def import_state(self, canonical: np.ndarray) -> State:
        config = self._library.config
        shape = (config.n_layer, len(STATE_ROWS), config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        rows = []
        for i, dtype in enumerate(self._dtypes):
            row = canonical[i // len(ROWS), ROWS[i % len(ROWS)]][None].astype(dtype)
            rows.append(self._tvm.runtime.tensor(np.ascontiguousarray(row), self._device))
        return self._tvm.runtime.convert(rows)

    def close(self) -> None:
        del self._entries, self._initial, self._parameters

    def _run(self, entry: str, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        # An id outside the vocabulary is an address outside the embedding there.
        ids = check_tokens(tokens, self._library.config.n_vocab).astype(np.int32)[None]
        past = self._initial if state is None else state
        ids = self._tvm.runtime.tensor(ids, self._device)
        logits, after = self._entries[entry](ids, None, past, self._parameters)
        return np.array(logits.numpy(), dtype=np.float32), after
