"""``.fr`` of faster-rwkv: one msgpack map of the tensors as its kernels want them.

Source: tools/convert_weight.py and kernels/default/init_model.cpp of https://github.com/daquexian/faster-rwkv,
which take a file that ChatRWKV's ``convert_model.py`` has converted (strategy ``cuda fp16`` or ``fp32``):

    embd_weights  list of one tensor (n_embd,) per token: the embedding after blocks.0.ln0
    weights       name -> tensor, all but the embedding and ln0
    version "4", n_layer, n_embd, n_att, n_ffn
    a tensor      {"dtype": "torch.float16", "data": bytes, "shape": [...]}

Names are BlinkDL's. Matrices are (in, out), vectors one-dimensional. ``time_decay`` is
``-exp(time_decay)``; it and ``time_first`` are float32. In fp16, att.output and ffn.value of layer i are
divided by 2^(i // 6), because faster-rwkv then halves the residual stream after every sixth layer.

Read back, the embedding and ln0 are not the original's but give the same result
(:mod:`reference.fr_embedding`); ``time_decay`` returns as in :mod:`reference.ggml_file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from reference.config import Config, is_matrix
from reference.errors import CheckpointError
from reference.fr_embedding import EMB, LN0_BIAS, LN0_WEIGHT, folded, unfolded
from reference.ggml_file import decay_back, decay_to_file
from reference.msgpack_spans import MsgpackError, Span, array_head, bin_head, map_head, pack, parse
from reference.tensor_file import MappedFile, TensorFile, count, is_sizes, quoted, release
from reference.tensor_stream import Encoder, checked, convert
from reference.weights import STORED_TYPES, Tensor

SCHEMES = ("fp32", "fp16")

#: In fp16, the residual stream is halved after every so many layers.
RESCALE = 6

_FROM_FILE = {"torch.float32": "f32", "torch.float16": "f16"}
_TO_FILE = {stored: name for name, stored in _FROM_FILE.items()}
_FIRST_KEY = b"\xacembd_weights"


def recognise(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a msgpack map that begins as faster-rwkv's."""
    return 0x80 <= head[0] <= 0x8F and head[1 : 1 + len(_FIRST_KEY)] == _FIRST_KEY


# --- reading


def read(file: MappedFile) -> TensorFile:
    """Tensors under canonical names and in canonical shapes, lazily mapped.

    The metadata says ``fr_dtype``. Raises :class:`CheckpointError` for a file that is malformed,
    truncated, or of a later architecture.
    """
    found = _content(file)
    tensors: dict[str, Tensor] = {}
    for name, entry in found["weights"].items():
        tensors[name] = _canonical(name, _tensor(file, entry, name))
    rows = _embedding(file, found["embd_weights"])
    for name, tensor in unfolded(file.path, rows).items():
        if name in tensors:
            raise CheckpointError(f"{file.path}: tensor {name} lies beside the normalised embedding; damaged")
        tensors[name] = tensor
    _check_sizes(found, tensors, file.path)
    return TensorFile(tensors, {"fr_dtype": _TO_FILE[rows.stored]})


def _content(file: MappedFile) -> dict[str, Any]:
    try:
        found, end = parse(file.map, 0, file.size)
    except MsgpackError as error:
        raise CheckpointError(f"{file.path}: {error}; truncated or damaged, copy it again") from None
    if end != file.size:
        raise CheckpointError(f"{file.path}: {file.size - end} bytes follow its msgpack map; damaged")
    if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
        raise CheckpointError(f"{file.path}: has no map called weights; damaged")
    version = found.get("version", "4")
    if version != "4":
        raise CheckpointError(f"{file.path}: of RWKV version {quoted(version)}; only RWKV-4 is supported")
    return found


def _tensor(file: MappedFile, entry: Any, name: str) -> Tensor:
    where = f"{file.path}: tensor {quoted(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is malformed; damaged")
    dtype, data = entry.get("dtype"), entry.get("data")
    shape: Any = entry.get("shape")
    if not (isinstance(dtype, str) and isinstance(data, Span) and is_sizes(shape)):
        raise CheckpointError(f"{where} is malformed; damaged")
    if dtype not in _FROM_FILE:
        raise CheckpointError(f"{where} is stored as {quoted(dtype)}; torch.float16 or torch.float32 is expected")
    stored = _FROM_FILE[dtype]
    if data.size != count(shape) * np.dtype(STORED_TYPES[stored]).itemsize:
        raise CheckpointError(f"{where} has {data.size} bytes, which is not {dtype} of shape {tuple(shape)}")
    return file.tensor(stored, tuple(shape), data.offset)


def _canonical(name: str, tensor: Tensor) -> Tensor:
    """Matrices (out, in), not rescaled; ``time_decay`` itself."""
    if name.endswith(".time_decay"):
        return decay_back(tensor)
    if not is_matrix(name) or len(tensor.shape) != 2:
        return tensor
    factor = np.float16(2.0 ** _halvings(name)) if tensor.stored == "f16" else None
    read, shape = tensor.read, tensor.shape[::-1]
    if factor is None or factor == 1:
        return replace(tensor, shape=shape, read=lambda: read().T)
    return replace(tensor, shape=shape, read=lambda: read().T * factor)


def _halvings(name: str) -> int:
    """How often the residual stream has been halved where the output of this matrix is added to it."""
    layer = name.split(".")[1]
    added = name.endswith(("att.output.weight", "ffn.value.weight")) and layer.isdecimal() and len(layer) < 4
    return min(15, int(layer) // RESCALE) if added else 0


def _embedding(file: MappedFile, entries: Any) -> Tensor:
    """The rows as one strided view: every entry is as long as the first and holds its data at the same place."""
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{file.path}: has no list called embd_weights; damaged")
    rows = [_tensor(file, entry, f"embd_weights[{i}]") for i, entry in enumerate(entries)]
    offsets = np.array([row.read.offset for row in rows], dtype=np.int64)  # type: ignore[attr-defined]
    step = int(offsets[1] - offsets[0]) if len(rows) > 1 else 0
    if any((row.stored, row.shape) != (rows[0].stored, rows[0].shape) for row in rows) or np.any(
        np.diff(offsets) != step
    ):
        raise CheckpointError(f"{file.path}: its embd_weights are not all alike; damaged")
    if len(rows[0].shape) != 1 or not rows[0].shape[0]:
        raise CheckpointError(f"{file.path}: embd_weights hold shape {rows[0].shape}; one row per token is expected")
    stored, width = rows[0].stored, rows[0].shape[0]
    strides = (step, np.dtype(STORED_TYPES[stored]).itemsize)
    return file.tensor(stored, (len(rows), width), int(offsets[0]), strides)


def _check_sizes(found: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> None:
    key = tensors.get("blocks.0.ffn.key.weight")
    sizes = {"n_embd": tensors[EMB].shape[1], "n_att": tensors[EMB].shape[1]}
    sizes["n_layer"] = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if key is not None:
        sizes["n_ffn"] = key.shape[0]
    for name, size in sizes.items():
        if found.get(name, size) != size:
            raise CheckpointError(f"{path}: {name} is {quoted(found[name])}, but the tensors have {size}; damaged")


# --- writing


def kept_scheme(tensors: Mapping[str, Tensor]) -> str:
    """``fp16`` where all matrices are stored so, else ``fp32``."""
    return "fp16" if all(t.stored == "f16" for name, t in tensors.items() if is_matrix(name)) else "fp32"


def write(file: BinaryIO, tensors: Mapping[str, Tensor], config: Config, scheme: str, encoder: Encoder) -> None:
    """Write canonical tensors in one of ``SCHEMES``, as faster-rwkv's own converter does."""
    stored = {"fp32": "f32", "fp16": "f16"}[scheme]
    file.write(map_head(7) + pack("embd_weights") + array_head(config.n_vocab))
    _write_embedding(file, tensors, stored, encoder)
    kept = [name for name in tensors if name not in (EMB, LN0_WEIGHT, LN0_BIAS)]
    file.write(pack("weights") + map_head(len(kept)))
    for name in kept:
        target, tensor = _as_stored(name, tensors[name], stored)
        n_bytes = count(tensor.shape) * np.dtype(STORED_TYPES[target]).itemsize
        before, after = _around(target, tensor.shape, n_bytes)
        file.write(pack(name) + before)
        for block in encoder.blocks(name, tensor, target):
            file.write(block)
        file.write(after)
        release(tensors[name])
    file.write(pack("version") + pack("4"))
    for name, size in (("n_layer", config.n_layer), ("n_embd", config.n_embd), ("n_att", config.n_embd)):
        file.write(pack(name) + pack(size))
    file.write(pack("n_ffn") + pack(config.n_ffn))


def _around(stored: str, shape: tuple[int, ...], n_bytes: int) -> tuple[bytes, bytes]:
    """What comes before and after the bytes of a tensor."""
    before = map_head(3) + pack("dtype") + pack(_TO_FILE[stored]) + pack("data") + bin_head(n_bytes)
    return before, pack("shape") + pack(shape)


def _write_embedding(file: BinaryIO, tensors: Mapping[str, Tensor], stored: str, encoder: Encoder) -> None:
    width = tensors[EMB].shape[1]
    n_bytes = width * np.dtype(STORED_TYPES[stored]).itemsize
    before, after = _around(stored, (width,), n_bytes)
    checked(EMB, tensors[EMB])
    encoder.tell(EMB)
    for rows in folded(tensors[EMB], tensors[LN0_WEIGHT], tensors[LN0_BIAS]):
        values, overflowed = convert(rows, "f64", stored)
        if overflowed and EMB not in encoder.overflowed:
            encoder.overflowed.append(EMB)
        entry = np.empty((len(rows), len(before) + n_bytes + len(after)), dtype=np.uint8)
        entry[:, : len(before)] = np.frombuffer(before, np.uint8)
        entry[:, len(before) : len(before) + n_bytes] = np.ascontiguousarray(values).view(np.uint8)
        entry[:, len(before) + n_bytes :] = np.frombuffer(after, np.uint8)
        file.write(entry.data)
    release(tensors[EMB])


def _as_stored(name: str, tensor: Tensor, stored: str) -> tuple[str, Tensor]:
    """The stored type, and the tensor transposed, rescaled, or as ``-exp(time_decay)``."""
    if name.endswith(".time_decay"):
        return "f32", decay_to_file(name, tensor)
    if name.endswith(".time_first"):
        return "f32", tensor
    if not is_matrix(name):
        return stored, tensor
    halvings = _halvings(name) if stored == "f16" else 0
    return stored, Tensor(
        tensor.stored if not halvings else "f32",
        tensor.shape[::-1],
        lambda: _transposed(name, tensor, halvings),
    )


def _transposed(name: str, tensor: Tensor, halvings: int) -> np.ndarray:
    raw = checked(name, tensor)
    if halvings:  # in float32, so that the result is rounded once
        raw = Tensor.of(raw, tensor.stored).array() * np.float32(0.5**halvings)
    return raw.T
