"""Two independent implementations of RWKV-4 behind the contract: the ``rwkv`` package and transformers.

Neither shares a line with the reference. They are what the reference itself is held against, and what
speed is compared with. torch and they are imported only when one is opened.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.forward import AA, ATT_X, BB, FFN_X, PP
from reference.weights import Tensor, Weights

#: Rows of the canonical state in the order of each package's own.
_RWKV_ROWS = [ATT_X, AA, BB, PP, FFN_X]
_HF_ROWS = [FFN_X, ATT_X, AA, BB, PP]


class RwkvPackage:
    """The ``rwkv`` package of PyPI as its users run it: TorchScript on, ``strategy`` such as ``cpu fp32``.

    Its state is a list of 5 tensors a layer; ``forward`` replaces the list's entries, hence the copies here.
    """

    def __init__(self, weights: Weights, strategy: str = "cpu fp32") -> None:
        os.environ.setdefault("RWKV_JIT_ON", "1")
        with contextlib.redirect_stdout(sys.stderr), _precision_kept(), tempfile.TemporaryDirectory() as folder:
            from rwkv.model import RWKV

            # It appends ".pth" itself and looks nowhere but where an absolute path leads.
            path = Path(folder).resolve() / "model"
            write_pth(weights, path.with_suffix(".pth"))
            self._model = RWKV(model=str(path), strategy=strategy, verbose=False)
            self._activations = self._model.w["emb.weight"].dtype

    def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
        logits, new = self._model.forward([int(t) for t in tokens], None if state is None else list(state))
        return np.asarray(logits.numpy()), new

    def logits(self, tokens: Sequence[int], state: Any | None) -> np.ndarray:
        past = None if state is None else list(state)
        out, _ = self._model.forward([int(t) for t in tokens], past, full_output=True)
        return np.asarray(out.numpy()).reshape(len(tokens), -1)

    def export_state(self, state: Any) -> np.ndarray:
        rows = np.stack([row.float().numpy() for row in state]).reshape(-1, 5, len(state[0]))
        out = np.empty_like(rows)
        out[:, _RWKV_ROWS] = rows
        return out

    def import_state(self, canonical: np.ndarray) -> Any:
        import torch

        kinds = (self._activations, torch.float32, torch.float32, torch.float32, self._activations)
        rows = torch.from_numpy(np.array(canonical, dtype=np.float32))
        return [layer[row].to(kind) for layer in rows for row, kind in zip(_RWKV_ROWS, kinds, strict=True)]


class HuggingFace:
    """``transformers.RwkvForCausalLM`` in float32, evaluation mode, batch 1.

    Its state is five tensors ``(1, n_embd, n_layer)`` which it writes to, hence the copies here.
    """

    def __init__(self, weights: Weights, rescale_every: int = 0) -> None:
        import torch
        from transformers import RwkvConfig, RwkvForCausalLM

        c = weights.config
        self._torch = torch
        self._model = RwkvForCausalLM(
            RwkvConfig(
                vocab_size=c.n_vocab,
                hidden_size=c.n_embd,
                attention_hidden_size=c.n_embd,
                intermediate_size=c.n_ffn,
                num_hidden_layers=c.n_layer,
                rescale_every=rescale_every,
                tie_word_embeddings=False,
            )
        )
        state_dict = {_hf_name(name): _hf_tensor(name, tensor) for name, tensor in weights.items()}
        self._model.load_state_dict(state_dict, strict=True)
        self._model.eval()

    def forward(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
        logits, new = self._run(tokens, state)
        return logits[-1], new

    def logits(self, tokens: Sequence[int], state: Any | None) -> np.ndarray:
        return self._run(tokens, state)[0]

    def export_state(self, state: Any) -> np.ndarray:
        rows = [row[0].T.numpy() for row in state]  # each (n_layer, n_embd)
        out = np.empty((len(rows[0]), 5, rows[0].shape[1]), dtype=np.float32)
        for row, values in zip(_HF_ROWS, rows, strict=True):
            out[:, row] = values
        return out

    def import_state(self, canonical: np.ndarray) -> Any:
        rows = self._torch.from_numpy(np.array(canonical, dtype=np.float32))  # (n_layer, 5, n_embd)
        return [rows[:, row].T[None].contiguous() for row in _HF_ROWS]

    def _run(self, tokens: Sequence[int], state: Any | None) -> tuple[np.ndarray, Any]:
        ids = self._torch.tensor([[int(t) for t in tokens]])
        past = None if state is None else [row.clone() for row in state]
        with self._torch.no_grad():
            out = self._model(ids, state=past, use_cache=True)
        return np.asarray(out.logits[0].numpy()), out.state


def write_pth(weights: Weights, path: Path) -> None:
    """A checkpoint as BlinkDL's trainer saves it: every tensor in its stored type, ``time_mix_*`` as ``(1, 1, C)``."""
    import torch

    tensors = {}
    for name, tensor in weights.items():
        value = _torch_tensor(tensor)
        tensors[name] = value.reshape(1, 1, -1) if ".time_mix_" in name else value
    torch.save(tensors, path)


def _torch_tensor(tensor: Tensor) -> Any:
    import torch

    value = torch.from_numpy(np.array(tensor.read()))
    return value.view(torch.bfloat16) if tensor.stored == "bf16" else value


def _hf_tensor(name: str, tensor: Tensor) -> Any:
    value = _torch_tensor(tensor).float()
    return value.reshape(1, 1, -1) if ".time_mix_" in name else value


def _hf_name(name: str) -> str:
    if name == "head.weight":
        return name
    for old, new in (
        ("emb.", "embeddings."),
        ("blocks.0.ln0.", "blocks.0.pre_ln."),
        (".att.", ".attention."),
        (".ffn.", ".feed_forward."),
        ("time_mix_k", "time_mix_key"),
        ("time_mix_v", "time_mix_value"),
        ("time_mix_r", "time_mix_receptance"),
    ):
        name = name.replace(old, new)
    return f"rwkv.{name}"


@contextlib.contextmanager
def _precision_kept() -> Iterator[None]:
    """Importing ``rwkv`` allows TF32 for the whole process; undo that."""
    import torch

    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
