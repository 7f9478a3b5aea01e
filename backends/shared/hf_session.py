"""The contract of a backend over a loaded ``RwkvForCausalLM``, stock or patched (BigDL-LLM, ipex-llm).

Official code: transformers, src/transformers/models/rwkv/modeling_rwkv.py, whose inference is the same from
4.31 to 4.57. What it means for us:

* The state is five tensors ``(batch, n_embd, n_layer)``: ffn_x, att_x, aa, bb, pp, the canonical order of
  rows. A call writes to the state it is given, so each call here gets a copy.
* With ``use_cache=True`` the state begins at pp = -1e30. Without it there is no state at all.
* Batch 1 only: a step of one token from a state mixes the sequences of a batch (the last inputs
  ``(batch, n_embd)`` are broadcast against ``(batch, 1, n_embd)``).
* ``rescale_every`` is 0 in the folders written here: halving x changes the epsilon of every LayerNorm.

    folder = hf_folder(checkpoint, "fp32")            # in prepare() and load()
    model = ...from_pretrained(folder)                 # the adapter's own way
    session = HfSession(model, checkpoint.config, threads=threads, runtime="bigdl")
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import State, Tap
from backends.shared.torch_runtime import settle, to_numpy
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.converted import converted, derived
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens
from reference.weights import Weights

#: Rows of the canonical state in the order of the model's own; the first two are kept as activations.
_ROWS = (FFN_X, ATT_X, AA, BB, PP)
_INPUTS = 2

#: Below ``rwkv.blocks.{i}.``: module -> trace points that its first input and its output are, exactly.
#: What no module takes or gives stays unseen: att.r, att.wkv and ffn.r (before or after a function).
_POINTS = {
    "ln1": ("", "ln1"),
    "attention.key": ("att.xk", "att.k"),
    "attention.value": ("att.xv", "att.v"),
    "attention.receptance": ("att.xr", ""),
    "attention.output": ("att.rwkv", "att.out"),
    "ln2": ("att.residual", "ln2"),
    "feed_forward.key": ("ffn.xk", "ffn.k"),
    "feed_forward.value": ("ffn.k2", "ffn.v"),
    "feed_forward.receptance": ("ffn.xr", ""),
    "feed_forward": ("", "ffn.out"),
    "": ("", "ffn.residual"),
}
_OUTER_POINTS = {"rwkv.embeddings": "emb", "rwkv.blocks.0.pre_ln": "blocks.0.ln0", "rwkv.ln_out": "ln_out"}


def hf_folder(checkpoint: Weights, scheme: str) -> Path:
    """The checkpoint as a Hugging Face folder in ``scheme`` (fp32, fp16, bf16) with ``rescale_every`` 0, cached."""
    if checkpoint.config.rescale_every == 0:
        return converted(checkpoint, "hf", scheme)
    plain = replace(checkpoint, config=replace(checkpoint.config, rescale_every=0))
    return derived(checkpoint, f"hf-{scheme}-plain", lambda path: save_checkpoint(plain, path, "hf", scheme))


class HfSession:
    """Scoring, Traceable, StateAccess, Closing over a model in evaluation mode.

    model    called as ``model(ids, state=..., use_cache=True)``, giving ``.logits`` and ``.state``
    threads  CPU threads of torch, kept so at every call; ``None`` leaves them alone
    runtime  name for messages
    inference_mode  run under ``torch.inference_mode``, as BigDL's examples do, not ``no_grad``, as transformers does
    """

    def __init__(
        self, model: Any, config: Config, threads: int | None, runtime: str, inference_mode: bool = False
    ) -> None:
        import torch

        self._model = model.eval()
        self._config = config
        self._threads = threads
        self._runtime = runtime
        self._without_gradients = torch.inference_mode if inference_mode else torch.no_grad
        embedding = model.get_input_embeddings().weight
        self._device, self._dtype = embedding.device, embedding.dtype
        settle(threads, runtime)

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        logits, new = self._run(tokens, state)
        return to_numpy(logits[-1]), new

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        return to_numpy(self._run(tokens, state)[0])

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        seen: dict[str, np.ndarray] = {}
        with _hooked(self._model, self._config.n_layer, seen.__setitem__):
            logits, new = self._run(tokens, state)
        for name in sorted(seen, key=_place):  # a module's input is seen as it runs, not when it is made
            tap(name, seen[name])
        tap("logits", to_numpy(logits))
        return to_numpy(logits[-1]), new

    def export_state(self, state: State) -> np.ndarray:
        out = np.empty((self._config.n_layer, len(STATE_ROWS), self._config.n_embd), dtype=np.float32)
        for row, values in zip(_ROWS, state):
            out[:, row] = to_numpy(values[0]).T
        return out

    def import_state(self, canonical: np.ndarray) -> State:
        import torch

        shape = (self._config.n_layer, len(STATE_ROWS), self._config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        rows = torch.from_numpy(np.array(canonical, dtype=np.float32)).to(self._device)
        kinds = [self._dtype if i < _INPUTS else torch.float32 for i in range(len(_ROWS))]
        return [rows[:, row].T[None].contiguous().to(kind) for row, kind in zip(_ROWS, kinds)]

    def close(self) -> None:
        import torch

        on_cuda = self._device.type == "cuda"
        del self._model
        if on_cuda:
            torch.cuda.empty_cache()

    def _run(self, tokens: Sequence[int], state: State | None) -> tuple[Any, State]:
        """Logits ``(T, n_vocab)`` on the device and the new state."""
        import torch

        settle(self._threads, self._runtime)
        with self._without_gradients():
            ids = torch.from_numpy(check_tokens(tokens, self._config.n_vocab))[None].to(self._device)
            past = None if state is None else [row.clone() for row in state]
            out = self._model(ids, state=past, use_cache=True)
        if out.logits.shape[1] != len(tokens):
            raise RuntimeError(
                f"{self._runtime} gave the logits of {out.logits.shape[1]} of {len(tokens)} positions; "
                "switch its shortcut for the last position off"
            )
        return out.logits[0], out.state


#: Trace points of a block in the order of DESIGN's list.
_ORDER = (
    *("ln0", "ln1", "att.xk", "att.xv", "att.xr", "att.k", "att.v", "att.rwkv", "att.out", "att.residual"),
    *("ln2", "ffn.xk", "ffn.xr", "ffn.k", "ffn.k2", "ffn.v", "ffn.out", "ffn.residual"),
)


def _place(point: str) -> tuple[int, int]:
    """Where a trace point stands in execution order."""
    words = point.split(".", 2)
    if words[0] != "blocks":
        return (-1 if point == "emb" else sys.maxsize, 0)
    return int(words[1]), _ORDER.index(words[2])


@contextmanager
def _hooked(model: Any, n_layer: int, tap: Tap) -> Iterator[None]:
    """Forward hooks that hand trace points to ``tap`` as the modules run."""
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(_sees_output(tap, point)) for name, point in _OUTER_POINTS.items()]
    for i in range(n_layer):
        for name, (before, after) in _POINTS.items():
            module = modules[f"rwkv.blocks.{i}.{name}".rstrip(".")]
            if before:
                handles.append(module.register_forward_pre_hook(_sees_input(tap, f"blocks.{i}.{before}")))
            if after:
                handles.append(module.register_forward_hook(_sees_output(tap, f"blocks.{i}.{after}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sees_input(tap: Tap, point: str) -> Callable[..., None]:
    return lambda module, inputs: tap(point, _rows(inputs[0]))


def _sees_output(tap: Tap, point: str) -> Callable[..., None]:
    # A block and its feed-forward half return a tuple: the activations, then the state.
    return lambda module, inputs, output: tap(point, _rows(output[0] if isinstance(output, tuple) else output))


def _rows(value: Any) -> np.ndarray:
    """``(1, T, width)`` -> ``(T, width)``."""
    return to_numpy(value).reshape(-1, value.shape[-1])
