"""A matrix that a file holds packed in blocks, dequantized as far as it is read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.codecs_ggml import GgmlBlocks
from reference.weights import Tensor

#: Dequantize at most this many weights at a time, which bounds the memory of what lies between.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class PackedRows:
    """``Tensor.read`` of a packed matrix ``shape`` at ``offset`` of a mapped file: float32, made at every call."""

    map: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    packing: GgmlBlocks

    def __call__(self) -> np.ndarray:
        values = self.rows(slice(None))
        self.release()
        return values

    def rows(self, index: Any) -> np.ndarray:
        """``matrix[index]`` along the first axis, float32; only these rows are looked at."""
        chosen = self.packed()[index]
        step = self._step()
        if chosen.ndim == 1 or chosen.shape[0] <= step:
            return self.packing.dequantize(chosen)
        values = np.empty((chosen.shape[0], self.shape[-1]), dtype=np.float32)
        for start in range(0, chosen.shape[0], step):
            values[start : start + step] = self.packing.dequantize(chosen[start : start + step])
        return values

    def packed(self) -> np.ndarray:
        """The bytes as they lie in the file, a view ``(rows, bytes of a row)``."""
        shape = (self.shape[0], self.packing.packed_bytes(self.shape[1:]))
        return np.ndarray(shape, np.uint8, self.map, self.offset)

    def blocks(self) -> Iterator[memoryview]:
        """The bytes as they lie in the file, a few MiB at a time."""
        packed, step = self.packed(), self._step()
        for start in range(0, packed.shape[0], step):
            yield packed[start : start + step].data
        self.release()

    def release(self) -> None:
        """Give the pages back to the system's cache, so that reading a whole model once stays small."""
        dont_need = getattr(mmap, "MADV_DONTNEED", None)
        if dont_need is not None:
            start = self.offset - self.offset % mmap.PAGESIZE
            self.map.madvise(dont_need, start, self.offset - start + self.packing.packed_bytes(self.shape))

    def _step(self) -> int:
        return max(1, _BLOCK_ELEMENTS // self.shape[-1])


@dataclass(frozen=True)
class PackedTensor(Tensor):
    """A matrix that a file holds packed; ``stored`` is the type of its values, f32."""

    read: PackedRows

    def rows(self, index: Any, dtype: Any = np.float32) -> np.ndarray:
        return np.asarray(self.read.rows(index).astype(dtype, copy=False))

    @staticmethod
    def at(map: mmap.mmap, offset: int, shape: tuple[int, ...], packing: GgmlBlocks) -> PackedTensor:
        """The matrix at a byte offset. The caller has checked the bounds, and that blocks divide a row."""
        return PackedTensor("f32", shape, PackedRows(map, offset, shape, packing))
