"""Frames: a JSON header and the raw bytes of arrays, over a pair of file descriptors; no pickle.

    magic 4 bytes | length of the header, u32 little-endian | header | arrays, one after the other

The header's ``arrays`` lists ``[dtype, shape]`` of what follows. Both ends of a channel use this file.
Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.

    FrameError     what arrived is no frame
    ChannelClosed  the other end is gone
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MAGIC = b"\x93RB1"

#: Said once by the far side before its first frame. A login shell may have printed something before it.
GREETING = b"\n\x93rwkv-bench frames 1\n"

_MOST_HEADER_BYTES = 1 << 26
_MOST_NOISE_BYTES = 1 << 20
_MOST_ARRAY_BYTES = 1 << 40
_PIECE = 1 << 20

#: Array types that travel; others are described, not sent.
DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint64", "uint32", "uint16", "uint8", "int8", "bool")

#: Called before every read or write of a descriptor: returns when it may be tried, or raises.
Wait = Callable[[int, bool], None]


class FrameError(Exception):
    """What arrived is no frame; one line."""


class ChannelClosed(Exception):
    """The other end of the channel is gone."""


def _no_wait(file: int, writing: bool) -> None:
    """Blocking descriptors wait by themselves."""


class Channel:
    """Both directions between two processes. ``wait`` is asked before each system call."""

    def __init__(self, read_file: int, write_file: int, wait: Wait = _no_wait) -> None:
        self._read_file, self._write_file, self._wait = read_file, write_file, wait

    def greet(self) -> None:
        """The far side: say that frames follow."""
        self._write(memoryview(GREETING))

    def await_greeting(self) -> None:
        """The near side: skip whatever comes before the greeting."""
        seen = b""
        for _ in range(_MOST_NOISE_BYTES):
            seen = (seen + self._read(1))[-len(GREETING) :]
            if seen == GREETING:
                return
        raise FrameError(f"{_MOST_NOISE_BYTES} bytes of something else came before the first frame")

    def send(self, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send one frame. Raises TypeError, with nothing sent, for what cannot travel."""
        for array in arrays:
            if not sendable(array):
                what = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(f"{what} cannot be sent; arrays of {', '.join(DTYPES)} can")
        solid = [np.ascontiguousarray(array).reshape(array.shape) for array in arrays]
        described = {**header, "arrays": [[str(array.dtype), list(array.shape)] for array in solid]}
        text = json.dumps(described).encode("ascii")
        self._write(memoryview(MAGIC + len(text).to_bytes(4, "little") + text))
        for array in solid:
            if array.size:
                self._write(_bytes_of(array))

    def send_bytes(self, data: bytes) -> None:
        """Send what is no frame: the code, before there is anybody to read frames."""
        self._write(memoryview(data))

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The next frame: its header and its arrays, which are new and writable."""
        start = self._read(8)
        size = int.from_bytes(start[4:], "little")
        if start[:4] != MAGIC or size > _MOST_HEADER_BYTES:
            raise FrameError(f"not a frame, but {start!r}")
        try:
            header = json.loads(self._read(size))
            described = [(np.dtype(_known(name)), tuple(_sizes(shape))) for name, shape in header.pop("arrays")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FrameError(f"a frame whose header cannot be read: {' '.join(str(error).split())[:200]}") from None
        return header, [self._array(dtype, shape) for dtype, shape in described]

    def _array(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = np.empty(shape, dtype)  # of pages that take no memory until they are filled
        except (ValueError, OverflowError, MemoryError) as error:
            raise FrameError(f"an array that cannot be made, {dtype} {shape}: {error}") from None
        if array.size:
            self._fill(_bytes_of(array))
        return array

    def _read(self, count: int) -> bytes:
        """``count`` bytes; memory is taken as they come, since the count may be garbage."""
        read = bytearray()
        while len(read) < count:
            piece = bytearray(min(count - len(read), _PIECE))
            self._fill(memoryview(piece))
            read += piece
        return bytes(read)

    def _fill(self, view: memoryview) -> None:
        while view:
            self._wait(self._read_file, False)
            try:
                count = os.readv(self._read_file, [view[:_PIECE]])
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if count == 0:
                raise ChannelClosed("end of file")
            view = view[count:]

    def _write(self, view: memoryview) -> None:
        while view:
            self._wait(self._write_file, True)
            try:
                view = view[os.write(self._write_file, view[:_PIECE]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelClosed(str(error)) from None


def sendable(value: Any) -> bool:
    """Whether ``value`` is an array that can travel as it is."""
    return isinstance(value, np.ndarray) and str(value.dtype) in DTYPES


def _bytes_of(array: np.ndarray) -> memoryview:
    view: Any = array.reshape(-1).view(np.uint8)
    return memoryview(view)


def _known(dtype: Any) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"array type {dtype!r}")
    return str(dtype)


def _sizes(shape: Any) -> list[int]:
    if not all(isinstance(n, int) and n >= 0 for n in shape) or 8 * math.prod(shape) > _MOST_ARRAY_BYTES:
        raise ValueError(f"array shape {shape!r}")
    return list(shape)
