"""``.bin`` of rwkv.cpp: a header of six integers, then one tensor after another, in the machine's byte order.

Format: docs/FILE_FORMAT.md of https://github.com/RWKV/rwkv.cpp, versions 100 and 101. They differ in
the bytes of quantized blocks only, so FP32 and FP16 are written as version 100, which every release reads.

Names are BlinkDL's. Vectors and all ``time_*`` are one-dimensional float32. ``time_decay`` is stored as
``-exp(time_decay)`` in float32, and taken back when it is read. That is exact where |time_decay| > 1:
there float32 is as coarse as the rounding of the exponential. Else it may be off by 2^-24; below -87 the
exponential is subnormal and below -104 zero, which comes back as -Inf. A file that was made from float32
or narrower decays, read and written again, holds the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from reference import codecs_ggml, codecs_ggml_v100
from reference.codecs_ggml import GgmlBlocks
from reference.config import Config, is_matrix
from reference.errors import CheckpointError, ConfigError
from reference.packed_tensor import PackedTensor
from reference.schemes import Packed, get_scheme
from reference.tensor_file import MappedFile, TensorFile, count, quoted
from reference.tensor_stream import Encoder, checked
from reference.weights import Tensor

MAGIC = b"fmgg"  # 0x67676d66, little-endian
VERSIONS = (100, 101)

_HEADER = struct.Struct("<4s5I")
_TENSOR = struct.Struct("<3I")
_LONGEST_NAME = 256

_FLOATS = {0: "f32", 1: "f16"}
_ITEM_SIZE = {"f32": 4, "f16": 2}
_TYPE_NAMES = (
    *("FP32", "FP16", "Q4_0", "Q4_1", "Q4_1_O", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0"),
    *("Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
)

#: Scheme -> its block format, of either version.
_NEW: dict[str, GgmlBlocks] = {
    "Q4_0": codecs_ggml.Q4_0,
    "Q4_1": codecs_ggml.Q4_1,
    "Q5_0": codecs_ggml.Q5_0,
    "Q5_1": codecs_ggml.Q5_1,
    "Q8_0": codecs_ggml.Q8_0,
}
_OLD: dict[str, GgmlBlocks] = {
    "Q4_0_v100": codecs_ggml_v100.Q4_0_V100,
    "Q4_1_v100": codecs_ggml_v100.Q4_1_V100,
    "Q4_1_O": codecs_ggml_v100.Q4_1_O,
    "Q4_2": codecs_ggml_v100.Q4_2,
    "Q4_3": codecs_ggml_v100.Q4_3,
}
_QUANTIZED = _NEW | _OLD

#: Schemes such a file can be written in.
SCHEMES = ("FP32", "FP16", *_QUANTIZED)

#: Version -> type of a tensor -> scheme and block format.
_BLOCKS: dict[int, dict[int, tuple[str, GgmlBlocks]]] = {
    100: {blocks.file_type: (name, blocks) for name, blocks in _OLD.items()},
    101: {blocks.file_type: (name, blocks) for name, blocks in _NEW.items()},
}


def recognise(head: bytes) -> bool:
    """Whether the first bytes of a file are rwkv.cpp's."""
    return head.startswith(MAGIC)


# --- reading


@dataclass(frozen=True)
class _Header:
    version: int
    n_vocab: int
    n_embd: int
    n_layer: int
    kind: int


def read(file: MappedFile) -> TensorFile:
    """Names, shapes and lazily mapped data of every tensor; quantized ones are dequantized as they are read.

    The metadata says ``ggml_version`` and ``ggml_scheme``. Raises :class:`CheckpointError` for a header
    or tensor that is malformed, truncated or of a type without a codec here.
    """
    header = _header(file)
    tensors: dict[str, Tensor] = {}
    at = _HEADER.size
    while at < file.size:
        name, tensor, at = _tensor(file, at, header)
        if name in tensors:
            raise CheckpointError(f"{file.path}: tensor {quoted(name)} appears twice; damaged")
        tensors[name] = tensor
    _check_sizes(header, tensors, file.path)
    scheme = _scheme_of(header)
    return TensorFile(tensors, {"ggml_version": str(header.version), "ggml_scheme": scheme})


def _header(file: MappedFile) -> _Header:
    data = file.part(0, _HEADER.size)
    if len(data) < _HEADER.size:
        raise CheckpointError(f"{file.path}: truncated inside its ggml header; download or copy it again")
    header = _Header(*_HEADER.unpack(data)[1:])
    if header.version not in VERSIONS:
        raise CheckpointError(f"{file.path}: rwkv.cpp file of version {header.version}; 100 and 101 are read")
    if header.kind not in _FLOATS and header.kind not in _BLOCKS[header.version]:
        raise CheckpointError(f"{file.path}: {_unknown_type(header.kind, header.version)}")
    return header


def _scheme_of(header: _Header) -> str:
    if header.kind in _FLOATS:
        return _TYPE_NAMES[header.kind]
    return _BLOCKS[header.version][header.kind][0]


def _unknown_type(kind: int, version: int) -> str:
    if kind >= len(_TYPE_NAMES):
        return f"stored as type {kind}, which rwkv.cpp does not have; damaged"
    known = ", ".join(("FP32", "FP16", *(name for name, _ in _BLOCKS[version].values())))
    return (
        f"stored as {_TYPE_NAMES[kind]}, which has no codec here for version {version} (it has {known});"
        " give the FP16 or FP32 file or the .pth it was quantized from"
    )


def _tensor(file: MappedFile, at: int, header: _Header) -> tuple[str, Tensor, int]:
    """Name and tensor at a byte offset, and the offset of the next one."""
    fixed = file.part(at, _TENSOR.size)
    if len(fixed) < _TENSOR.size:
        raise CheckpointError(f"{file.path}: truncated at byte {at}, inside a tensor's header; copy it again")
    n_dims, name_size, kind = _TENSOR.unpack(fixed)
    if not (1 <= n_dims <= 3 and 1 <= name_size <= _LONGEST_NAME):
        raise CheckpointError(f"{file.path}: no tensor of rwkv.cpp at byte {at}; damaged")
    at += _TENSOR.size
    rest = file.part(at, 4 * n_dims + name_size)
    if len(rest) < 4 * n_dims + name_size:
        raise CheckpointError(f"{file.path}: truncated at byte {at}, inside a tensor's header; copy it again")
    shape = tuple(reversed(struct.unpack(f"<{n_dims}I", rest[: 4 * n_dims])))
    name = rest[4 * n_dims :].decode("utf-8", "backslashreplace")
    at += len(rest)
    where = f"{file.path}: tensor {quoted(name)}"
    if kind in _FLOATS:
        stored = _FLOATS[kind]
        tensor, size = file.tensor(stored, shape, at), count(shape) * _ITEM_SIZE[stored]
    else:
        blocks = _blocks(header, kind, shape, where)
        tensor, size = PackedTensor.at(file.map, at, shape, blocks), blocks.packed_bytes(shape)
    if at + size > file.size:
        missing = at + size - file.size
        raise CheckpointError(f"{where} of shape {shape} is truncated by {missing} bytes; download or copy it again")
    return name, decay_back(tensor) if name.endswith(".time_decay") else tensor, at + size


def _blocks(header: _Header, kind: int, shape: tuple[int, ...], where: str) -> GgmlBlocks:
    known = _BLOCKS[header.version]
    if kind not in known:
        raise CheckpointError(f"{where} is {_unknown_type(kind, header.version)}")
    if kind != header.kind:
        raise CheckpointError(f"{where} is {known[kind][0]}, but the file is {_scheme_of(header)}; damaged")
    blocks = known[kind][1]
    if len(shape) != 2 or shape[1] % blocks.group:
        raise CheckpointError(f"{where} of shape {shape} does not divide into blocks of {blocks.group}; damaged")
    return blocks


def _check_sizes(header: _Header, tensors: Mapping[str, Tensor], path: str) -> None:
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.") and name.count(".") > 1})
    if layers != header.n_layer:
        raise CheckpointError(f"{path}: has {layers} of {header.n_layer} layers; truncated or damaged")
    emb = tensors.get("emb.weight")
    if emb is not None and emb.shape != (header.n_vocab, header.n_embd):
        raise CheckpointError(
            f"{path}: tensor emb.weight has shape {emb.shape}, but the header says"
            f" ({header.n_vocab}, {header.n_embd}); damaged"
        )


def decay_back(tensor: Tensor) -> Tensor:
    """``time_decay`` of what the file holds, ``-exp(time_decay)``; float32."""
    read = tensor.read

    def logarithm() -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):  # positive values, which no RWKV-4 file has, become NaN
            return np.log(-read().astype(np.float64)).astype(np.float32)

    return replace(tensor, stored="f32", read=logarithm)


# --- writing


def kept_scheme(tensors: Mapping[str, Tensor]) -> str:
    """The scheme in which nothing of a matrix is lost: as packed, else FP16 where all are f16, else FP32."""
    matrices = {name: tensor for name, tensor in tensors.items() if is_matrix(name)}
    for scheme, blocks in _QUANTIZED.items():
        if _all_packed(matrices, blocks):
            return scheme
    return "FP16" if all(tensor.stored == "f16" for tensor in matrices.values()) else "FP32"


def _all_packed(matrices: Mapping[str, Tensor], blocks: GgmlBlocks) -> bool:
    inner = [tensor for name, tensor in matrices.items() if name not in ("emb.weight", "head.weight")]
    return all(isinstance(tensor, PackedTensor) and tensor.read.packing is blocks for tensor in inner)


def write(file: BinaryIO, tensors: Mapping[str, Tensor], config: Config, scheme: str, encoder: Encoder) -> None:
    """Write canonical tensors in one of ``SCHEMES``, as rwkv.cpp's own converter and quantizer do.

    Raises :class:`ConfigError` where blocks do not divide the rows of a matrix, before anything is written.
    """
    plans = [_plan(name, tensor, scheme, encoder) for name, tensor in tensors.items()]
    blocks = _QUANTIZED.get(scheme)
    version = 101 if scheme in _NEW else 100
    kind = blocks.file_type if blocks else _TYPE_NAMES.index(scheme)
    file.write(_HEADER.pack(MAGIC, version, config.n_vocab, config.n_embd, config.n_layer, kind))
    for plan in plans:
        name = plan.name.encode()
        file.write(_TENSOR.pack(len(plan.shape), len(name), plan.kind))
        file.write(struct.pack(f"<{len(plan.shape)}I", *reversed(plan.shape)) + name)
        for block in plan.blocks():
            file.write(block)


@dataclass(frozen=True)
class _Plan:
    name: str
    shape: tuple[int, ...]
    kind: int
    blocks: Callable[[], Iterator[memoryview]]


def _plan(name: str, tensor: Tensor, scheme: str, encoder: Encoder) -> _Plan:
    codec = get_scheme(scheme).codec
    if codec is None:
        raise ConfigError(f"scheme {scheme} has no codec here")
    if name.endswith(".time_decay"):
        decay = decay_to_file(name, tensor)
        return _Plan(name, tensor.shape, 0, lambda: encoder.blocks(name, decay, "f32"))
    kept = codec.format(name)
    stored = kept.keep(name, tensor).stored  # raises where blocks do not divide a row
    if isinstance(kept, Packed):
        blocks = _QUANTIZED[scheme]
        return _Plan(name, tensor.shape, blocks.file_type, lambda: encoder.packed(name, tensor, blocks))
    kind = {stored: kind for kind, stored in _FLOATS.items()}[stored]
    return _Plan(name, tensor.shape, kind, lambda: encoder.blocks(name, tensor, stored))


def decay_to_file(name: str, tensor: Tensor) -> Tensor:
    """``-exp(time_decay)`` rounded once to float32: the exponential is taken in float64."""

    def exponential() -> np.ndarray:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values = Tensor.of(checked(name, tensor), tensor.stored).array(np.float64)
            return np.asarray(-np.exp(values), dtype=np.float32)

    return Tensor("f32", tensor.shape, exponential)
