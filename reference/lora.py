"""LoRA files merged into a checkpoint, as rwkv.cpp's ``python/merge_lora_into_ggml.py`` merges them.

A file of RWKV-LM-LoRA (https://github.com/Blealtan/RWKV-LM-LoRA) holds for some matrices ``W (N, K)`` a pair
``NAME.lora_A (r, K)`` and ``NAME.lora_B (N, r)``, NAME without its ``.weight``, and whole tensors that
replace those of the checkpoint, such as LayerNorms and ``time_*``. Merged is ``W + B A alpha / r``.

A file without a pair is no LoRA: an ordinary checkpoint would replace everything.

Every merged tensor keeps the stored type that it has in the checkpoint; the sum is taken in float64 and
rounded once.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reference.checkpoint import read_file
from reference.config import is_matrix
from reference.errors import CheckpointError, ConfigError, NonFiniteWeights
from reference.packed_tensor import PackedTensor
from reference.tensor_file import count, quoted, release, reshaped
from reference.tensor_stream import convert
from reference.weights import Tensor, Weights

#: Merge at most this many weights at a time.
_BLOCK_ELEMENTS = 1 << 20

_PAIRED = re.compile(r"\.lora_[AB](\.weight)?$")


def merge_lora(weights: Weights, path: str | os.PathLike[str], alpha: float) -> Weights:
    """``weights`` with the LoRA file merged in; every tensor is merged as it is read.

    alpha  the ``lora_alpha`` that the file was trained with, which it does not say itself

    Raises :class:`CheckpointError` where the file has no pair, or a tensor of it has no place in the
    checkpoint or another shape, :class:`ConfigError` for an ``alpha`` that is no number or weights that are quantized.
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"lora_alpha is {alpha}; a finite number is expected")
    source = os.fspath(path)
    found = dict(read_file(source).tensors)
    if not any(_PAIRED.search(name) for name in found):
        raise CheckpointError(f"{source}: holds no pair NAME.lora_A and NAME.lora_B, so it is no LoRA file")
    merged: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        changed = _replaced(name, tensor, found, source)
        changed = _with_lora(name, changed, found, alpha, source)
        if changed is not tensor and isinstance(tensor, PackedTensor):
            raise ConfigError(f"{weights.source}: tensor {name} is quantized; merge into the FP16 or FP32 checkpoint")
        merged[name] = changed
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(f"{source}: tensor {quoted(next(iter(found)))}{more} has no place in {weights.source}")
    metadata = {**weights.metadata, "lora": os.path.basename(source), "lora_alpha": str(alpha)}
    return replace(weights, tensors=merged, key="", metadata=metadata)


def merge_counts(weights: Weights) -> tuple[int, int]:
    """How many matrices of what :func:`merge_lora` returned have a pair added, and how many tensors are replaced."""
    merged = [tensor for _, tensor in weights.items() if isinstance(tensor, _Merged)]
    replaced = sum(tensor.pair is None or isinstance(tensor.base, _Merged) for tensor in merged)
    return sum(tensor.pair is not None for tensor in merged), replaced


def _replaced(name: str, tensor: Tensor, found: dict[str, Tensor], source: str) -> Tensor:
    """The tensor, or what the file has in its place, in the same stored type."""
    if name not in found:
        return tensor
    new = found.pop(name)
    if new.shape != tensor.shape and (is_matrix(name) or count(new.shape) != count(tensor.shape)):
        raise CheckpointError(f"{source}: tensor {name} has shape {new.shape}, but the checkpoint's has {tensor.shape}")
    return _merged(name, tensor.stored, reshaped(new, tensor.shape), None, 0.0)


def _with_lora(name: str, tensor: Tensor, found: dict[str, Tensor], alpha: float, source: str) -> Tensor:
    """The tensor with the product of its pair added, where the file has one."""
    stem = name[: -len(".weight")] if name.endswith(".weight") else name
    for suffix in (".weight", ""):
        a_name, b_name = f"{stem}.lora_A{suffix}", f"{stem}.lora_B{suffix}"
        if a_name not in found and b_name not in found:
            continue
        for one, other in ((a_name, b_name), (b_name, a_name)):
            if one not in found:
                raise CheckpointError(f"{source}: tensor {other} is there, but {one} is not")
        a, b = found.pop(a_name), found.pop(b_name)
        fits = len(a.shape) == len(b.shape) == len(tensor.shape) == 2
        if not fits or (b.shape[0], a.shape[1]) != tensor.shape or b.shape[1] != a.shape[0] or not a.shape[0]:
            raise CheckpointError(
                f"{source}: {b_name} {b.shape} times {a_name} {a.shape} is not {name} {tensor.shape} of the checkpoint"
            )
        return _merged(name, tensor.stored, tensor, (b, a), alpha / a.shape[0])
    return tensor


@dataclass(frozen=True)
class _Merged(Tensor):
    """``base + scale * B A`` in the type ``stored``, made as it is read; the pair is ``B (N, r)`` and ``A (r, K)``."""

    name: str
    base: Tensor
    pair: tuple[Tensor, Tensor] | None
    scale: float

    def rows(self, index: Any, dtype: Any = np.float32) -> np.ndarray:
        return Tensor.of(_raw(self, index), self.stored).rows(..., dtype)


def _merged(name: str, stored: str, base: Tensor, pair: tuple[Tensor, Tensor] | None, scale: float) -> _Merged:
    merged = _Merged(stored, base.shape, lambda: _raw(merged, slice(None)), name, base, pair, scale)
    return merged


def _raw(merged: _Merged, index: Any) -> np.ndarray:
    """``merged[index]`` along the first axis as stored, some rows at a time."""
    chosen = np.arange(merged.shape[0])[index]
    step = max(1, _BLOCK_ELEMENTS // max(1, count(merged.shape[1:])))
    if chosen.ndim == 0 or len(chosen) <= step:
        return _sum(merged, index)
    parts = [_sum(merged, chosen[start : start + step]) for start in range(0, len(chosen), step)]
    release(merged.base)
    return np.concatenate(parts)


def _sum(merged: _Merged, index: Any) -> np.ndarray:
    values = merged.base.rows(index, np.float64)
    if merged.pair is not None:
        b, a = merged.pair
        values = values + merged.scale * (b.rows(index, np.float64) @ a.array(np.float64))
    if merged.stored == "f64":
        return np.asarray(values)
    raw, overflowed = convert(values, "f64", merged.stored)
    if overflowed:
        warnings.warn(NonFiniteWeights(f"the merged {merged.name} is too large for {merged.stored}: Inf"), stacklevel=2)
    return raw
