"""As much msgpack as faster-rwkv's files need: binaries are read as places in the file, not as copies.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

#: Anything sliceable into bytes: a memory map.
Buffer = Any

_DEEPEST = 8

#: First byte -> format of the number that follows.
_FIXED = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"} | (
    {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
)
_SINGLE = {0xC0: None, 0xC2: False, 0xC3: True}
#: First byte -> kind and format of the length that follows.
_SIZED = (
    {0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I")}
    | {0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I")}
    | {0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}
)


class MsgpackError(ValueError):
    """Bytes that are not msgpack, or of a kind that no model file needs."""


@dataclass(frozen=True)
class Span:
    """A binary: where it lies in the buffer."""

    offset: int
    size: int


Value = Union[None, bool, int, float, str, Span, list, dict]  # noqa: UP007 - evaluated at run time, on Python 3.9 too


def parse(buffer: Buffer, at: int, end: int, depth: int = 0) -> tuple[Value, int]:
    """The value at a byte offset, and the offset behind it. Raises :class:`MsgpackError`.

    Map keys must be strings, none twice.
    """
    if depth > _DEEPEST:
        raise MsgpackError(f"msgpack nested too deeply at byte {at}")
    first = _part(buffer, at, 1, end)[0]
    at += 1
    if first in _SINGLE:
        return _SINGLE[first], at
    if first < 0x80 or first >= 0xE0:
        return (first if first < 0x80 else first - 0x100), at
    if first in _FIXED:
        (number,) = struct.unpack(_FIXED[first], _part(buffer, at, struct.calcsize(_FIXED[first]), end))
        return number, at + struct.calcsize(_FIXED[first])
    kind, size, at = _size(buffer, first, at, end)
    if kind == "bin":
        if at + size > end:
            raise MsgpackError(f"msgpack ends inside a binary of {size} bytes at byte {at}")
        return Span(at, size), at + size
    if kind == "str":
        return _part(buffer, at, size, end).decode("utf-8", "backslashreplace"), at + size
    if at + size > end:  # every element takes a byte at least
        raise MsgpackError(f"msgpack ends inside {size} elements at byte {at}")
    return (_array if kind == "array" else _map)(buffer, at, end, size, depth + 1)


def _size(buffer: Buffer, first: int, at: int, end: int) -> tuple[str, int, int]:
    """Kind and length of what begins with the byte ``first``, and the offset of its content."""
    if first <= 0x8F:
        return "map", first & 0x0F, at
    if first <= 0x9F:
        return "array", first & 0x0F, at
    if first <= 0xBF:
        return "str", first & 0x1F, at
    if first not in _SIZED:
        raise MsgpackError(f"byte {first:#04x} at {at - 1} begins nothing that a model file holds")
    kind, layout = _SIZED[first]
    (size,) = struct.unpack(layout, _part(buffer, at, struct.calcsize(layout), end))
    return kind, size, at + struct.calcsize(layout)


def _array(buffer: Buffer, at: int, end: int, size: int, depth: int) -> tuple[Value, int]:
    found = []
    for _ in range(size):
        value, at = parse(buffer, at, end, depth)
        found.append(value)
    return found, at


def _map(buffer: Buffer, at: int, end: int, size: int, depth: int) -> tuple[Value, int]:
    found: dict[str, Value] = {}
    for _ in range(size):
        start = at
        key, at = parse(buffer, at, end, depth)
        if not isinstance(key, str) or key in found:
            raise MsgpackError(f"msgpack key at byte {start} is no string or appears twice")
        found[key], at = parse(buffer, at, end, depth)
    return found, at


def _part(buffer: Buffer, at: int, size: int, end: int) -> bytes:
    part = bytes(buffer[at : min(at + size, end)])
    if len(part) < size:
        raise MsgpackError(f"msgpack ends at byte {at + len(part)}, in the middle of a value")
    return part


def pack(value: Any) -> bytes:
    """A non-negative integer, a string, or a sequence of these."""
    if isinstance(value, str):
        text = value.encode()
        return _head(len(text), 0xA0, 32, (None, 0xDA, 0xDB) if len(text) > 255 else (0xD9, 0xDA, 0xDB)) + text
    if isinstance(value, int):
        return _head(value, 0x00, 128, (0xCC, 0xCD, 0xCE))
    return array_head(len(value)) + b"".join(pack(item) for item in value)


def map_head(n: int) -> bytes:
    """What comes before ``n`` pairs of key and value."""
    return _head(n, 0x80, 16, (None, 0xDE, 0xDF))


def array_head(n: int) -> bytes:
    """What comes before ``n`` elements."""
    return _head(n, 0x90, 16, (None, 0xDC, 0xDD))


def bin_head(n_bytes: int) -> bytes:
    """What comes before ``n_bytes`` bytes of a binary."""
    return _head(n_bytes, 0, 0, (0xC4, 0xC5, 0xC6))


def _head(n: int, fixed: int, limit: int, sized: Sequence[int | None]) -> bytes:
    """The shortest form: in the first byte below ``limit``, else in 1, 2 or 4 bytes after one of ``sized``."""
    if n < limit:
        return bytes([fixed | n])
    for code, layout, bits in zip(sized, (">B", ">H", ">I"), (8, 16, 32)):
        if code is not None and n < 1 << bits:
            return bytes([code]) + struct.pack(layout, n)
    raise MsgpackError(f"msgpack has no form for the length or number {n}")
