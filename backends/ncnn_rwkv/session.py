"""The contract of :mod:`backends.api` over an exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ncnn
import numpy as np

from backends.api import State, Tap
from backends.ncnn_rwkv.export import BIN, PARAM
from backends.ncnn_rwkv.names import input_names, state_outputs, trace_points
from reference.forward import STATE_ROWS, check_tokens, initial_state
from reference.schemes import apply
from reference.weights import Tensor, Weights


def open_net(folder: Path, scheme: str, threads: int | None) -> Any:
    """The graph loaded with the options that make ``scheme``."""
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = scheme == "fp16"
    net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_packed = net.opt.use_bf16_storage = scheme == "bf16"
    if threads is not None:
        net.opt.num_threads = threads
    for load, file in ((net.load_param, PARAM), (net.load_model, BIN)):
        if load(str(folder / file)) != 0:
            raise RuntimeError(f"ncnn {ncnn.__version__} cannot read {folder / file}; delete the folder to export anew")
    return net


class NcnnSession:
    """A :class:`backends.api.Session` whose state is a list of ``5 L`` matrices of ncnn, each with its own memory.

    They are handed to the next step as they are: a layer that would work in place copies what others hold too.
    """

    def __init__(self, net: Any, checkpoint: Weights, scheme: str) -> None:
        self._net = net
        self._config = checkpoint.config
        # An embedding that is stored as asked for stays a memory map; float32 upcasts the rows it looks up.
        emb = (checkpoint if scheme == "fp32" else apply(checkpoint, scheme))["emb.weight"]
        self._emb = Tensor.of(emb.read(), emb.stored)
        index = {blob.name: i for i, blob in enumerate(net.blobs())}
        self._inputs = [index[name] for name in input_names(self._config)]
        self._logits = index["logits"]
        self._state = [index[name] for name in state_outputs(self._config)]
        self._points = [(name, index[name]) for name in trace_points(self._config)]
        self._initial = self.import_state(initial_state(self._config))

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        ids = check_tokens(tokens, self._config.n_vocab)
        past = self._initial if state is None else state
        for token in ids[:-1]:
            past = self._new_state(self._start(self._embedding(token), past))
        extractor = self._start(self._embedding(ids[-1]), past)
        logits = _array(_extract(extractor, self._logits))
        return logits, self._new_state(extractor)

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        out = np.empty((len(tokens), self._config.n_vocab), dtype=np.float32)
        past = state
        for i, token in enumerate(tokens):
            out[i], past = self.forward([token], past)
        return out

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        ids = check_tokens(tokens, self._config.n_vocab)
        past = self._initial if state is None else state
        embeddings = [self._embedding(token) for token in ids]
        seen: list[list[np.ndarray]] = []
        for x in embeddings:
            extractor = self._start(x, past)
            extractor.set_light_mode(False)  # else a blob is gone once its last user has run
            seen.append([_array(_extract(extractor, blob)) for _, blob in self._points])
            past = self._new_state(extractor)
        tap("emb", np.stack(embeddings))
        for (name, _), values in zip(self._points, zip(*seen)):
            tap(name, np.stack(values))
        return seen[-1][-1], past

    def export_state(self, state: State) -> np.ndarray:
        shape = (self._config.n_layer, len(STATE_ROWS), self._config.n_embd)
        return np.stack([_array(row) for row in state]).reshape(shape)

    def import_state(self, canonical: np.ndarray) -> State:
        shape = (self._config.n_layer, len(STATE_ROWS), self._config.n_embd)
        if canonical.shape != shape:
            raise ValueError(f"the state has shape {canonical.shape}; this model's is {shape}")
        return [_mat(row) for row in np.array(canonical, dtype=np.float32).reshape(-1, self._config.n_embd)]

    def close(self) -> None:
        self._initial = []
        self._net.clear()

    def _embedding(self, token: int) -> np.ndarray:
        return np.array(self._emb.rows(token), dtype=np.float32)

    def _start(self, x: np.ndarray, past: State) -> Any:
        extractor = self._net.create_extractor()
        for blob, mat in zip(self._inputs, [_mat(x), *past]):
            extractor.input(blob, mat)
        return extractor

    def _new_state(self, extractor: Any) -> State:
        return [_extract(extractor, blob) for blob in self._state]


def _mat(row: np.ndarray) -> Any:
    """A matrix of ncnn with memory of its own; one around a numpy array borrows it, without counting users."""
    return ncnn.Mat(row).clone()


def _array(mat: Any) -> np.ndarray:
    return np.array(mat, dtype=np.float32)


def _extract(extractor: Any, blob: int) -> Any:
    code, mat = extractor.extract(blob)
    if code != 0:
        raise RuntimeError(f"ncnn could not compute blob {blob} of the graph (code {code}); out of memory?")
    return mat
