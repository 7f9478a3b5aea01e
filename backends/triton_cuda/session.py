"""The contract of a backend over :mod:`backends.triton_cuda.model`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from backends.api import State, Tap
from backends.shared.torch_devices import give_back, loading
from backends.triton_cuda.graph import Work, captured
from backends.triton_cuda.machine import KEPT_PROMPTS, PIECE, SCORED_ROWS, check_memory, open_device
from backends.triton_cuda.model import Model
from backends.triton_cuda.place import place
from backends.triton_cuda.types import TYPES
from reference.config import Config
from reference.forward import STATE_ROWS, check_tokens, initial_state
from reference.weights import Weights


def open_session(weights: Weights, scheme: str, device: str, rescale_every: int = 0) -> TritonSession:
    """A session over ``weights`` stored by ``scheme``.

    Raises Unavailable or Unsupported before anything is loaded, and Unavailable where memory runs out all the same.
    """
    where = open_device(device)
    config, types = weights.config, TYPES[scheme]
    if where.type == "cuda":
        check_memory(config, scheme, PIECE, *torch.cuda.mem_get_info(where), tuple(TYPES))
    with loading(where, "triton"), _on(where):
        return TritonSession(Model(config, types, where, place(weights, scheme, where, rescale_every)))


class Decoding:
    """Steps of a number of sequences on their own buffers, each step one graph, captured when it is first wanted."""

    def __init__(self, model: Model, batch: int) -> None:
        self._model = model
        self.buffers = model.buffers(batch)
        self._step: Work | None = None
        self._chain: Work | None = None

    def start(self, ids: Tensor, state: Tensor) -> None:
        """Feed ``ids (batch)`` next, from ``state (batch, L, 5, C)``."""
        self.buffers.ids.copy_(ids)
        self.buffers.state.copy_(state)
        self.buffers.count.zero_()

    def step(self, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, V)``, which the next step overwrites, and the new state."""
        b = self.buffers
        if self._step is None:
            self._step = captured(lambda: self._model.step(b), self._model.device)
        self.start(ids, state)
        self._step()
        return b.logits, b.state.clone()

    def greedy(self, ids: Tensor, state: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Ids chosen ``(n, batch)`` and the new state; nothing leaves the device before the last."""
        b = self.buffers
        if self._chain is None:
            self._chain = captured(self._choosing_step, self._model.device)
        self.start(ids, state)
        chosen = []
        for first in range(0, n, b.CAPACITY):
            count = min(b.CAPACITY, n - first)
            for _ in range(count):
                self._chain()
            chosen.append(b.chosen[:count].clone())
            b.count.zero_()
        return torch.cat(chosen), b.state.clone()

    def _choosing_step(self) -> None:
        self._model.step(self.buffers)
        self._model.choose(self.buffers)


class Prompts:
    """Prompts of one sequence. A length that comes again is captured: launching its kernels one by one takes longer
    than a short prompt itself. The few lengths used last are kept, each with the memory of its results."""

    KEPT = KEPT_PROMPTS

    def __init__(self, model: Model) -> None:
        self._model = model
        self._seen: set[int] = set()
        self._graphs: dict[int, _Prompt] = {}

    def run(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """``ids (1, T)``, ``past (1, L, 5, C)`` -> logits ``(1, V)`` after the last and the new state."""
        length = ids.shape[1]
        if length not in self._seen:
            self._seen.add(length)
            after = torch.empty_like(past)
            return self._model.head(self._model.hidden(ids, past, after)[-1:]), after
        prompt = self._graphs.pop(length, None)
        if prompt is None:
            for longest_unused in list(self._graphs)[: len(self._graphs) - self.KEPT + 1]:
                del self._graphs[longest_unused]
            prompt = _Prompt(self._model, ids, past)
        self._graphs[length] = prompt  # last: used last
        return prompt.run(ids, past)


class _Prompt:
    """One length as a graph on its own buffers."""

    def __init__(self, model: Model, ids: Tensor, past: Tensor) -> None:
        self._ids, self._past, self._after = ids.clone(), past.clone(), torch.empty_like(past)
        self._logits = torch.empty(1, model.config.n_vocab, device=model.device)
        self._replay = captured(lambda: self._work(model), model.device)

    def _work(self, model: Model) -> None:
        x = model.hidden(self._ids, self._past, self._after)
        self._logits.copy_(model.head(x[-1:]))

    def run(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        self._ids.copy_(ids)
        self._past.copy_(past)
        self._replay()
        return self._logits, self._after.clone()


class TritonSession:
    """A :class:`backends.api.Session` with every optional capability. A state is a tensor ``(L, 5, C)``."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._decoding: dict[int, Decoding] = {}
        self._prompts = Prompts(model)
        self._initial = self.import_state(initial_state(model.config))

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        with _on(self._model.device):
            ids, past = self._started(tokens, state)
            for piece in torch.split(ids, PIECE, dim=1):
                one = piece.shape[1] == 1
                logits, past = self._decoder(1).step(piece[0], past) if one else self._prompts.run(piece, past)
            return _to_numpy(logits[0]), past[0]

    def forward_batch(self, tokens: Sequence[Sequence[int]], states: Tensor | None) -> tuple[np.ndarray, Tensor]:
        """Sequences of equal length; ``states (B, L, 5, C)``. Their prompts run in pieces of :data:`PIECE` rows."""
        model, batch = self._model, len(tokens)
        with _on(model.device):
            ids = torch.from_numpy(np.stack([check_tokens(row, model.config.n_vocab) for row in tokens]))
            past = self._initial.expand(batch, -1, -1, -1).contiguous() if states is None else states
            for piece in torch.split(ids.to(model.device), max(1, PIECE // batch), dim=1):
                if piece.shape[1] == 1:
                    logits, past = self._decoder(batch).step(piece[:, 0], past)
                    continue
                after = torch.empty_like(past)
                x = model.hidden(piece, past, after)
                logits, past = model.head(x[piece.shape[1] - 1 :: piece.shape[1]].contiguous()), after
            return _to_numpy(logits), past

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        with _on(self._model.device):
            ids, past = self._started(tokens, state)
            found = []
            for piece in torch.split(ids, PIECE, dim=1):
                after = torch.empty_like(past)
                rows = torch.split(self._model.hidden(piece, past, after), SCORED_ROWS)
                found += [_to_numpy(self._model.head(some)) for some in rows]
                past = after
            return np.concatenate(found)

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        with _on(self._model.device):
            ids, past = self._started(tokens, state)
            after = torch.empty_like(past)
            x = self._model.hidden(ids, past, after, lambda name, value: tap(name, _to_numpy(value)))
            # The last position is a product of its own, as in forward: another shape may round otherwise.
            last = self._model.head(x[-1:])
            logits = last if len(x) == 1 else torch.cat([self._model.head(x)[:-1], last])
            tap("logits", _to_numpy(logits))
            return _to_numpy(last[0]), after[0]

    def greedy(self, token: int, state: State, n: int) -> tuple[np.ndarray, State]:
        ids, states = self.greedy_batch([token], [state], n)
        return ids[0], states[0]

    def greedy_batch(self, tokens: Sequence[int], states: Sequence[State], n: int) -> tuple[np.ndarray, list[State]]:
        """:meth:`greedy` of several sequences side by side: ids ``(batch, n)`` and their states."""
        with _on(self._model.device):
            ids = torch.from_numpy(check_tokens(tokens, self._model.config.n_vocab)).to(self._model.device)
            past = torch.stack([self._initial if state is None else state for state in states])
            chosen, after = self._decoder(len(tokens)).greedy(ids, past, n)
            return chosen.t().cpu().numpy(), list(after.clone())

    def export_state(self, state: State) -> np.ndarray:
        return _to_numpy(state)

    def import_state(self, canonical: np.ndarray) -> State:
        shape = _state_shape(self._model.config)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        with _on(self._model.device):
            return torch.from_numpy(np.array(canonical, dtype=np.float32)).to(self._model.device)

    def close(self) -> None:
        device = self._model.device
        del self._model, self._decoding, self._prompts, self._initial
        give_back(device)

    def _started(self, tokens: Sequence[int], state: State | None) -> tuple[Tensor, Tensor]:
        """Ids ``(1, T)`` and the past ``(1, L, 5, C)`` on the device."""
        ids = torch.from_numpy(check_tokens(tokens, self._model.config.n_vocab)).to(self._model.device)
        return ids[None], (self._initial if state is None else state)[None]

    def _decoder(self, batch: int) -> Decoding:
        if batch not in self._decoding:
            self._decoding[batch] = Decoding(self._model, batch)
        return self._decoding[batch]


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; TF32 and reduced-precision sums would break the declared arithmetic."""
    with torch.inference_mode():
        if device.type == "cpu":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.cuda.device(device):
            yield


def _state_shape(config: Config) -> tuple[int, int, int]:
    return config.n_layer, len(STATE_ROWS), config.n_embd


def _to_numpy(value: Tensor) -> np.ndarray:
    """A float32 copy in host memory; later in-place operations do not reach it."""
    return np.asarray(value.to("cpu", torch.float32, copy=True).numpy())
