"""Checkpoints in and out, told apart by content.

``.pth``, ``.safetensors``, Hugging Face folders, ``.bin`` of rwkv.cpp and ``.fr`` of faster-rwkv.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reference import fr_file, ggml_file, hf_folder, pth_file, safetensors_file
from reference.atomic_write import atomic_file
from reference.config import infer_config, tensor_shapes
from reference.errors import CheckpointError, ConfigError, NonFiniteWeights
from reference.tensor_file import MappedFile, TensorFile, quoted, release, reshaped
from reference.tensor_stream import Encoder, check_scheme
from reference.weights import Tensor, Weights, find_non_finite

FORMATS = ("pth", "safetensors", "hf", "ggml", "fr")

#: Formats that keep other tensors than BlinkDL's, with schemes of their own.
_CONVERTED: dict[str, Any] = {"ggml": ggml_file, "fr": fr_file}

#: First bytes -> what the file is instead of a checkpoint we read.
_OTHER_FILES = (
    (b"lmgg", "an old ggml file; give the .pth it was converted from"),
    (b"tjgg", "a ggjt file of llama.cpp; give the .pth it was converted from"),
    (b"GGUF", "a GGUF file; give the .pth it was converted from"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "in torch's format before 1.6; load it in torch and torch.save it"),
    (b"\x80", "a bare pickle, which is never loaded here; save it with torch.save of torch 1.6 or later"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself; run git lfs pull"),
    (b"\x89PNG", "a PNG image"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x7fELF", "a program or library"),
)
_EXPECTED = "a .pth, .safetensors, rwkv.cpp .bin, .fr or Hugging Face folder of RWKV-4 is expected"


def load_checkpoint(path: str | os.PathLike[str], *, scan: bool = True) -> Weights:
    """Open an RWKV-4 checkpoint, whatever its format; its tensors stay memory-mapped as stored.

    scan  read everything once to find NaN and Inf, which load with a :class:`NonFiniteWeights` warning
          and fill ``Weights.non_finite``; without it only the headers are read

    Raises :class:`CheckpointError`, one line that names file and tensor or architecture.
    """
    source = os.fspath(path)
    if os.path.isdir(source):
        found, settings = hf_folder.read(source, read_file)
        weights = _weights(found, source, settings)
    else:
        weights = _weights(read_file(source), source, None)
    if not scan:
        return weights
    non_finite = _scan(weights)
    if non_finite:
        warnings.warn(NonFiniteWeights(f"{source}: NaN or Inf in {_first(non_finite)}"), stacklevel=2)
        weights = replace(weights, non_finite=non_finite)
    return weights


def save_checkpoint(
    weights: Weights,
    path: str | os.PathLike[str],
    format: str,
    scheme: str | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> None:
    """Write ``weights`` as ``pth``, ``safetensors`` (both in BlinkDL's layout), ``hf`` (a folder), ``ggml`` or ``fr``.

    scheme  ``fp32``, ``fp16`` or ``bf16`` for every tensor; ``None`` keeps each as stored, bit by bit.
            ``ggml`` (rwkv.cpp) and ``fr`` (faster-rwkv) have their own, :data:`reference.ggml_file.SCHEMES`
            and :data:`reference.fr_file.SCHEMES`; ``None`` keeps the matrices as stored where the format
            has the type, and makes them float32 where not
    tell    called with the name of every tensor as its turn comes

    The file or folder appears when it is complete. An existing file is replaced, an existing folder
    that is not empty never. Finite values that become Inf are written, with a
    :class:`NonFiniteWeights` warning. What a format cannot keep is told by
    :func:`reference.lost.lost`.

    Raises :class:`ConfigError` for an unknown format or scheme, :class:`CheckpointError` where the
    file cannot be written.
    """
    _check_format(format)
    check_scheme(scheme, _CONVERTED[format].SCHEMES if format in _CONVERTED else None)
    target, metadata = os.fspath(path), {**weights.metadata, **({"synthetic": "true"} if weights.synthetic else {})}
    encoder = Encoder(None if format in _CONVERTED else scheme, tell)
    if format == "hf":
        hf_folder.write(target, _file_shapes(weights), weights.config, metadata, encoder)
    else:
        with atomic_file(target) as file:
            if format in _CONVERTED:
                converter = _CONVERTED[format]
                converter.write(file, weights, weights.config, scheme or converter.kept_scheme(weights), encoder)
            else:
                writer = pth_file if format == "pth" else safetensors_file
                writer.write(file, _file_shapes(weights), metadata, encoder)
    if encoder.overflowed:
        message = f"{target}: values too large for {scheme} became Inf in {_first(encoder.overflowed)}"
        warnings.warn(NonFiniteWeights(message), stacklevel=2)


def read_file(path: str) -> TensorFile:
    """Tensors of one file, its format recognised by its first bytes; names and shapes as in the file."""
    file = MappedFile(path)
    head = file.part(0, 512)
    if pth_file.recognise(head):
        return pth_file.read(file)
    if safetensors_file.recognise(head):
        return safetensors_file.read(file)
    if ggml_file.recognise(head):
        return ggml_file.read(file)
    if fr_file.recognise(head):
        return fr_file.read(file)
    raise CheckpointError(f"{path}: {_describe(head, os.path.basename(path))}")


def _describe(head: bytes, name: str) -> str:
    for magic, what in _OTHER_FILES:
        if head.startswith(magic):
            return f"this is {what}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, saved in place of the model; download the file behind the link"
    if name == hf_folder.CONFIG or name.endswith(".index.json"):
        return "this describes a Hugging Face model; give the folder it lies in"
    if len(head) < 9:
        return f"only {len(head)} bytes, so truncated or no checkpoint; {_EXPECTED}"
    text = all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head)
    return f"not a checkpoint{', but text' if text else f' (it starts with {head[:8].hex()})'}; {_EXPECTED}"


def _weights(found: TensorFile, source: str, settings: Mapping[str, Any] | None) -> Weights:
    """Canonical names and shapes, all checked."""
    tensors = _canonical(found.tensors, source)
    if settings and settings.get("tie_word_embeddings") and "emb.weight" in tensors:
        _tie(tensors, source)
    _check_layers(tensors, source)
    rescale = hf_folder.rescale_every(settings) if settings else 0
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = infer_config(shapes, source, rescale)
    except CheckpointError as error:
        shard = re.search(r"-of-\d+\.(safetensors|bin)$", source)
        hint = "; this is one shard of several: give the folder" if shard else ""
        raise CheckpointError(f"{error}{hint}") from None
    if settings:
        hf_folder.check_sizes(settings, config, os.path.join(source, hf_folder.CONFIG))
    ordered = {name: tensors[name] for name in tensor_shapes(config)}
    synthetic = found.metadata.get("synthetic") == "true"
    return Weights(config, ordered, source, synthetic=synthetic, metadata=found.metadata)


def _canonical(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    canonical: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > 120:
            raise CheckpointError(f"{source}: tensor {quoted(name)} is not one of RWKV-4")
        new = hf_folder.blinkdl_name(name)
        if new in canonical:
            raise CheckpointError(f"{source}: two tensors are both {new} (the second is called {name})")
        shape = tensor.shape
        if len(shape) == 3 and shape[:2] == (1, 1):
            tensor = reshaped(tensor, shape[2:])
        canonical[new] = tensor
    return canonical


def _check_layers(tensors: Mapping[str, Tensor], source: str) -> None:
    """A layer index beyond the number of tensors would make the list of wanted tensors arbitrarily long."""
    for name in tensors:
        match = re.match(r"blocks\.(\d+)\.", name)
        if match and (len(match.group(1)) > 9 or int(match.group(1)) >= len(tensors)):
            raise CheckpointError(f"{source}: tensor {name} is of a layer whose predecessors are missing")


def _tie(tensors: dict[str, Tensor], source: str) -> None:
    """The head of a model with tied embeddings: the embedding, which a head stored beside it must equal."""
    emb = tensors["emb.weight"]
    head = tensors.setdefault("head.weight", emb)
    if head.stored != emb.stored or head.shape != emb.shape or not _same_bytes(emb, head):
        raise CheckpointError(f"{source}: tie_word_embeddings is true, but head.weight is not the embedding")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return all(map(np.array_equal, Encoder().blocks("emb.weight", a), Encoder().blocks("head.weight", b)))


def _scan(weights: Weights) -> tuple[str, ...]:
    found: list[str] = []
    for name, tensor in weights.items():
        found += find_non_finite({name: tensor})
        release(tensor)
    return tuple(found)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _file_shapes(weights: Weights) -> dict[str, Tensor]:
    """The tensors as BlinkDL's files hold them: the mixing vectors are ``(1, 1, n_embd)``."""
    mixing = {name: (1, 1, *tensor.shape) for name, tensor in weights.items() if ".time_mix_" in name}
    return {name: reshaped(tensor, mixing.get(name, tensor.shape)) for name, tensor in weights.items()}


def _check_format(format: str) -> None:
    if format not in FORMATS:
        near = difflib.get_close_matches(str(format), FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no checkpoint format {format!r}; {hint}choose from {', '.join(FORMATS)}")
