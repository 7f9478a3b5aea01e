"""A checkpoint onto the device, stored as a scheme has it: tensor by tensor: the host never holds it all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.triton_cuda.matrix import Matrix
from backends.triton_cuda.stored import Layer, Stored
from reference.schemes import Codec, Packed, codec_of
from reference.weights import Tensor as StoredTensor
from reference.weights import Weights

#: Weights quantized at a time.
_BLOCK_ELEMENTS = 1 << 22

_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def place(weights: Weights, scheme: str, device: torch.device, rescale_every: int = 0) -> Stored:
    """All weights; ``rescale_every`` divides those whose products are added to the stream, as the stream is."""
    placing = _Placing(weights, codec_of(scheme), device)
    layers = (placing.layer(i, rescale_every) for i in range(weights.config.n_layer))
    return Stored(
        embedding=placing.matrix("emb.weight"),
        first_norm=placing.vectors("blocks.0.ln0.weight", "blocks.0.ln0.bias"),
        layers=tuple(layers),
        last_norm=placing.vectors("ln_out.weight", "ln_out.bias"),
        head=placing.matrix("head.weight"),
    )


class _Placing:
    def __init__(self, weights: Weights, codec: Codec, device: torch.device) -> None:
        self._weights, self._codec, self._device = weights, codec, device

    def layer(self, i: int, rescale_every: int) -> Layer:
        at, unit = f"blocks.{i}.", float(2 ** (i // rescale_every)) if rescale_every else 1.0
        att, ffn = at + "att.", at + "ffn."
        return Layer(
            att_norm=self.vectors(at + "ln1.weight", at + "ln1.bias"),
            att_mu=self.vectors(*(f"{att}time_mix_{name}" for name in "kvr")),
            decay=self.vectors(att + "time_decay")[0].exp(),
            bonus=self.vectors(att + "time_first")[0],
            kvr=self.matrix(*(f"{att}{name}.weight" for name in ("key", "value", "receptance"))),
            output=self.matrix(att + "output.weight", unit=unit),
            ffn_norm=self.vectors(at + "ln2.weight", at + "ln2.bias"),
            ffn_mu=self.vectors(*(f"{ffn}time_mix_{name}" for name in "kr")),
            kr=self.matrix(ffn + "key.weight", ffn + "receptance.weight"),
            value=self.matrix(ffn + "value.weight", unit=unit),
            unit=unit,
        )

    def vectors(self, *names: str) -> Tensor:
        """Stored as the scheme has them, then float32, one below the other."""
        rows = [self._codec.format(name).keep(name, self._weights[name]).array(np.float32) for name in names]
        return torch.from_numpy(np.stack(rows)).to(self._device)

    def matrix(self, *names: str, unit: float = 1.0) -> Matrix:
        """Matrices of one width, one below the other."""
        stored = [self._weights[name] for name in names]
        kept = self._codec.format(names[0])
        if isinstance(kept, Packed):
            return self._packed(stored, kept.packing)
        floats = [kept.keep(name, tensor) for name, tensor in zip(names, stored)]
        results, columns = sum(tensor.shape[0] for tensor in floats), floats[0].shape[1]
        data = torch.empty(results, columns, dtype=_TYPES[floats[0].stored], device=self._device)
        first = 0
        for tensor in floats:
            part = data[first : first + tensor.shape[0]]
            part.copy_(_to_torch(tensor))
            if unit != 1:
                part.div_(unit)  # a power of two: exact but for subnormal weights
            first += tensor.shape[0]
        return Matrix(data, results, columns)

    def _packed(self, stored: list[StoredTensor], packing: Any) -> Matrix:
        kn = packing.layout == "KN"
        results, columns = sum(tensor.shape[0] for tensor in stored), stored[0].shape[1]
        groups = -(-columns // packing.group)
        words = torch.empty(_turned(results, groups * packing.bits, kn), dtype=torch.int32, device=self._device)
        scales = torch.empty(_turned(results, groups, kn), dtype=torch.float16, device=self._device)
        first = 0
        for tensor in stored:
            for rows in _blocks(tensor):
                packed = packing.quantize(tensor.rows(rows))
                count = packed.q_scale.shape[0]
                for out, part in ((words, packed.q_weight.view(np.int32)), (scales, packed.q_scale)):
                    part = torch.from_numpy(np.ascontiguousarray(part.T if kn else part))
                    (out[:, first : first + count] if kn else out[first : first + count]).copy_(part)
                first += count
        return Matrix(words, results, columns, scales, packing.bits, kn)


def _turned(rows: int, columns: int, kn: bool) -> tuple[int, int]:
    return (columns, rows) if kn else (rows, columns)


def _blocks(tensor: StoredTensor) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // tensor.shape[1])
    for start in range(0, tensor.shape[0], step):
        yield slice(start, min(start + step, tensor.shape[0]))


def _to_torch(stored: StoredTensor) -> Tensor:
    raw = stored.read()
    if not raw.flags.writeable:  # torch warns of memory it could write to, such as a read-only map
        raw = raw.copy()
    tensor = torch.from_numpy(np.ascontiguousarray(raw))
    return tensor.view(torch.bfloat16) if stored.stored == "bf16" else tensor
