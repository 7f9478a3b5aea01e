"""What a model keeps on its device: its weights, and what a step of decoding works on.

Shapes and symbols as in :mod:`reference.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from backends.triton_cuda.matrix import Matrix
from backends.triton_cuda.tiles import TOP_BLOCK
from backends.triton_cuda.types import Types
from reference.config import Config


@dataclass(frozen=True)
class Layer:
    """One block. Vectors are float32; ``*_norm (2, C)`` weight and bias, ``*_mu`` mixing weights one below the other.

    kvr  key, value and receptance of time mixing ``(3 C, C)``; kr: key and receptance of channel mixing ``(F + C, C)``
    """

    att_norm: Tensor
    att_mu: Tensor  # k, v, r
    decay: Tensor
    bonus: Tensor
    kvr: Matrix
    output: Matrix
    ffn_norm: Tensor
    ffn_mu: Tensor  # k, r
    kr: Matrix
    value: Matrix
    unit: float  # what the stream is divided by here


@dataclass(frozen=True)
class Stored:
    """All weights of a model on its device."""

    embedding: Matrix
    first_norm: Tensor
    layers: tuple[Layer, ...]
    last_norm: Tensor
    head: Matrix


class Step:
    """Everything a step of decoding reads and writes, at addresses that stay.

    ids (batch), state (batch, L, 5, C), logits (batch, V); ``chosen (capacity, batch)``: what greedy steps have chosen,
    ``count (batch)`` how many. Batch 1 has buffers for its kernels; others run as prompts of one token.
    """

    CAPACITY = 4096

    def __init__(self, config: Config, types: Types, device: torch.device, stored: Stored, batch: int) -> None:
        width, blocks = config.n_embd, triton.cdiv(config.n_vocab, TOP_BLOCK)
        layer = stored.layers[0]
        self.batch = batch
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.state = torch.zeros(batch, config.n_layer, 5, width, device=device)
        self.logits = torch.empty(batch, config.n_vocab, device=device)
        self.tops = torch.empty(batch, blocks, device=device)
        self.places = torch.empty(batch, blocks, dtype=torch.int32, device=device)
        self.chosen = torch.zeros(self.CAPACITY, batch, dtype=torch.int64, device=device)
        self.count = torch.zeros(batch, dtype=torch.int32, device=device)
        self.x = torch.empty(1, width, dtype=types.stream, device=device)
        self.mixed = layer.kvr.vectors(3, types.inputs)
        # Where float16 is guarded against overflow, these vectors simply stay float32.
        self.inner = layer.output.vectors(1, types.made)
        self.squared = layer.value.vectors(1, types.made)
        self.last = stored.head.vectors(1, types.inputs)
        self.gate = torch.empty(width, dtype=types.made, device=device)
