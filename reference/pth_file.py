"""``.pth`` and ``pytorch_model.bin``: the zip archive that ``torch.save`` writes since torch 1.6.

A zip of uncompressed members under one folder: ``data.pkl`` names the tensors, ``data/<key>`` holds
the bytes of each storage. Layout: torch/csrc/jit/serialization and torch/serialization.py.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import numpy as np

from reference.errors import CheckpointError
from reference.pth_pickle import PickleError, TorchTensor, dumps, loads
from reference.tensor_file import MappedFile, TensorFile, count, parse_object, quoted
from reference.tensor_stream import Encoder
from reference.weights import STORED_TYPES, Tensor

#: A state dict of RWKV-4 14B pickles to 150 kB; parsing anything much larger would only take memory.
MAX_PICKLE = 16 << 20

#: torch starts every member's data at a multiple of this; so do we.
_ALIGNMENT = 64
_METADATA = "rwkv_bench.json"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")

#: What training scripts wrap a state dict in.
_WRAPPERS = ("model", "state_dict", "module")

Span = tuple[int, int]


def recognise(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a zip archive."""
    return head.startswith(b"PK\x03\x04")


def read(file: MappedFile) -> TensorFile:
    """Names, shapes and lazily mapped data of every tensor; strided views stay views.

    Raises :class:`CheckpointError` for a damaged archive, a pickle that holds anything but tensors, and
    types other than float64, 32, 16 and bfloat16.
    """
    members = _members(file)
    root = _root(members, file.path)
    if members.get(root + "byteorder") and _content(file, members[root + "byteorder"]) != b"little":
        raise CheckpointError(f"{file.path}: written on a big-endian machine; save it again on a little-endian one")
    pickle = members[root + "data.pkl"]
    if pickle[1] > MAX_PICKLE:
        raise CheckpointError(f"{file.path}: its data.pkl has {pickle[1]} bytes; no RWKV-4 checkpoint needs as many")
    try:
        found = _state_dict(loads(_content(file, pickle)), file.path)
    except PickleError as error:
        raise CheckpointError(f"{file.path}: its data.pkl {error}") from None
    tensors = {name: _tensor(file, members, root, name, value) for name, value in found.items()}
    metadata = _metadata(file, members.get(root + _METADATA))
    return TensorFile(tensors, metadata)


def _members(file: MappedFile) -> dict[str, Span]:
    """Name -> (offset, size) of the data of every archive member."""
    try:
        with zipfile.ZipFile(cast(Any, file.map)) as archive:  # read, seek and tell are all it uses
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error, OSError) as error:
        reason = quoted(str(error))
        raise CheckpointError(
            f"{file.path}: a .pth archive that is truncated or damaged ({reason}); download or copy it again"
        ) from None
    members: dict[str, Span] = {}
    for entry in entries:
        if entry.filename in members:
            raise CheckpointError(f"{file.path}: archive member {quoted(entry.filename)} appears twice; damaged")
        members[entry.filename] = _span(file, entry)
    return members


def _span(file: MappedFile, entry: zipfile.ZipInfo) -> Span:
    where = f"{file.path}: archive member {quoted(entry.filename)}"
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{where} is compressed or encrypted; torch.save writes neither")
    header = file.part(max(entry.header_offset, 0), _LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{where} is not where the archive says; damaged")
    *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if start + entry.file_size > file.size:
        raise CheckpointError(f"{where} lies beyond the end of the file; truncated or damaged")
    return start, entry.file_size


def _root(members: Mapping[str, Span], path: str) -> str:
    roots = [name[: -len("data.pkl")] for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one of torch.save: it has {len(roots)} data.pkl")
    return roots[0]


def _content(file: MappedFile, span: Span) -> bytes:
    return file.part(*span)


def _state_dict(found: Any, path: str) -> dict[str, TorchTensor]:
    """The mapping of names to tensors, unwrapped where a training script nested it."""
    for key in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}; a dict of tensors by name is expected")
    if "_strategy" in found:
        raise CheckpointError(f"{path}: already converted by the rwkv package for one strategy; give the original .pth")
    for name, value in found.items():
        if not isinstance(value, TorchTensor):
            raise CheckpointError(f"{path}: entry {quoted(name)} is a {type(value).__name__}; a tensor is expected")
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: a tensor is called {name}; a string is expected")
    return found


def _tensor(file: MappedFile, members: Mapping[str, Span], root: str, name: str, view: TorchTensor) -> Tensor:
    where, storage = f"{file.path}: tensor {quoted(name)}", view.storage
    if storage.stored not in STORED_TYPES:
        expected = "float32, float16, bfloat16 or float64"
        raise CheckpointError(f"{where} is stored as {storage.stored}; {expected} is expected")
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise CheckpointError(f"{where} has no data in the archive (member data/{quoted(storage.key)}); damaged")
    start, available = member
    item = np.dtype(STORED_TYPES[storage.stored]).itemsize
    if storage.numel * item > available:
        raise CheckpointError(f"{where} needs {storage.numel * item} bytes and the archive has {available}; damaged")
    numel = count(view.shape)
    last = view.offset + sum(map(lambda n, stride: (n - 1) * stride, view.shape, view.strides))
    # An expanded view (stride 0) can claim any size at no cost, so none is taken.
    if numel > storage.numel or (numel and last >= storage.numel):
        raise CheckpointError(f"{where} of shape {view.shape} reaches outside its {storage.numel} stored elements")
    strides = None if _contiguous(view) else tuple(stride * item for stride in view.strides)
    return file.tensor(storage.stored, view.shape, start + (view.offset * item if numel else 0), strides)


def _contiguous(view: TorchTensor) -> bool:
    expected = 1
    for axis in reversed(range(len(view.shape))):
        if view.shape[axis] != 1 and view.strides[axis] != expected:
            return False
        expected *= view.shape[axis]
    return True


def _metadata(file: MappedFile, span: Span | None) -> dict[str, str]:
    if span is None:
        return {}
    if span[1] > MAX_PICKLE:
        raise CheckpointError(f"{file.path}: its {_METADATA} has {span[1]} bytes; damaged")
    found = parse_object(_content(file, span), f"{file.path}: its {_METADATA}")
    if not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{file.path}: its {_METADATA} is not a map of strings")
    return found


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], encoder: Encoder) -> None:
    """Write what ``torch.load(..., weights_only=True)`` reads, mapped or not, one tensor after another."""
    index = dumps((name, encoder.stored(tensor), tensor.shape) for name, tensor in tensors.items())
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, file, "data.pkl", [index], len(index))
        _write_member(archive, file, "byteorder", [b"little"], 6)
        for i, (name, tensor) in enumerate(tensors.items()):
            n_bytes = count(tensor.shape) * np.dtype(STORED_TYPES[encoder.stored(tensor)]).itemsize
            _write_member(archive, file, f"data/{i}", encoder.blocks(name, tensor), n_bytes)
        _write_member(archive, file, "version", [b"3\n"], 2)
        if metadata:
            text = json.dumps(dict(metadata)).encode()
            _write_member(archive, file, _METADATA, [text], len(text))


def _write_member(archive: zipfile.ZipFile, file: BinaryIO, name: str, blocks: Any, n_bytes: int) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")  # its fixed date keeps files of equal content equal
    # zipfile writes sizes of 4 bytes unless told otherwise, and 20 bytes of extra field if told.
    wide = n_bytes > zipfile.ZIP64_LIMIT // 2
    before_data = file.tell() + _LOCAL_HEADER.size + len(entry.filename) + (20 if wide else 0) + 4
    padding = -before_data % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # torch's own padding field
    with archive.open(entry, "w", force_zip64=wide) as member:
        for block in blocks:
            member.write(block)
