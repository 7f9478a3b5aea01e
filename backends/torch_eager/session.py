"""The contract of a backend over :mod:`backends.torch_eager.model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from backends.api import State, Tap, Unsupported
from backends.shared.torch_devices import give_back, loading
from backends.torch_eager.adjusted import AdjustedModel
from backends.torch_eager.batch import hidden_batch, initial_states
from backends.torch_eager.model import LayerState, Model, no_tap
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens
from reference.weights import Weights

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_session(
    weights: Weights, scheme: str, device: torch.device, threads: int | None, change: Mapping[str, Any] | None = None
) -> TorchSession:
    """A session over weights already stored as ``scheme``; ``change`` as ``adjust`` takes it."""
    if threads is not None and threads < 1:
        raise Unsupported(f"torch needs at least one CPU thread; {threads} were asked for")
    with loading(device, "torch"), torch.inference_mode():
        kind = _TYPES[scheme]
        model = AdjustedModel(weights, kind, device, change) if change else Model(weights, kind, device)
        return TorchSession(model, threads)


class TorchSession:
    """A :class:`backends.api.Session` with every optional capability."""

    def __init__(self, model: Model | AdjustedModel, threads: int | None) -> None:
        self._model = model
        self._threads = threads
        self._initial = model.initial_state()
        self._settle()

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        with torch.inference_mode():
            x, new = self._model.hidden(self._ids(tokens), self._past(state), no_tap)
            return _to_numpy(self._model.head(x[-1:])[0]), new

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        with torch.inference_mode():
            x, _ = self._model.hidden(self._ids(tokens), self._past(state), no_tap)
            return _to_numpy(self._model.head(x))

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        with torch.inference_mode():
            ids, past = self._ids(tokens), self._past(state)
            x, new = self._model.hidden(ids, past, lambda prefix, name, value: tap(prefix + name, _to_numpy(value)))
            # The last position is a product of its own, as in forward: another shape may round otherwise.
            last = self._model.head(x[-1:])
            logits = last if len(x) == 1 else torch.cat([self._model.head(x[:-1]), last])
            tap("logits", _to_numpy(logits))
            return _to_numpy(last[0]), new

    def greedy(self, token: int, state: State, n: int) -> tuple[np.ndarray, State]:
        with torch.inference_mode():
            ids, state = self._ids([token]), self._past(state)
            chosen = []
            for _ in range(n):
                x, state = self._model.hidden(ids, state, no_tap)
                ids = self._model.head(x).argmax(dim=-1)
                chosen.append(ids)
            return torch.cat(chosen).cpu().numpy(), state

    def forward_batch(self, tokens: Sequence[Sequence[int]], states: Any | None) -> tuple[np.ndarray, Any]:
        model = self._model
        if not isinstance(model, Model):
            raise Unsupported("torch runs changed arithmetic one sequence at a time")
        with torch.inference_mode():
            self._settle()
            ids = torch.stack([self._ids(row) for row in tokens])
            x, new = hidden_batch(model, ids, initial_states(model, len(ids)) if states is None else states)
            return _to_numpy(model.head(x)), new

    def export_state(self, state: State) -> np.ndarray:
        out = np.empty((len(state), len(STATE_ROWS), self._model.config.n_embd), dtype=np.float32)
        for i, layer in enumerate(state):
            out[i, FFN_X], out[i, ATT_X] = _to_numpy(layer.ffn_x), _to_numpy(layer.att_x)
            out[i, [AA, BB]], out[i, PP] = _to_numpy(layer.sums), _to_numpy(layer.pp)
        return out

    def import_state(self, canonical: np.ndarray) -> State:
        shape = (self._model.config.n_layer, len(STATE_ROWS), self._model.config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        with torch.inference_mode():
            rows = torch.from_numpy(np.array(canonical, dtype=np.float32)).to(self._model.device)
            x = rows.to(self._model.dtype)
            return tuple(
                LayerState(x[i, [ATT_X]], x[i, [FFN_X]], rows[i, [AA, BB]], rows[i, [PP]]) for i in range(len(rows))
            )

    def close(self) -> None:
        device = self._model.device
        del self._model, self._initial
        give_back(device)

    def _past(self, state: State | None) -> State:
        self._settle()
        return self._initial if state is None else state

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(check_tokens(tokens, self._model.config.n_vocab)).to(self._model.device)

    def _settle(self) -> None:
        """Set what torch keeps per process, which another session or library may have changed since.

        TF32 and reduced-precision sums would break the declared arithmetic; importing ``rwkv`` turns TF32 on.
        """
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
            if torch.get_num_threads() != self._threads:
                raise Unsupported(f"torch runs {torch.get_num_threads()} threads where {self._threads} were asked for")
        torch.set_float32_matmul_precision("highest")
        if self._model.device.type == "cuda":
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    """A float32 copy in host memory; later in-place operations do not reach it."""
    return np.asarray(value.to("cpu", torch.float32, copy=True).numpy())
