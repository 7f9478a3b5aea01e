"""``.safetensors``: an 8-byte header length, a JSON header, and raw little-endian tensors.

Format: https://huggingface.co/docs/safetensors. The header is parsed here because the library's
numpy side has no bfloat16; every offset is checked against the file before anything is mapped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from reference.errors import CheckpointError
from reference.tensor_file import MappedFile, TensorFile, count, is_sizes, parse_object, quoted
from reference.tensor_stream import Encoder
from reference.weights import Tensor

#: The safetensors library's own limit; RWKV-4 14B needs 60 kB.
MAX_HEADER = 100_000_000

_FROM_FILE = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_TO_FILE = {stored: name for name, stored in _FROM_FILE.items()}
_ITEM_SIZE = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}
_LONG_NAME = {"I": "int", "U": "uint", "F": "float", "B": "bool"}


def recognise(head: bytes) -> bool:
    """Whether the first 16 bytes of a file look like safetensors."""
    return len(head) > 8 and head[8:9] == b"{"


def read(file: MappedFile) -> TensorFile:
    """Names, shapes and lazily mapped data of every tensor.

    Raises :class:`CheckpointError` for a header that is malformed, a type other than float64, 32, 16
    and bfloat16, and data that do not fill the rest of the file exactly.
    """
    header, start = _header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file.path}: the safetensors header's __metadata__ is not a map of strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        stored, shape, (begin, end) = _entry(entry, f"{file.path}: tensor {quoted(name)}")
        tensors[name] = file.tensor(stored, shape, start + begin)
        spans.append((begin, end))
    _check_spans(spans, file.size - start, file.path)
    return TensorFile(tensors, metadata)


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", file.part(0, 8))
    if length > MAX_HEADER:
        raise CheckpointError(f"{file.path}: looks like safetensors, but announces a header of {length} bytes; damaged")
    if 8 + length > file.size:
        raise CheckpointError(f"{file.path}: truncated inside its safetensors header; download or copy it again")
    return parse_object(file.part(8, length), f"{file.path}: the safetensors header"), 8 + length


def _entry(entry: object, where: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} has a malformed safetensors entry")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not (isinstance(dtype, str) and is_sizes(shape) and is_sizes(span) and len(span) == 2):
        raise CheckpointError(f"{where} has a malformed safetensors entry")
    if dtype not in _FROM_FILE:
        name = _LONG_NAME.get(dtype[:1], dtype[:1]) + dtype[1:].lower()
        raise CheckpointError(f"{where} is stored as {quoted(name)}; float32, float16, bfloat16 or float64 is expected")
    stored = _FROM_FILE[dtype]
    if span[1] - span[0] != count(shape) * _ITEM_SIZE[stored]:
        raise CheckpointError(f"{where} has {span[1] - span[0]} bytes, which is not {dtype} of shape {tuple(shape)}")
    return stored, tuple(shape), (span[0], span[1])


def _check_spans(spans: list[tuple[int, int]], available: int, path: str) -> None:
    """The format demands that tensors lie end to end and fill the file, so a truncated one is always seen."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{path}: the safetensors offsets leave a gap or overlap at byte {at}; damaged")
        at = end
    if at > available:
        raise CheckpointError(
            f"{path}: truncated: its tensors need {at} bytes and {available} are there; download or copy it again"
        )
    if at < available:
        raise CheckpointError(f"{path}: {available - at} bytes follow the last tensor; damaged")


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], encoder: Encoder) -> None:
    """Write tensors under the names and shapes given, one after another."""
    # Widest types first, as the library does: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: -_ITEM_SIZE[encoder.stored(tensors[name])])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        stored, shape = encoder.stored(tensors[name]), tensors[name].shape
        end = at + count(shape) * _ITEM_SIZE[stored]
        header[name] = {"dtype": _TO_FILE[stored], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        for block in encoder.blocks(name, tensors[name]):
            file.write(block)
