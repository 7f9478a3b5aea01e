"""Synthetic weights: the real shapes, random numbers, activations of realistic size at every depth.

Matrices are normal with variance 1/fan-in, so that each product keeps the scale of its input;
LayerNorm gains are near 1; decay, bonus and mixing vectors follow BlinkDL's initialisation formulas
(RWKV-LM, RWKV-v4neo/src/model.py), which spread memory from one token to thousands over the
channels. What comes out, and what the tests check at every size they can afford: the residual
stream's RMS stays within 0.3 and 30, each half block adds between 2 % and 150 % of it, and logits
have a standard deviation between 1 and 10.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from reference.config import Config, preset, tensor_shapes
from reference.weights import Tensor, Weights

#: Logit scale of trained RWKV-4 models is a few units; the other matrices keep their input's scale.
_GAIN = {"head.weight": 2.5}


def synthetic(preset_or_config: str | Config, seed: int = 0, scale: float = 1.0) -> Weights:
    """Random RWKV-4 weights, stored as fp16, each tensor made when it is read.

    A tensor depends on ``seed`` and its own name only, so a 7B model needs no memory until it is
    used and its first layers are the same at any depth. ``scale`` multiplies every matrix but the
    embedding, to drive activations towards overflow or underflow.
    """
    config = preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    name = preset_or_config if isinstance(preset_or_config, str) else "custom"
    tensors = {
        tensor: Tensor("f16", shape, _maker(config, tensor, shape, seed, scale))
        for tensor, shape in tensor_shapes(config).items()
    }
    return Weights(config, tensors, source=f"synthetic {name}, seed {seed}", synthetic=True)


def _maker(config: Config, name: str, shape: tuple[int, ...], seed: int, scale: float) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if len(shape) == 2:
            return _matrix(rng, shape, 1.0 if name == "emb.weight" else scale * _GAIN.get(name, 1.0) / shape[1] ** 0.5)
        return np.asarray(_vector(config, name, rng).astype(np.float16))

    return make


def _matrix(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    out = np.empty(shape, dtype=np.float16)
    rows = max(1, (1 << 22) // shape[1])  # some MiB of float32 at a time
    for start in range(0, shape[0], rows):
        block = out[start : start + rows]
        block[...] = rng.standard_normal(block.shape, dtype=np.float32) * np.float32(std)
    return out


def _vector(config: Config, name: str, rng: np.random.Generator) -> np.ndarray:
    """LayerNorm gains and biases near 1 and 0; decay, bonus and mixing as RWKV-v4neo initialises them."""
    channel = np.arange(config.n_embd)
    noise = 0.1 * rng.standard_normal(config.n_embd)
    if name.endswith(".weight"):
        return 1 + noise
    if name.endswith(".bias"):
        return noise
    layer = int(name.split(".")[1])
    depth = layer / max(1, config.n_layer - 1)  # 0 .. 1
    left = 1 - layer / config.n_layer  # 1 .. ~0
    if name.endswith("time_decay"):
        return np.asarray(-5 + 8 * (channel / max(1, config.n_embd - 1)) ** (0.7 + 1.3 * depth))
    if name.endswith("time_first"):
        return np.asarray(np.log(0.3) + 0.5 * ((channel + 1) % 3 - 1) + noise)
    ramp = channel / config.n_embd
    power = 0.5 * left if name.endswith("att.time_mix_r") else left
    return np.asarray(ramp**power + (0.3 * depth if name.endswith("att.time_mix_v") else 0.0))
