"""From weights to ncnn's two files, once, in the cache: ``model.param`` (the graph as text) and ``model.bin``.

torch and pnnx are imported where they are used: a session over what is in the cache needs neither.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backends.ncnn_rwkv.bin_file import halve
from backends.ncnn_rwkv.names import input_names, output_names, wkv_parts
from backends.ncnn_rwkv.param_file import kept_float32, parse, renamed, render
from reference.config import Config
from reference.converted import derived
from reference.schemes import apply
from reference.weights import Weights

PARAM, BIN = "model.param", "model.bin"

#: Raise it when the same weights are exported into another graph.
_EXPORT = 1


def exported(checkpoint: Weights, scheme: str) -> Path:
    """Folder of the graph over ``checkpoint`` stored by ``scheme``: fp32, fp16 or bf16."""
    name = f"ncnn-{scheme}-pnnx{version('pnnx')}-{_EXPORT}"
    return derived(checkpoint, name, lambda folder: _export(apply(checkpoint, scheme), scheme, folder))


def _export(weights: Weights, scheme: str, folder: Path) -> None:
    config = weights.config
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        traced = Path(scratch) / "step.pt"
        _trace(weights, traced)  # and let go of the weights before pnnx reads them
        _run_pnnx(traced, config)
        layers = parse((traced.parent / PARAM).read_text())
        if scheme == "fp16":
            halve(layers, traced.parent / BIN, folder / BIN)
        else:
            (traced.parent / BIN).rename(folder / BIN)
    # pnnx numbers inputs and outputs in the order of the module's.
    names = {f"in{j}": name for j, name in enumerate(input_names(config))}
    names.update({f"out{j}": name for j, name in enumerate(output_names(config))})
    layers = renamed(layers, names)
    missing = set(names.values()) - {blob for layer in layers for blob in layer.tops}
    if missing:
        raise RuntimeError(f"pnnx {version('pnnx')} left {min(missing)} out of the graph; use the pinned version")
    if scheme == "bf16":
        layers = kept_float32(layers, wkv_parts(config))
    (folder / PARAM).write_text(render(layers))


def _trace(weights: Weights, path: Path) -> None:
    import torch

    from backends.ncnn_rwkv.graph import Step

    rows = torch.ones(1 + 5 * weights.config.n_layer, weights.config.n_embd)
    with torch.inference_mode():
        trace: Any = torch.jit.trace  # has no types
        trace(Step(weights), tuple(rows), check_trace=False).save(str(path))


def _run_pnnx(traced: Path, config: Config) -> None:
    """Its results are written beside ``traced``. It takes about twice the weights of memory."""
    import pnnx

    shapes = ",".join([f"[{config.n_embd}]f32"] * len(input_names(config)))
    command = [pnnx.EXEC_PATH, traced.name, f"inputshape={shapes}", "fp16=0", f"ncnnparam={PARAM}", f"ncnnbin={BIN}"]
    command += [f"{unwanted}={os.devnull}" for unwanted in ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=traced.parent, check=False)
    if done.returncode or not (traced.parent / BIN).exists():
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"pnnx {pnnx.__version__} ended with {done.returncode}: {''.join(last)[:200]}")
