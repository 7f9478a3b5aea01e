"""Ground truth: RWKV-4 in numpy, its checkpoints, number formats, quantization schemes, tokenizers."""

from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config, preset, preset_names
from reference.forward import forward, initial_state
from reference.numerics import Arithmetic
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

__all__ = [
    "Arithmetic",
    "Config",
    "Tensor",
    "Weights",
    "forward",
    "initial_state",
    "load_checkpoint",
    "preset",
    "preset_names",
    "save_checkpoint",
    "synthetic",
]
