# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["torch==2.13.0", "numpy>=1.26"]
# [tool.rwkv-bench]
# no-deps = ["rwkv==0.8.32"]
# ///
"""The ``rwkv`` package of PyPI (ChatRWKV's inference code), with TorchScript on and its CUDA kernels off.

A scheme is what the package calls a strategy, on one device: ``cpu fp32i8`` is scheme fp32i8. The package

* applies ln0 to the embedding at load, in the type of the file, so it is given a file of the type of the
  activations: what it then computes with is exactly the scheme's weights;
* in ``fp16`` strategies divides ``att.output`` and ``ffn.value`` of layer i by 2^(i // 6) and halves x after
  every sixth layer. Both are exact but where fp16 is subnormal (weights under 6e-5 x 2^(i // 6)), and the
  epsilon of LayerNorm weighs up to 4^(i // 6) times as much;
* dequantizes a whole int8 matrix for every product when its CUDA kernels are off: i8 saves memory, not time.
  On CUDA TorchScript may fuse that and round less often than the codec, which is what the CPU path computes;
* reads, at import, ``RWKV_JIT_ON``, ``RWKV_CUDA_ON`` and ``RWKV_V7_ON``, at load ``RWKV_RESCALE_LAYER``, and
  ``RWKV_CUDA_ON`` again at every prompt. ``load`` sets the first two to 1 and 0 and leaves them so, and takes
  the others away while it loads: nothing of what the user's environment says changes a row;
* allows TF32 for the whole process at import, which ``load`` undoes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import BackendInfo, Session, State, Unavailable, Unsupported
from backends.shared.torch_runtime import check_device, check_threads, package_version, settle, to_numpy
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.converted import derived
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens
from reference.numerics import Arithmetic
from reference.weights import Weights

_HALF = {kind: Arithmetic(activations=kind, residual=kind) for kind in ("fp16", "bf16")}

INFO = BackendInfo(
    name="rwkv",
    description="the rwkv package of PyPI (ChatRWKV), TorchScript on, its own CUDA kernels off",
    origin="https://github.com/BlinkDL/ChatRWKV, PyPI rwkv",
    devices=("cpu", "cuda"),
    schemes={
        "fp32": Arithmetic(),
        "bf16": _HALF["bf16"],
        "fp16": _HALF["fp16"],
        "fp32i8": Arithmetic(),
        "fp16i8": _HALF["fp16"],
    },
)

#: Rows of the canonical state in the order of the package's own, five tensors a layer, and which are activations.
_ROWS = (ATT_X, AA, BB, PP, FFN_X)
_INPUTS = (ATT_X, FFN_X)

_INSTALL = "pip install torch && pip install --no-deps rwkv==0.8.32"


def check() -> None:
    """Raises Unavailable where torch or the package is not installed; imports neither."""
    for package in ("torch", "rwkv"):
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed", _INSTALL)


def version() -> str:
    """Version of the package, without importing it; empty where it is not installed."""
    return package_version("rwkv")


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Write the ``.pth`` that :func:`load` reads into the cache."""
    model_file(checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session with strategy ``{device} {scheme}``; ``threads`` is torch's. Raises Unavailable or Unsupported."""
    if scheme not in INFO.schemes:
        raise Unsupported(f"rwkv has no scheme {scheme!r}; it has {', '.join(INFO.schemes)}")
    check()
    check_threads(threads, INFO.name)
    check_device(device, INFO.name)
    path = model_file(checkpoint, scheme)
    with contextlib.redirect_stdout(sys.stderr), _process_kept():
        model = _model_class()(model=str(path.with_suffix("")), strategy=f"{device} {scheme}", verbose=False)
    return RwkvSession(model, checkpoint.config, threads)


class RwkvSession:
    """Scoring and StateAccess. A state is the package's list of ``5 n_layer`` tensors ``(n_embd,)``.

    ``RWKV.forward`` replaces the entries of the list it is given, and writes to no tensor in it.
    """

    def __init__(self, model: Any, config: Config, threads: int | None) -> None:
        self._model = model
        self._config = config
        self._threads = threads
        settle(threads, INFO.name)

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        logits, new = self._run(tokens, state, full_output=False)
        return to_numpy(logits), new

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        return to_numpy(self._run(tokens, state, full_output=True)[0]).reshape(len(tokens), -1)

    def export_state(self, state: State) -> np.ndarray:
        out = np.empty((self._config.n_layer, len(STATE_ROWS), self._config.n_embd), dtype=np.float32)
        for i in range(self._config.n_layer):
            for position, row in enumerate(_ROWS):
                out[i, row] = to_numpy(state[len(_ROWS) * i + position])
        return out

    def import_state(self, canonical: np.ndarray) -> State:
        import torch

        shape = (self._config.n_layer, len(STATE_ROWS), self._config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        emb = self._model.w["emb.weight"]
        place = self._model.strategy[0].device
        rows = torch.from_numpy(np.array(canonical, dtype=np.float32)).to(place)
        return [layer[row].to(emb.dtype if row in _INPUTS else torch.float32) for layer in rows for row in _ROWS]

    def close(self) -> None:
        import torch

        on_cuda = "cuda" in self._model.args.strategy_string
        del self._model
        if on_cuda:
            torch.cuda.empty_cache()

    def _run(self, tokens: Sequence[int], state: State | None, full_output: bool) -> tuple[Any, State]:
        settle(self._threads, INFO.name)
        ids = check_tokens(tokens, self._config.n_vocab).tolist()
        logits, new = self._model.forward(ids, None if state is None else list(state), full_output=full_output)
        return logits, new


def model_file(checkpoint: Weights, scheme: str) -> Path:
    """A ``.pth`` of the type of the scheme's activations; absolute, as the package wants it."""
    kind = scheme[:4]
    return derived(checkpoint, f"{kind}.pth", lambda path: save_checkpoint(checkpoint, path, "pth", kind)).resolve()


def _model_class() -> Any:
    """``rwkv.model.RWKV`` for RWKV-4; raises Unsupported where this process has imported it for RWKV-7."""
    from rwkv import model

    if model.RWKV.__name__ != "RWKV":
        raise Unsupported("rwkv was imported with RWKV_V7_ON=1 in this process; run it in one of its own (--isolate)")
    return model.RWKV


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Environment for import and load; afterwards precision and the user's variables as they were."""
    import torch

    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    taken = {name: os.environ.pop(name) for name in ("RWKV_V7_ON", "RWKV_RESCALE_LAYER") if name in os.environ}
    os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    try:
        yield
    finally:
        os.environ.update(taken)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
