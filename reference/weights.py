"""Weights as stored: named tensors in their own type, upcast only when and as far as they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reference.config import Config, tensor_shapes

#: Stored type -> numpy type of the raw array. numpy has no bfloat16, so its bits travel as uint16.
STORED_TYPES: dict[str, Any] = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32, exactly."""
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16)).astype(np.uint16)


@dataclass(frozen=True)
class Tensor:
    """One stored tensor. ``read()`` gives the raw array: a memory map, an array, or made on demand."""

    stored: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def rows(self, index: Any, dtype: Any = np.float32) -> np.ndarray:
        """``tensor[index]`` along the first axis, upcast to ``dtype``; no copy where none is needed."""
        raw = self.read()[index]
        if self.stored == "bf16":
            raw = bf16_to_f32(raw)
        return np.asarray(raw.astype(dtype, copy=False))

    def array(self, dtype: Any = np.float32) -> np.ndarray:
        """The whole tensor in ``dtype``."""
        return self.rows(slice(None), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(np.dtype(STORED_TYPES[self.stored]).itemsize)

    @staticmethod
    def of(array: np.ndarray, stored: str | None = None) -> Tensor:
        """A tensor around an array in memory; uint16 arrays are bfloat16 bits."""
        names = {np.dtype(t): name for name, t in STORED_TYPES.items()}
        return Tensor(stored or names[array.dtype], tuple(array.shape), lambda: array)


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """An RWKV-4 checkpoint: configuration and tensors by canonical name (:func:`tensor_shapes`).

    source     where it came from, for messages
    synthetic  random weights of a real shape, never to be mistaken for a trained model
    non_finite names of tensors that hold NaN or Inf
    metadata   what the file says of itself, such as where it was trained
    key        hash of the content, where somebody has taken it; names what is converted from these weights
    """

    config: Config
    tensors: Mapping[str, Tensor]
    source: str = "memory"
    synthetic: bool = False
    non_finite: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    key: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __hash__(self) -> int:
        return id(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Weights:
        """The same model with every tensor passed through ``change(name, tensor)``."""
        return replace(self, tensors={name: change(name, tensor) for name, tensor in self.tensors.items()}, key="")

    def in_memory(self, dtype: Any = np.float32) -> Weights:
        """The same model with every tensor upcast to ``dtype`` and held in memory."""
        return self.map(lambda name, tensor: Tensor.of(np.ascontiguousarray(tensor.array(dtype))))

    @staticmethod
    def of(config: Config, arrays: Mapping[str, np.ndarray], source: str = "memory") -> Weights:
        """Weights from arrays in memory, in canonical shapes."""
        shapes = tensor_shapes(config)
        return Weights(config, {n: Tensor.of(np.asarray(arrays[n]).reshape(shapes[n])) for n in shapes}, source)


def find_non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf, reading each once as stored.

    A float is non-finite exactly when its exponent bits are all ones, so nothing is upcast.
    """
    exponent = {"f64": (np.uint64, 0x7FF << 52), "f32": (np.uint32, 0xFF << 23), "f16": (np.uint16, 0x1F << 10)}
    found = []
    for name, tensor in tensors.items():
        kind, mask = exponent.get(tensor.stored, (np.uint16, 0xFF << 7))
        raw = tensor.read().reshape(-1).view(kind)
        block = 1 << 22
        if any(bool(np.any((raw[a : a + block] & kind(mask)) == kind(mask))) for a in range(0, raw.size, block)):
            found.append(name)
    return found
