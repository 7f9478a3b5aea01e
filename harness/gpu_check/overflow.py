"""A model with one operation driven beyond fp16, for a localization to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.localize.magnitudes import measure
from harness.models import gate_tokens, open_model
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.weights import Tensor

#: How large the operation gets; the largest fp16 is 65504.
TARGET = 1.0e5


def point_of(config: Config) -> str:
    """The operation that overflows: squared ReLU in the middle of the model."""
    return f"blocks.{config.n_layer // 2}.ffn.k2"


def write_overflowing(name: str, path: Path, prompt_tokens: int = 48) -> None:
    """Keys of one layer's channel mix grown, its values shrunk in turn, so that the function stays what it was."""
    model = open_model(name)
    point = point_of(model.config)
    value = measure(model.weights, gate_tokens(model, prompt_tokens))[point].value
    factor = float(np.sqrt(TARGET / value))  # the operation squares
    at = point.removesuffix("k2")
    factors = {f"{at}key.weight": factor, f"{at}value.weight": factor**-2}

    def change(name: str, tensor: Tensor) -> Tensor:
        return Tensor.of(tensor.array() * np.float32(factors[name])) if name in factors else tensor

    save_checkpoint(model.weights.map(change), path, "safetensors", "fp32")
