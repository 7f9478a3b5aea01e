"""Tensors as byte blocks in the type a file stores, a few MiB at a time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from reference.codecs_ggml import GgmlBlocks
from reference.errors import CheckpointError, ConfigError
from reference.packed_tensor import PackedTensor
from reference.tensor_file import count, release
from reference.weights import STORED_TYPES, Tensor, bf16_to_f32, f32_to_bf16

#: Schemes a checkpoint file can be written in, by stored type.
SCHEMES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}

_BLOCK = 1 << 21  # elements; with the temporaries of a conversion, some 50 MiB


def check_scheme(scheme: str | None, names: Sequence[str] | None = None) -> None:
    """Raises :class:`ConfigError` with the list for a scheme that is none of ``names`` (default: SCHEMES)."""
    names = tuple(SCHEMES) if names is None else names
    if scheme is not None and scheme not in names:
        folded = {name.lower(): name for name in names}
        near = difflib.get_close_matches(str(scheme).lower(), folded, n=1)
        hint = f"did you mean {folded[near[0]]!r}? " if near else ""
        raise ConfigError(
            f"no checkpoint scheme {scheme!r}; {hint}choose from {', '.join(names)}, or none to keep the stored type"
        )


@dataclass
class Encoder:
    """Encodes tensors in ``scheme`` (``None``: as they are stored), and remembers which overflowed.

    tell        called with the name of every tensor as its turn comes
    overflowed  tensors whose finite values became Inf in the narrower type
    """

    scheme: str | None = None
    tell: Callable[[str], None] = lambda name: None
    overflowed: list[str] = field(default_factory=list)

    def stored(self, tensor: Tensor) -> str:
        """The stored type that ``tensor`` is written in."""
        return tensor.stored if self.scheme is None else SCHEMES[self.scheme]

    def blocks(self, name: str, tensor: Tensor, target: str | None = None) -> Iterator[memoryview]:
        """The bytes of ``tensor`` in row-major order, in the stored type ``target`` where it is given.

        One whole tensor is resident at most.
        """
        self.tell(name)
        target = target or self.stored(tensor)
        flat = checked(name, tensor).reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            if target != tensor.stored:
                block, overflowed = convert(block, tensor.stored, target)
                if overflowed and name not in self.overflowed:
                    self.overflowed.append(name)
            yield np.ascontiguousarray(block).view(np.uint8).data
        release(tensor)

    def packed(self, name: str, tensor: Tensor, packing: GgmlBlocks) -> Iterator[memoryview]:
        """The bytes of a matrix packed by ``packing``, row after row; copied where it is packed so already."""
        self.tell(name)
        if isinstance(tensor, PackedTensor) and tensor.read.packing is packing:
            yield from tensor.read.blocks()
            return
        matrix = Tensor.of(checked(name, tensor), tensor.stored)
        step = max(1, _BLOCK // 4 // matrix.shape[1])
        for start in range(0, matrix.shape[0], step):
            yield np.ascontiguousarray(packing.quantize(matrix.rows(slice(start, start + step)))).data
        release(tensor)


def checked(name: str, tensor: Tensor) -> np.ndarray:
    """The raw array of a tensor; raises :class:`CheckpointError` where it is not what the tensor says."""
    raw = tensor.read()
    if raw.size != count(tensor.shape) or raw.dtype != STORED_TYPES[tensor.stored]:
        raise CheckpointError(f"tensor {name} holds {raw.dtype} {raw.shape}, not {tensor.stored} {tensor.shape}")
    return raw


def convert(raw: np.ndarray, stored: str, target: str) -> tuple[np.ndarray, bool]:
    """Raw values of one stored type in another, rounded to nearest even, and whether a finite one became Inf.

    float64 goes to bfloat16 by way of float32.
    """
    values = bf16_to_f32(raw) if stored == "bf16" else raw
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if target == "bf16":
            out = f32_to_bf16(values)
            infinite = (out & np.uint16(0x7FFF)) == np.uint16(0x7F80)
        else:
            out = values.astype(STORED_TYPES[target])
            infinite = np.isinf(out)
    return out, bool(infinite.any() and np.isfinite(values[infinite]).any())
