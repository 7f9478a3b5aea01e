"""Quantization schemes: how weights are stored, and what they are worth once stored that way.

A scheme is a name (its own system's), a class by which tables align systems, and a codec, which
says in which format each kind of tensor is kept. To add a scheme, add a line to ``_ALL``; a new way
of packing is an object with ``quantize``, ``dequantize``, ``packed_bytes`` and ``group``
(:mod:`reference.codecs_mlc`, :mod:`reference.codecs_ggml`).

Rule for NaN and Inf: they are never lost. The float formats keep them, and turn what leaves their
range into Inf; a quantized group that holds one is NaN as a whole.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from reference.codecs_bigdl import ASYM_INT4, SYM_INT4, SYM_INT5, SYM_INT8
from reference.codecs_ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from reference.codecs_ggml_v100 import Q4_0_V100, Q4_1_O, Q4_1_V100
from reference.codecs_mlc import MlcGroups
from reference.codecs_rwkv_int8 import RwkvInt8
from reference.config import Config, is_matrix, tensor_shapes
from reference.errors import ConfigError
from reference.packed_tensor import PackedTensor
from reference.weights import STORED_TYPES, Tensor, Weights, f32_to_bf16

SCHEME_CLASSES = ("f32", "f16", "bf16", "int8", "int5", "int4", "int3")

Convert = Callable[[np.ndarray], np.ndarray]

#: Convert at most this many weights of a matrix at a time, which bounds the memory of what lies between.
_BLOCK_ELEMENTS = 1 << 20


class Packing(Protocol):
    """A way to pack rows of weights, every row by itself."""

    @property
    def group(self) -> int:
        """Weights that share a scale; rows must be a multiple of it."""

    def quantize(self, w: np.ndarray, /) -> Any:
        """Pack float32 ``(..., K)``."""

    def dequantize(self, packed: Any, /) -> np.ndarray:
        """Float32 ``(..., K)``."""

    def packed_bytes(self, shape: tuple[int, ...], /) -> int:
        """Bytes of a packed tensor of ``shape``, scales included."""


class Format(Protocol):
    """How one tensor is kept."""

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it comes out of storage, made as it is read; its own self where nothing changes."""

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        """Bytes it takes; ``source`` is the stored type it comes from."""


@dataclass(frozen=True)
class Floats:
    """Kept as ``f32``, ``f16`` or ``bf16``; ``source``: as it comes if that is f32 or f16, else as f32."""

    stored: str

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        stored = self._stored(tensor.stored)
        return tensor if tensor.stored == stored else _converted(tensor, stored, _FROM_F32[stored])

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        return math.prod(shape) * int(np.dtype(STORED_TYPES[self._stored(source)]).itemsize)

    def _stored(self, source: str) -> str:
        if self.stored != "source":
            return self.stored
        return source if source in ("f32", "f16") else "f32"


@dataclass(frozen=True)
class Packed:
    """Kept quantized, computed with as float32 dequantized values."""

    packing: Packing

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        self._check(name, tensor.shape)
        if isinstance(tensor, PackedTensor) and tensor.read.packing is self.packing:
            return tensor  # of a file that holds it packed so: packing its values again could move them
        return _converted(tensor, "f32", lambda w: self.packing.dequantize(self.packing.quantize(w)))

    def nbytes(self, name: str, shape: tuple[int, ...], source: str) -> int:
        self._check(name, shape)
        return self.packing.packed_bytes(shape)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if shape[-1] % self.packing.group:
            raise ConfigError(
                f"tensor {name} has rows of {shape[-1]} weights, which do not divide into groups of "
                f"{self.packing.group}; choose a scheme without groups, such as fp16"
            )


@dataclass(frozen=True)
class Codec:
    """The format of each kind of tensor: matrices of the layers, embedding, head, vectors.

    decay   ``time_decay`` and ``time_first``, where they are not kept like the other vectors
    """

    matrices: Format
    embedding: Format
    head: Format
    vectors: Format
    decay: Format | None = None

    def format(self, name: str) -> Format:
        """Format of the tensor of a canonical name."""
        if name == "emb.weight":
            return self.embedding
        if name == "head.weight":
            return self.head
        if name.endswith((".time_decay", ".time_first")):
            return self.decay or self.vectors
        return self.matrices if is_matrix(name) else self.vectors


@dataclass(frozen=True)
class Scheme:
    """One way to store weights.

    bits    stored bits per weight of the layers' matrices, scales included
    codec   ``None``: no codec here, so only quality can be judged, not the kernel
    """

    name: str
    scheme_class: str
    bits: float
    description: str
    codec: Codec | None


F32, F16, BF16, SOURCE = Floats("f32"), Floats("f16"), Floats("bf16"), Floats("source")


def _floats(kept: Floats) -> Codec:
    return Codec(matrices=kept, embedding=kept, head=kept, vectors=kept)


def _mlc(matrices: Format, vectors: Format) -> Codec:
    """MLC-LLM: embedding and head like the matrices; WKV always runs in float32, on float32 vectors."""
    return Codec(matrices, embedding=matrices, head=matrices, vectors=vectors, decay=F32)


def _ggml(packing: Packing) -> Codec:
    """rwkv.cpp: embedding and head stay as they are in the file that is quantized, vectors are float32."""
    return Codec(Packed(packing), embedding=SOURCE, head=SOURCE, vectors=F32)


def _bigdl(packing: Packing) -> Codec:
    """BigDL-LLM: every linear layer and the head are quantized; embedding and vectors are float32."""
    return Codec(Packed(packing), embedding=F32, head=Packed(packing), vectors=F32)


def _chatrwkv(kept: Floats, numpy_type: Any) -> Codec:
    """The rwkv package: matrices and head packed from a file of the activations' type, everything else as in it."""
    packed = RwkvInt8(numpy_type)
    return Codec(packed, embedding=kept, head=packed, vectors=kept)


_ALL = (
    Scheme("fp32", "f32", 32, "IEEE single", _floats(F32)),
    Scheme("fp16", "f16", 16, "IEEE half", _floats(F16)),
    Scheme("bf16", "bf16", 16, "bfloat16", _floats(BF16)),
    Scheme("ncnn fp16", "bf16", 16, "faster-rwkv: matrices bfloat16, embedding int8 after ln0", None),
    Scheme("q0f32", "f32", 32, "MLC: not quantized, fp32", _mlc(F32, F32)),
    Scheme("q0f16", "f16", 16, "MLC: not quantized, fp16", _mlc(F16, F16)),
    Scheme("q4f32_1", "int4", 5, "MLC: int4, group 32, fp32 scales", _mlc(Packed(MlcGroups(4, np.float32)), F32)),
    Scheme("q4f16_1", "int4", 4.5, "MLC: int4, group 32, fp16 scales", _mlc(Packed(MlcGroups(4, np.float16)), F16)),
    Scheme("q8f16_1", "int8", 8.5, "MLC: int8, group 32, fp16 scales", _mlc(Packed(MlcGroups(8, np.float16)), F16)),
    Scheme("FP32", "f32", 32, "rwkv.cpp: not quantized, fp32", _floats(F32)),
    Scheme(
        "FP16", "f16", 16, "rwkv.cpp: matrices fp16, vectors fp32", Codec(F16, embedding=F16, head=F16, vectors=F32)
    ),
    Scheme("Q4_0", "int4", 4.5, "ggml: int4, block 32, fp16 scales", _ggml(Q4_0)),
    Scheme("Q4_1", "int4", 5, "ggml: int4, block 32, fp16 scales and minima", _ggml(Q4_1)),
    Scheme("Q5_0", "int5", 5.5, "ggml: int5, block 32, fp16 scales", _ggml(Q5_0)),
    Scheme("Q5_1", "int5", 6, "ggml: int5, block 32, fp16 scales and minima", _ggml(Q5_1)),
    Scheme("Q8_0", "int8", 8.5, "ggml: int8, block 32, fp16 scales", _ggml(Q8_0)),
    Scheme("Q4_K", "int4", 4.5, "ggml: int4, block 256 of 8 with 6-bit scales and minima", None),
    Scheme("Q5_K", "int5", 5.5, "ggml: int5, block 256 of 8 with 6-bit scales and minima", None),
    Scheme("Q4_0_v100", "int4", 5, "rwkv.cpp, April 2023: int4, block 32, fp32 scales", _ggml(Q4_0_V100)),
    Scheme("Q4_1_v100", "int4", 6, "rwkv.cpp, April 2023: int4, block 32, fp32 scales and minima", _ggml(Q4_1_V100)),
    Scheme("Q4_1_O", "int4", 6, "rwkv.cpp, April 2023: int4, block 32, fp16 outlier, scale, minimum", _ggml(Q4_1_O)),
    Scheme("sym_int4", "int4", 4.25, "BigDL: int4, block 64, fp16 scales", _bigdl(SYM_INT4)),
    Scheme("asym_int4", "int4", 4.5, "BigDL: int4, block 64, fp16 scales and minima", _bigdl(ASYM_INT4)),
    Scheme("sym_int5", "int5", 5.25, "BigDL: int5, block 64, fp16 scales", _bigdl(SYM_INT5)),
    Scheme("sym_int8", "int8", 8.5, "BigDL: int8, block 64, fp32 scales", _bigdl(SYM_INT8)),
    Scheme(
        "fp32i8", "int8", 8, "ChatRWKV: int8, fp32 scales and offsets per row and column", _chatrwkv(F32, np.float32)
    ),
    Scheme(
        "fp16i8", "int8", 8, "ChatRWKV: int8, fp16 scales and offsets per row and column", _chatrwkv(F16, np.float16)
    ),
)

#: Scheme name -> scheme.
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}


def get_scheme(name: str) -> Scheme:
    """The scheme of a name; raises :class:`ConfigError` with the nearest and all names."""
    if name in SCHEMES:
        return SCHEMES[name]
    folded = {known.lower(): known for known in reversed(SCHEMES)}  # fp16 before rwkv.cpp's FP16
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    raise ConfigError(f"no scheme {name!r}; {hint}schemes: {', '.join(SCHEMES)}")


def scheme_names(scheme_class: str | None = None) -> list[str]:
    """Names of all schemes, or of those of a class; raises :class:`ConfigError` for an unknown class."""
    if scheme_class is not None and scheme_class not in SCHEME_CLASSES:
        raise ConfigError(f"no scheme class {scheme_class!r}; classes: {', '.join(SCHEME_CLASSES)}")
    return [name for name, scheme in SCHEMES.items() if scheme_class in (None, scheme.scheme_class)]


def apply(weights: Weights, scheme: str | Scheme) -> Weights:
    """The weights that a correct backend of ``scheme`` computes with.

    Every tensor is converted as it is read, and again when it is read again: hold the result with
    :meth:`Weights.in_memory` to compute with it more than once. Raises :class:`ConfigError` for an
    unknown scheme, one without a codec, or a group that does not divide a row.
    """
    codec = _codec(scheme)
    return weights.map(lambda name, tensor: codec.format(name).keep(name, tensor))


def stored_bytes(config: Config, scheme: str | Scheme, source: str = "f16") -> int:
    """Bytes of all tensors of a checkpoint packed by ``scheme``, names and headers left out.

    ``source`` is the stored type of the checkpoint that is quantized; only schemes that leave some
    tensors as they are (ggml's) depend on it.
    """
    codec = _codec(scheme)
    return sum(codec.format(name).nbytes(name, shape, source) for name, shape in tensor_shapes(config).items())


def bytes_read_per_token(config: Config, scheme: str | Scheme, source: str = "f16") -> int:
    """Bytes of weights that one decode step must read: all but the embedding, and one row of that."""
    embedding, name = _codec(scheme).embedding, "emb.weight"
    matrix = embedding.nbytes(name, (config.n_vocab, config.n_embd), source)
    return stored_bytes(config, scheme, source) - matrix + embedding.nbytes(name, (1, config.n_embd), source)


def _codec(scheme: str | Scheme) -> Codec:
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    if scheme.codec is None:
        raise ConfigError(f"scheme {scheme.name} has no codec here; its weights are known to its own system only")
    return scheme.codec


@dataclass(frozen=True)
class _Converted(Tensor):
    """Another tensor, its rows converted from float32 as they are read."""

    source: Tensor
    convert: Convert

    def rows(self, index: Any, dtype: Any = np.float32) -> np.ndarray:
        return Tensor.of(_read(self.source, index, self.convert), self.stored).rows(..., dtype)


def _converted(source: Tensor, stored: str, convert: Convert) -> Tensor:
    return _Converted(stored, source.shape, lambda: _read(source, slice(None), convert), source, convert)


def _read(source: Tensor, index: Any, convert: Convert) -> np.ndarray:
    """``source[index]`` along the first axis, converted; a matrix block by block."""
    if len(source.shape) == 1:
        return np.asarray(convert(source.array())[index])
    rows = np.arange(source.shape[0])[index]
    step = max(1, _BLOCK_ELEMENTS // source.shape[1])
    if rows.ndim != 1 or rows.size <= step:
        return convert(source.rows(index))
    return np.concatenate([convert(source.rows(rows[a : a + step])) for a in range(0, rows.size, step)])


def _to_f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Inf is what such a weight becomes, and it is to be seen
        return np.asarray(x.astype(np.float16))


_FROM_F32: dict[str, Convert] = {"f32": lambda x: x, "f16": _to_f16, "bf16": f32_to_bf16}
