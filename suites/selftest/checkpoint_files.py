"""Small checkpoints for the tests of reading and writing them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.checkpoint import load_checkpoint
from reference.config import Config, tensor_shapes
from reference.errors import CheckpointError
from reference.weights import STORED_TYPES, Tensor, Weights

SMALL = Config(n_layer=2, n_embd=4, n_ffn=8, n_vocab=10)
#: Formats that keep every tensor as it is; the others have tests of their own.
FORMATS = ("pth", "safetensors", "hf")


def random_bits(config: Config, stored: Sequence[str], seed: int) -> Weights:
    """Weights of random bits, NaN payloads included, their types taken in turn from ``stored``."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for (name, shape), kind in zip(tensor_shapes(config).items(), itertools.cycle(stored), strict=False):
        item = np.dtype(STORED_TYPES[kind])
        data = rng.integers(0, 256, (*shape, item.itemsize), dtype=np.uint8)
        tensors[name] = Tensor.of(data.view(item)[..., 0], kind)
    return Weights(config, tensors)


def random_values(config: Config = SMALL, stored: str = "f32", seed: int = 0) -> Weights:
    """Weights of ordinary size in one float type that numpy has."""
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(config)
    return Weights.of(config, {n: rng.standard_normal(s).astype(STORED_TYPES[stored]) for n, s in shapes.items()})


def same(a: Weights, b: Weights) -> bool:
    """Whether two models are equal, name by name, type by type and bit by bit."""
    return list(a) == list(b) and all(
        (a[n].stored, a[n].shape, a[n].read().tobytes()) == (b[n].stored, b[n].shape, b[n].read().tobytes()) for n in a
    )


def torch_dict(weights: Weights) -> dict[str, Any]:
    """The state dict torch would hold, in canonical shapes; bf16 by its bits."""
    import torch

    found = {}
    for name, tensor in weights.items():
        value = torch.from_numpy(np.array(tensor.read()))
        found[name] = value.view(torch.bfloat16) if tensor.stored == "bf16" else value
    return found


def arrays(weights: Weights) -> dict[str, np.ndarray]:
    """The raw arrays by canonical name."""
    return {name: np.ascontiguousarray(tensor.read()) for name, tensor in weights.items()}


def safetensors_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header and data as given, right or wrong."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def hf_folder(path: Path, config: str, files: Mapping[str, bytes] | None = None) -> Path:
    """A folder with this ``config.json`` and these files."""
    path.mkdir()
    (path / "config.json").write_text(config)
    for name, data in (files or {}).items():
        (path / name).write_bytes(data)
    return path


def refusal(path: str | os.PathLike[str]) -> str:
    """The message with which a path is refused; one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert os.fspath(path) in message
    return message
