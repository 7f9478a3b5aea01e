"""The embedding of a faster-rwkv file: ``ln0`` is applied beforehand, and the original is gone.

Writing computes ``e = LayerNorm(emb) * w + b`` for every token. Reading finds an embedding, a ``w`` and a
``b`` that give the same ``e`` again. What a LayerNorm can give is the hyperplane ``sum_i (e_i - b_i) / w_i = 0``,
so its normal ``n = 1 / w`` is the one direction in which all ``e`` have the same coordinate: the
eigenvector to the smallest eigenvalue of their correlation matrix. With ``b`` the mean of ``e`` and

    z = (e - b) n,    w = g / n,    emb = z sqrt(eps / (g^2 - var z)),    g^2 = 2 max var z

the LayerNorm of ``emb`` is ``z / g``, since its eps of 1e-5 leaves any variance below 1 possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from reference.errors import CheckpointError
from reference.forward import LN_EPS
from reference.tensor_file import release
from reference.weights import Tensor

EMB, LN0_WEIGHT, LN0_BIAS = "emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"

_BLOCK = 1 << 20  # elements at a time, in float64

#: Tokens per channel that the hyperplane is found from.
_SAMPLE = 4

#: How far from the hyperplane tokens may be, as a part of how far apart they are: float16 rounding is 1e-3.
_OFF = 0.02


def folded(emb: Tensor, weight: Tensor, bias: Tensor) -> Iterator[np.ndarray]:
    """``LayerNorm(emb) * weight + bias`` in float64, some rows at a time: ``(n, n_embd)``."""
    w, b, matrix = weight.array(np.float64), bias.array(np.float64), Tensor.of(emb.read(), emb.stored)
    step = max(1, _BLOCK // emb.shape[1])
    for start in range(0, emb.shape[0], step):
        x = matrix.rows(slice(start, start + step), np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            x = x - x.mean(axis=1, keepdims=True)
            yield x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + LN_EPS) * w + b


def unfolded(path: str, normalised: Tensor) -> dict[str, Tensor]:
    """Embedding, weight and bias of ln0, float32, whose product is the ``normalised`` embedding; found when read."""
    solved = _Unfolding(path, normalised)
    width = (normalised.shape[1],)
    return {
        EMB: _Embedding("f32", normalised.shape, solved.whole, solved),
        LN0_WEIGHT: Tensor("f32", width, lambda: solved.plane.weight),
        LN0_BIAS: Tensor("f32", width, lambda: solved.plane.bias),
    }


@dataclass(frozen=True)
class _Plane:
    """``normal`` is 0 for a channel that is the same for all tokens."""

    mean: np.ndarray
    normal: np.ndarray
    gain: float

    @property
    def weight(self) -> np.ndarray:
        n = self.normal
        return np.asarray(np.divide(self.gain, n, out=np.zeros_like(n), where=n != 0), dtype=np.float32)

    @property
    def bias(self) -> np.ndarray:
        return self.mean.astype(np.float32)


class _Unfolding:
    """The normalised embedding of the file ``path``, and what is found of it once."""

    def __init__(self, path: str, normalised: Tensor) -> None:
        self.path = path
        self.normalised = normalised

    @cached_property
    def plane(self) -> _Plane:
        n = sum(len(e) for e in self._sample())
        if not n:
            raise CheckpointError(f"{self.path}: its embedding has no token without NaN or Inf; damaged")
        mean = sum(e.sum(axis=0) for e in self._sample()) / n
        spread = np.sqrt(sum(np.square(e - mean).sum(axis=0) for e in self._sample()) / n)
        alive = spread > 0
        inverse = np.divide(1.0, spread, out=np.zeros_like(spread), where=alive)
        scaled = ((e - mean) * inverse for e in self._sample())
        normal = _flattest(sum(x.T @ x for x in scaled) / n, alive) * inverse
        if alive.all():  # else a constant channel takes up what is left
            off = size = 0.0
            for e in self._sample():
                z = (e - mean) * normal
                off, size = off + np.square(z.sum(axis=1)).sum(), size + np.square(z).sum()
            if not off <= _OFF**2 * size:
                raise CheckpointError(f"{self.path}: its embedding is not the output of a LayerNorm; damaged")
        return _Plane(mean, normal, self._gain(mean, normal))

    def _sample(self) -> Iterator[np.ndarray]:
        """Finite rows from all over the embedding, float64, some at a time."""
        n_tokens, width = self.normalised.shape
        chosen = np.arange(0, n_tokens, max(1, n_tokens // (_SAMPLE * width)))
        step = max(1, _BLOCK // width)
        for start in range(0, len(chosen), step):
            e = self.normalised.rows(chosen[start : start + step], np.float64)
            yield e[np.isfinite(e).all(axis=1)]

    def _gain(self, mean: np.ndarray, normal: np.ndarray) -> float:
        largest = 0.0
        for rows in self._blocks():
            variance = _centred(self.normalised.rows(rows, np.float64), mean, normal).var(axis=1)
            largest = max(largest, float(variance[np.isfinite(variance)].max(initial=0)))
        return math.sqrt(2 * largest) or 1.0

    def rows(self, index: Any) -> np.ndarray:
        """Rows of the embedding, float32."""
        plane = self.plane
        z = _centred(self.normalised.rows(index, np.float64), plane.mean, plane.normal)
        with np.errstate(invalid="ignore"):
            scale = np.sqrt(LN_EPS / (plane.gain**2 - z.var(axis=-1, keepdims=True)))
            return np.asarray(z * scale, dtype=np.float32)

    def whole(self) -> np.ndarray:
        out = np.empty(self.normalised.shape, dtype=np.float32)
        for rows in self._blocks():
            out[rows] = self.rows(rows)
        release(self.normalised)
        return out

    def _blocks(self) -> Iterator[slice]:
        n_tokens, width = self.normalised.shape
        step = max(1, _BLOCK // width)
        return (slice(start, start + step) for start in range(0, n_tokens, step))


@dataclass(frozen=True)
class _Embedding(Tensor):
    """Rows made as they are read."""

    solved: _Unfolding

    def rows(self, index: Any, dtype: Any = np.float32) -> np.ndarray:
        return np.asarray(self.solved.rows(index).astype(dtype, copy=False))


def _centred(e: np.ndarray, mean: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """``z = (e - mean) normal``, of mean zero over the channels."""
    with np.errstate(invalid="ignore"):
        z = (e - mean) * normal
        constant = normal == 0
        if constant.any():
            z[..., constant] = -z.sum(axis=-1, keepdims=True) / constant.sum()
    return np.asarray(z)


def _flattest(correlation: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The unit eigenvector of the smallest eigenvalue, by inverse iteration; no entry of it is 0."""
    # Below the rounding of float32, so it decides nothing but keeps a plane of few tokens solvable.
    inverse = np.linalg.inv(correlation + np.diag(np.where(alive, 1e-10, 1.0)))
    v = 1 + 0.5 * np.cos(np.arange(len(correlation)))  # any start will do that is orthogonal to nothing likely
    for _ in range(8):
        v = inverse @ v
        v /= np.linalg.norm(v)
    return np.where(v == 0, np.finfo(np.float64).tiny ** 0.25, v)
