"""The contract of :mod:`backends.api` over :mod:`backends.mlx_rwkv.model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from backends.api import State, Tap, Unavailable
from backends.mlx_rwkv.model import LayerState, Model, no_tap
from backends.mlx_rwkv.schemes import SCHEMES
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens
from reference.numerics import Arithmetic
from reference.weights import Weights

#: Tokens of one evaluation: bounds the memory of what lies between.
CHUNK = 512


def open_session(checkpoint: Weights, scheme: str, device: str) -> MlxSession:
    """A session on ``cpu`` or ``mps``."""
    if device == "mps" and not mx.metal.is_available():
        raise Unavailable("mlx sees no Apple GPU", "this build of MLX has no Metal, or the system shows it none")
    kept, place = SCHEMES[scheme], mx.Device(mx.cpu if device == "cpu" else mx.gpu)
    with mx.stream(place):
        model = Model(checkpoint, kept, device)
    if device == "cpu":
        return MlxSession(model, place)
    return MetalSession(model, place, kept.metal)


class MlxSession:
    """A :class:`backends.api.Session` with every optional capability."""

    def __init__(self, model: Model, device: Any) -> None:
        self._model, self._device = model, device
        with mx.stream(device):
            self._initial = model.initial_state()
            mx.eval(self._initial)

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        ids = self._checked(tokens)
        with mx.stream(self._device):
            past = self._past(state)
            for part in _chunks(ids):
                x, past = self._model.hidden(part, past, no_tap)
                mx.eval(past)
            return _to_numpy(self._model.head(x[-1:]))[0], past

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        ids = self._checked(tokens)
        rows = []
        with mx.stream(self._device):
            past = self._past(state)
            for part in _chunks(ids):
                x, past = self._model.hidden(part, past, no_tap)
                rows.append(_to_numpy(self._model.head(x)))
        return np.concatenate(rows)

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        ids = self._checked(tokens)
        with mx.stream(self._device):
            # One chunk: a trace point is one array over the whole prompt.
            x, new = self._model.hidden(
                mx.array(ids), self._past(state), lambda name, value: tap(name, _to_numpy(value))
            )
            # The last position is a product of its own, as in forward: another shape may round otherwise.
            last = _to_numpy(self._model.head(x[-1:]))
            tap("logits", last if len(x) == 1 else np.concatenate([_to_numpy(self._model.head(x[:-1])), last]))
            mx.eval(new)
            return last[0], new

    def greedy(self, token: int, state: State, n: int) -> tuple[np.ndarray, State]:
        ids = mx.array(self._checked([token]))
        chosen = []
        with mx.stream(self._device):
            for _ in range(n):
                x, state = self._model.hidden(ids, state, no_tap)
                ids = mx.argmax(self._model.head(x), axis=-1)
                # The device works on this step while the next one's graph is built.
                mx.async_eval(ids, state)
                chosen.append(ids)
            return np.array(mx.concatenate(chosen)).astype(np.int64), state

    def export_state(self, state: State) -> np.ndarray:
        out = np.empty((len(state), len(STATE_ROWS), self._model.config.n_embd), dtype=np.float32)
        for i, layer in enumerate(state):
            out[i, FFN_X], out[i, ATT_X] = _to_numpy(layer.ffn_x), _to_numpy(layer.att_x)
            out[i, AA], out[i, BB], out[i, PP] = (_to_numpy(part) for part in layer.sums)
        return out

    def import_state(self, canonical: np.ndarray) -> State:
        shape = (self._model.config.n_layer, len(STATE_ROWS), self._model.config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        with mx.stream(self._device):
            rows = [[mx.array(row[None].astype(np.float32)) for row in layer] for layer in canonical]
            state = tuple(
                LayerState(
                    layer[ATT_X].astype(self._model.dtype),
                    layer[FFN_X].astype(self._model.dtype),
                    (layer[AA], layer[BB], layer[PP]),
                )
                for layer in rows
            )
            mx.eval(state)
            return state

    def close(self) -> None:
        del self._model, self._initial
        mx.clear_cache()  # else MLX keeps the buffers for the next arrays

    def _past(self, state: State | None) -> State:
        return self._initial if state is None else state

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        return check_tokens(tokens, self._model.config.n_vocab)


class MetalSession(MlxSession):
    """On an Apple GPU: how its kernels compute was read, and not yet measured."""

    def __init__(self, model: Model, device: Any, arithmetic: Arithmetic) -> None:
        super().__init__(model, device)
        self._arithmetic = arithmetic

    def declared_arithmetic(self) -> Arithmetic:
        """That of the scheme; rows say "declared, unverified"."""
        return self._arithmetic


def _chunks(ids: np.ndarray) -> list[Any]:
    return [mx.array(ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)]


def _to_numpy(value: Any) -> np.ndarray:
    """A float32 copy in host memory, once it is computed."""
    return np.array(value.astype(mx.float32))
