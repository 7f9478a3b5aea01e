"""Tensors on MLX's device: vectors, embeddings and matrix products, quantized or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from backends.mlx_rwkv.schemes import Kept
from reference.codecs_mlx import MlxGroups
from reference.numerics import row_blocks
from reference.schemes import apply
from reference.weights import Weights

Array = Any
#: ``(T, K)`` -> ``(T, N)``, or ids ``(T,)`` -> ``(T, C)``.
Product = Callable[[Array], Array]

_TYPES = {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}


class Placing:
    """Puts the tensors of a checkpoint on the current stream's device, one at a time."""

    def __init__(self, checkpoint: Weights, kept: Kept, device: str) -> None:
        self._raw = checkpoint
        self._floats = apply(checkpoint, kept.floats)
        self._groups = kept.groups
        self.dtype = _TYPES[kept.arithmetic(device).activations]

    def vector(self, name: str) -> Array:
        """A vector in the compute type."""
        return self._placed(self._floats[name].array(np.float32), self.dtype)

    def float32(self, name: str) -> Array:
        """A vector as stored, in float32."""
        return self._placed(self._floats[name].array(np.float32), mx.float32)

    def mixes(self, at: str, names: str) -> Array:
        """Token-shift weights, stacked: ``(len(names), 1, C)``."""
        rows = [self._floats[f"{at}time_mix_{name}"].array(np.float32) for name in names]
        return self._placed(np.stack(rows)[:, None], self.dtype)

    def embedding(self, name: str) -> Product:
        """Ids to rows of a matrix."""
        if self._groups is None:
            table = self._matrix(name)
            return lambda ids: mx.take(table, ids, axis=0)
        groups, (codes, scales, biases) = self._groups, self._quantized(name)

        def look_up(ids: Array) -> Array:
            rows = (mx.take(part, ids, axis=0) for part in (codes, scales, biases))
            return mx.dequantize(*rows, group_size=groups.group, bits=groups.bits)

        return look_up

    def linear(self, name: str) -> Product:
        """``x`` times a matrix ``(N, K)`` transposed."""
        if self._groups is None:
            weight = self._matrix(name).T
            return lambda x: x @ weight
        groups, packed = self._groups, self._quantized(name)
        return lambda x: mx.quantized_matmul(x, *packed, transpose=True, group_size=groups.group, bits=groups.bits)

    def _matrix(self, name: str) -> Array:
        tensor = self._floats[name]
        parts = [self._placed(tensor.rows(rows, np.float32), self.dtype) for rows in row_blocks(tensor)]
        return parts[0] if len(parts) == 1 else _evaluated(mx.concatenate(parts))

    def _quantized(self, name: str) -> tuple[Array, Array, Array]:
        """Codes, and scales and biases in the compute type; fp16 ones are the same in float32."""
        assert self._groups is not None
        tensor = self._floats[name]
        parts = [quantized(tensor.rows(rows, np.float32), self._groups) for rows in row_blocks(tensor)]
        codes, scales, biases = (mx.concatenate(part) for part in zip(*parts, strict=True))
        mx.eval(codes, scales := scales.astype(self.dtype), biases := biases.astype(self.dtype))
        return codes, scales, biases

    @staticmethod
    def _placed(values: np.ndarray, dtype: Any) -> Array:
        return _evaluated(mx.array(np.ascontiguousarray(values)).astype(dtype))


def quantized(w: np.ndarray, groups: MlxGroups) -> tuple[Array, Array, Array]:
    """A matrix as ``mx.quantize`` packs it, on the CPU, where its bits are known; NaN and Inf spoil their group."""
    blocks = w.reshape(w.shape[0], -1, groups.group)
    good = np.isfinite(blocks).all(axis=-1)
    with mx.stream(mx.cpu):
        half = mx.array(np.where(good[..., None], blocks, 0).reshape(w.shape)).astype(mx.float16)
        codes, scales, biases = mx.quantize(half, group_size=groups.group, bits=groups.bits)
        scales = mx.where(mx.array(good), scales, mx.array(float("nan"), dtype=mx.float16))
        mx.eval(codes, scales, biases)
    return codes, scales, biases


def _evaluated(array: Array) -> Array:
    mx.eval(array)
    return array
