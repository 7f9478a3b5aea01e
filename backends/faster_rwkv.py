"""faster-rwkv: the user's own build, through its Python module ``fasterrwkv``.

Read in https://github.com/daquexian/faster-rwkv at its last commit (2023-10, be717cf); its binaries are for a
CUDA machine or a phone, so the arithmetic is declared from the source and not verified here.

    cuda fp16   scheme ``fp16`` on ``cuda``: half-precision weights, activations and residual stream (halved after
                every sixth layer), cuBLAS sums in float32, WKV and its state in float32
    ncnn fp16   scheme of that name on ``cpu``: fp16 in the file, bfloat16 in memory, because it runs ncnn with
                ``use_bf16_storage`` throughout, WKV and its state included; the embedding after ln0 is int8 with an
                fp16 scale per 64. No codec here, so it has no kernel parity. It needs its own fork of ncnn; against
                stock ncnn it crashes. ``ncnn`` (backends/ncnn_rwkv) is the same engine with stock ncnn.

The program ``chat`` answers text with text and a speed: no logits, so there is no session over it. Its figures
come in through ``rwkv-bench import --from faster-rwkv`` or a phone of the inventory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import BackendInfo, Session, State, Unavailable, Unsupported
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.converted import converted, derived
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, check_tokens
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

NCNN = "ncnn fp16"

INFO = BackendInfo(
    name="faster-rwkv",
    description="faster-rwkv's Python module: strategies 'cuda fp16' (fp16 on cuda) and 'ncnn fp16' (bf16 in fact)",
    origin="https://github.com/daquexian/faster-rwkv",
    devices=("cuda", "cpu"),
    schemes={
        "fp16": Arithmetic(activations="fp16", residual="fp16"),
        NCNN: Arithmetic(activations="bf16", residual="bf16", wkv="bf16"),
    },
    arithmetic_documented=False,
)

#: Names the ``chat`` program; ``export_ncnn`` is looked for beside it, then on the path.
VARIABLE = "RWKV_BENCH_FASTER_RWKV"

#: Scheme -> the device it runs on and faster-rwkv's name for the two.
_STRATEGIES = {"fp16": ("cuda", "cuda fp16"), NCNN: ("cpu", NCNN)}

_MODULE = "build its Python module: pip install ./python in a checkout of github.com/daquexian/faster-rwkv"

#: ``export_ncnn`` quantizes the embedding in groups of this many, and aborts where they do not divide a row.
_GROUP = 64

#: Rows of a layer's state in the order of faster-rwkv, as canonical rows.
_ROWS = (ATT_X, AA, BB, PP, FFN_X)


def check() -> None:
    """Raises Unavailable without the module ``fasterrwkv``; says what the ``chat`` program is good for, if named."""
    if find_spec("fasterrwkv") is not None:
        return
    chat = os.environ.get(VARIABLE)
    if not chat:
        raise Unavailable("faster-rwkv is not installed", _MODULE)
    if not os.path.isfile(chat):
        raise Unavailable(f"{VARIABLE} names {chat}, which is no file", "name faster-rwkv's chat program")
    raise Unavailable(
        f"{VARIABLE} names the chat program, which prints text and a speed but no logits to judge",
        "import its speed with `rwkv-bench import --from faster-rwkv` or name a phone in the inventory; "
        f"for parity {_MODULE}",
    )


def version() -> str:
    """Version of the module, without importing it; empty where it is not installed."""
    try:
        return installed_version("fasterrwkv")
    except PackageNotFoundError:
        return ""


def prepare(checkpoint: Weights, scheme: str, device: str) -> None:
    """Write the ``.fr`` file, and for ncnn what ``export_ncnn`` makes of it, into the cache."""
    _strategy(scheme, device)
    check()
    _model_file(checkpoint, scheme)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session over the module's model; ``threads`` counts on ``cpu`` only. Raises Unavailable or Unsupported."""
    strategy = _strategy(scheme, device)
    if threads is not None and threads < 1:
        raise Unsupported(f"faster-rwkv needs at least one CPU thread; {threads} were asked for")
    check()
    path = _model_file(checkpoint, scheme)
    import fasterrwkv

    before = os.environ.pop("FR_THREADS", None)
    try:  # read once, when a model is made
        if threads is not None:
            os.environ["FR_THREADS"] = str(threads)
        model = fasterrwkv.Model(str(path), strategy)
    finally:
        os.environ.pop("FR_THREADS", None)
        if before is not None:
            os.environ["FR_THREADS"] = before
    return (NcnnSession if scheme == NCNN else FasterRwkvSession)(model, checkpoint.config)


def _strategy(scheme: str, device: str) -> str:
    if scheme not in _STRATEGIES:
        raise Unsupported(f"faster-rwkv has no scheme {scheme!r}; it has {', '.join(_STRATEGIES)}")
    wanted, strategy = _STRATEGIES[scheme]
    if device != wanted:
        raise Unsupported(f"faster-rwkv runs {scheme} on {wanted}, not on {device!r}")
    return strategy


def _model_file(checkpoint: Weights, scheme: str) -> Path:
    """What ``Model`` takes: a ``.fr`` file, or the common beginning of ncnn's three files."""
    if scheme != NCNN:
        # Everything rounded first: a .fr file keeps time_decay and time_first in float32.
        return derived(
            checkpoint, "of-fp16.fr", lambda path: save_checkpoint(apply(checkpoint, scheme), path, "fr", scheme)
        )
    if checkpoint.config.n_embd % _GROUP:
        raise Unsupported(
            f"faster-rwkv's export_ncnn needs n_embd in multiples of {_GROUP}, not {checkpoint.config.n_embd}"
        )
    program = _export_program()
    source = converted(checkpoint, "fr", "fp32")  # the only type it takes, whatever it writes
    return derived(checkpoint, "faster-rwkv-ncnn-fp16", lambda folder: _export(program, source, folder)) / "model"


def _export_program() -> str:
    chat = os.environ.get(VARIABLE)
    beside = Path(chat).parent / "export_ncnn" if chat else None
    found = str(beside) if beside is not None and beside.is_file() else shutil.which("export_ncnn")
    if found is None:
        raise Unavailable(
            "export_ncnn of faster-rwkv, which makes ncnn's files, is not there",
            f"put it on the path or beside the program that {VARIABLE} names",
        )
    return found


def _export(program: str, source: Path, folder: Path) -> None:
    folder.mkdir()
    command = [program, str(source), str(folder / "model"), "fp16"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    missing = [end for end in ("param", "bin", "config") if not (folder / f"model.{end}").is_file()]
    if done.returncode or missing:
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{program} ended with {done.returncode}: {''.join(last)[:200]}")


@dataclass(frozen=True, eq=False)
class History:
    """A state as what led to it, call by call: the module holds one state and lets nobody set it.

    start  float32 ``(n_layer, 5, n_embd)`` that was imported, on the first of a chain
    """

    before: History | None = None
    tokens: tuple[int, ...] = ()
    start: np.ndarray | None = None

    def calls(self) -> Iterator[History]:
        """From the first call to this one."""
        chain = [self]
        while chain[-1].before is not None:
            chain.append(chain[-1].before)
        return reversed(chain)


class FasterRwkvSession:
    """A :class:`backends.api.Session` over the one state of a model.

    Going on from where the model is costs nothing. Any other state is reached by running again what led to
    it, in the same calls.
    """

    def __init__(self, model: Any, config: Config) -> None:
        self._model = model
        self._config = config
        self._fresh = History()
        self._now = self._fresh
        model.reset_states()

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        ids = tuple(int(i) for i in check_tokens(tokens, self._config.n_vocab))
        self._go_to(self._fresh if state is None else state)
        return self._run(ids)

    def close(self) -> None:
        del self._model

    def _run(self, ids: tuple[int, ...]) -> tuple[np.ndarray, History]:
        before, self._now = self._now, self._fresh
        try:
            # A view of the model's memory, of float16 on cuda.
            logits = np.array(self._model(list(ids)), dtype=np.float32).reshape(-1)
        except BaseException:
            self._model.reset_states()  # it may have stopped half way
            raise
        self._now = History(before, ids)
        return logits, self._now

    def _go_to(self, wanted: History) -> None:
        if wanted is self._now:
            return
        self._model.reset_states()
        self._now = self._fresh
        for call in wanted.calls():
            if call.start is not None:
                self._set(call.start)
            elif call.tokens:
                self._run(call.tokens)
            self._now = call

    def _set(self, canonical: np.ndarray) -> None:
        raise Unsupported("faster-rwkv lets nobody set a state on cuda")


class NcnnSession(FasterRwkvSession):
    """The same where the state lies in host memory: its buffers can be read and written."""

    def export_state(self, state: State) -> np.ndarray:
        self._go_to(state)
        out = np.empty((self._config.n_layer, len(STATE_ROWS), self._config.n_embd), dtype=np.float32)
        for i, layer in enumerate(self._model.states()):
            for row, tensor in zip(_ROWS, layer):
                out[i, row] = tensor.numpy()
        return out

    def import_state(self, canonical: np.ndarray) -> State:
        shape = (self._config.n_layer, len(STATE_ROWS), self._config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        return History(start=np.array(canonical, dtype=np.float32))

    def _set(self, canonical: np.ndarray) -> None:
        for i, layer in enumerate(self._model.states()):
            for row, tensor in zip(_ROWS, layer):
                tensor.numpy()[...] = canonical[i, row]
        written = History(start=canonical)
        self._now = written
        if not np.array_equal(self.export_state(written), canonical):
            raise RuntimeError("faster-rwkv's module gives copies of its state, so that none can be set")
