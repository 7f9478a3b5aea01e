"""What the checkpoint formats share: a file mapped into memory, and what it holds."""

from __future__ import annotations

import difflib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reference.errors import CheckpointError
from reference.weights import STORED_TYPES, Tensor


@dataclass(frozen=True)
class TensorFile:
    """Tensors of one file under the names and shapes it gives them, and its free-form metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


class MappedFile:
    """A regular file mapped read-only; nothing is read before it is looked at.

    Raises :class:`CheckpointError` for a path that does not exist, may not be read, is empty, or is
    not a regular file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            mode = os.stat(path).st_mode
            # Opening a FIFO would wait for its writer, so the kind is looked at first.
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
                raise CheckpointError(f"{path}: this is {kind}; a checkpoint file is expected")
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise CheckpointError(f"{path}: the file is empty; download or copy it again")
                self.map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, OverflowError) as error:
            raise unreadable(path, error) from None
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path!a}: not a usable path ({error})") from None

    def part(self, offset: int, n_bytes: int) -> bytes:
        """Up to ``n_bytes`` bytes from ``offset``; fewer where the file ends."""
        return self.map[offset : offset + n_bytes]

    def tensor(
        self, stored: str, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """A tensor at a byte offset; ``strides`` in bytes, row-major if left out. The caller has checked the bounds."""
        return Tensor(stored, shape, MappedArray(self.map, stored, shape, offset, strides))


@dataclass(frozen=True)
class MappedArray:
    """``Tensor.read`` of a mapped file: calling it gives a read-only view, no bytes are copied."""

    map: mmap.mmap
    stored: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    def __call__(self) -> np.ndarray:
        return np.ndarray(self.shape, STORED_TYPES[self.stored], self.map, self.offset, self.strides)

    def release(self) -> None:
        """Give the pages back to the system's cache, so that reading a whole model once stays small."""
        dont_need = getattr(mmap, "MADV_DONTNEED", None)
        n_bytes = int(np.prod(self.shape, dtype=np.int64)) * np.dtype(STORED_TYPES[self.stored]).itemsize
        # A gappy view spans more than its own bytes; what is missed here is merely released later.
        if dont_need is not None and n_bytes:
            start = self.offset - self.offset % mmap.PAGESIZE
            self.map.madvise(dont_need, start, self.offset + n_bytes - start)


def release(tensor: Tensor) -> None:
    """Forget the pages that reading a memory-mapped tensor brought in; other tensors are left alone."""
    if isinstance(tensor.read, MappedArray):
        tensor.read.release()


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same tensor in another shape of as many elements, still lazy."""
    read = tensor.read
    if isinstance(read, MappedArray) and read.strides is None:
        return replace(tensor, shape=shape, read=replace(read, shape=shape))
    return replace(tensor, shape=shape, read=lambda: read().reshape(shape))


def unreadable(path: str, error: Exception) -> CheckpointError:
    """The one-line error for a path that could not be opened, with a near name where one exists."""
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path}: permission denied; check who may read it")
    if isinstance(error, FileNotFoundError):
        folder, name = os.path.split(os.path.abspath(path))
        if not os.path.isdir(folder):
            return CheckpointError(f"{path}: does not exist, nor does its folder {folder}")
        return CheckpointError(f"{path}: does not exist{_did_you_mean(name, folder)}")
    return CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _did_you_mean(name: str, folder: str) -> str:
    try:
        near = difflib.get_close_matches(name, os.listdir(folder), n=1)
    except OSError:
        return ""
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else f" in {folder}"


def quoted(name: object) -> str:
    """A name taken from a file, made fit for a one-line message."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; ``what`` names it in the :class:`CheckpointError` raised otherwise."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({quoted(str(error))})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {quoted(key)} appears twice")
        found[key] = value
    return found


def is_sizes(value: object) -> bool:
    """Whether a value read from a file is a list or tuple of integers >= 0, as shapes and offsets are."""
    return isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value)


def count(shape: Iterable[int]) -> int:
    """Number of elements of a shape, in Python integers, which a hostile shape cannot overflow."""
    total = 1
    for n in shape:
        total *= n
    return total
