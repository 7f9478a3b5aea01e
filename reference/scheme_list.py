"""The list of schemes. To add one, add it to ``_ALL``; everything else reads it from there.

A new way of packing is an object with ``quantize``, ``dequantize``, ``packed_bytes`` and ``group``, as in
:mod:`reference.codecs_mlc` and :mod:`reference.codecs_ggml`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.codecs_bigdl import ASYM_INT4, SYM_INT4, SYM_INT5, SYM_INT8
from reference.codecs_ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from reference.codecs_ggml_v100 import Q4_0_V100, Q4_1_O, Q4_1_V100, Q4_2, Q4_3
from reference.codecs_mlc import MlcGroups
from reference.codecs_mlx import MLX_SCHEMES, MlxGroups
from reference.codecs_onnx import ONNX_SCHEMES, OnnxScheme
from reference.codecs_rwkv_int8 import RwkvInt8
from reference.config import is_matrix, preset, tensor_shapes
from reference.stored_formats import Codec, Floats, Format, Packed, Packing

SCHEME_CLASSES = ("f32", "f16", "bf16", "int8", "int5", "int4", "int3")

#: The shape on which stored bits per weight are counted.
BITS_SHAPE = "169m"


@dataclass(frozen=True)
class Scheme:
    """One way to store weights.

    system  where the name comes from
    codec   ``None``: no codec here, so only quality can be judged, not the kernel
    scales  types of what a group stores beside its codes; empty: nothing. ``min``, what is added, has the scale's type,
            ``zero`` is an integer of the codes' bits
    stated  bits per weight of a scheme without a codec
    """

    name: str
    scheme_class: str
    system: str
    codec: Codec | None
    scales: str = ""
    stated: float | None = None

    @property
    def bits(self) -> float | None:
        """Stored bits per weight of the layers' matrices, scales and padding included, at the 169M shape."""
        if self.codec is None:
            return self.stated
        shapes = {n: s for n, s in tensor_shapes(preset(BITS_SHAPE)).items() if n.startswith("blocks") and is_matrix(n)}
        stored = sum(self.codec.format(name).nbytes(name, shape, "f16") for name, shape in shapes.items())
        return 8 * stored / sum(math.prod(shape) for shape in shapes.values())

    @property
    def group(self) -> int | str | None:
        """Weights that share a scale, ``axis``: whole rows and columns; ``None``: nothing shared, or no codec."""
        kept = self.codec.matrices if self.codec is not None else None
        if isinstance(kept, RwkvInt8):
            return "axis"
        return kept.packing.group if isinstance(kept, Packed) else None

    @property
    def unquantized(self) -> tuple[str, ...] | None:
        """What stays a float: ``embedding``, ``head``, ``vectors``, or ``everything``; ``None`` without a codec."""
        if self.codec is None:
            return None
        if isinstance(self.codec.matrices, Floats):
            return ("everything",)
        parts = {"embedding": self.codec.embedding, "head": self.codec.head, "vectors": self.codec.vectors}
        return tuple(part for part, kept in parts.items() if isinstance(kept, Floats))


F32, F16, BF16, SOURCE = Floats("f32"), Floats("f16"), Floats("bf16"), Floats("source")


def _floats(kept: Floats) -> Codec:
    return Codec(matrices=kept, embedding=kept, head=kept, vectors=kept)


def _mlc_floats(kept: Floats) -> Codec:
    """MLC-LLM, not quantized: WKV always runs in float32, on float32 vectors."""
    return Codec(kept, embedding=kept, head=kept, vectors=kept, decay=F32)


def _mlc(kept: Floats, bits: int, layout: str, group: int = 32, *, ends: bool = True) -> Codec:
    """MLC-LLM: the linear layers in the scheme's layout, the embedding always by rows; vectors in the model's type.

    ends    embedding and head are quantized too
    """
    model_type = {F16: np.float16, F32: np.float32}[kept]
    linear = Packed(MlcGroups(bits, model_type, group, layout), pads=True)
    table = Packed(MlcGroups(bits, model_type, group, "NK"), pads=True)
    return Codec(linear, table if ends else kept, linear if ends else kept, vectors=kept, decay=F32)


def _ggml(packing: Packing) -> Codec:
    """rwkv.cpp: embedding and head stay as they are in the file that is quantized, vectors are float32."""
    return Codec(Packed(packing), embedding=SOURCE, head=SOURCE, vectors=F32)


def _mlx(packing: MlxGroups) -> Codec:
    """mlx-lm: every linear layer, the embedding and the head are quantized, all else is in the model's type."""
    kept = Packed(packing)
    return Codec(kept, embedding=kept, head=kept, vectors=F16)


def _bigdl(packing: Packing) -> Codec:
    """BigDL-LLM: every linear layer and the head are quantized; embedding and vectors are float32."""
    return Codec(Packed(packing), embedding=F32, head=Packed(packing), vectors=F32)


def _chatrwkv(kept: Floats, numpy_type: Any) -> Codec:
    """The rwkv package: matrices and head packed from a file of the activations' type, everything else as in it."""
    packed: Format = RwkvInt8(numpy_type)
    return Codec(packed, embedding=kept, head=packed, vectors=kept)


@dataclass(frozen=True)
class _AttApart(Codec):
    """A codec that keeps the matrices of time mixing in a format of their own."""

    att: Format | None = None

    def format(self, name: str) -> Format:
        return self.att if self.att is not None and ".att." in name and is_matrix(name) else super().format(name)


def _onnx(name: str, kept: OnnxScheme) -> Scheme:
    """ONNX Runtime: every linear layer and the head are quantized, the embedding stays as it is in the file."""
    att = Packed(kept.att) if kept.att is not None else None
    codec = _AttApart(Packed(kept.matrices), embedding=SOURCE, head=Packed(kept.head), vectors=F32, att=att)
    scales = "f32+zero" if kept.matrices.asymmetric else "f32"
    return Scheme(name, f"int{kept.matrices.bits}", "ONNX Runtime", codec, scales)


_ALL = (
    Scheme("fp32", "f32", "any", _floats(F32)),
    Scheme("fp16", "f16", "any", _floats(F16)),
    Scheme("bf16", "bf16", "any", _floats(BF16)),
    # faster-rwkv: matrices bfloat16, embedding int8 after ln0
    Scheme("ncnn fp16", "bf16", "ncnn", None, stated=16),
    Scheme("q0f32", "f32", "MLC", _mlc_floats(F32)),
    Scheme("q0f16", "f16", "MLC", _mlc_floats(F16)),
    Scheme("q3f16_0", "int3", "MLC", _mlc(F16, 3, "KN", 40), "f16"),
    Scheme("q3f16_1", "int3", "MLC", _mlc(F16, 3, "NK", 40), "f16"),
    Scheme("q4f32_0", "int4", "MLC", _mlc(F32, 4, "KN"), "f32"),
    Scheme("q4f32_1", "int4", "MLC", _mlc(F32, 4, "NK"), "f32"),
    Scheme("q4f16_0", "int4", "MLC", _mlc(F16, 4, "KN"), "f16"),
    Scheme("q4f16_1", "int4", "MLC", _mlc(F16, 4, "NK"), "f16"),
    Scheme("q4f16_2", "int4", "MLC", _mlc(F16, 4, "NK", ends=False), "f16"),
    Scheme("q8f16_0", "int8", "MLC", _mlc(F16, 8, "KN"), "f16"),
    Scheme("q8f16_1", "int8", "MLC", _mlc(F16, 8, "NK"), "f16"),
    Scheme("FP32", "f32", "rwkv.cpp", _floats(F32)),
    Scheme("FP16", "f16", "rwkv.cpp", Codec(F16, embedding=F16, head=F16, vectors=F32)),
    Scheme("Q4_0", "int4", "ggml", _ggml(Q4_0), "f16"),
    Scheme("Q4_1", "int4", "ggml", _ggml(Q4_1), "f16+min"),
    Scheme("Q5_0", "int5", "ggml", _ggml(Q5_0), "f16"),
    Scheme("Q5_1", "int5", "ggml", _ggml(Q5_1), "f16+min"),
    Scheme("Q8_0", "int8", "ggml", _ggml(Q8_0), "f16"),
    # blocks of 256, of eight with 6-bit scales and minima each
    Scheme("Q4_K", "int4", "ggml", None, stated=4.5),
    Scheme("Q5_K", "int5", "ggml", None, stated=5.5),
    # rwkv.cpp of April and May 2023, files of version 100
    Scheme("Q4_0_v100", "int4", "rwkv.cpp", _ggml(Q4_0_V100), "f32"),
    Scheme("Q4_1_v100", "int4", "rwkv.cpp", _ggml(Q4_1_V100), "f32+min"),
    Scheme("Q4_1_O", "int4", "rwkv.cpp", _ggml(Q4_1_O), "f16+min"),
    Scheme("Q4_2", "int4", "rwkv.cpp", _ggml(Q4_2), "f16"),
    Scheme("Q4_3", "int4", "rwkv.cpp", _ggml(Q4_3), "f16+min"),
    Scheme("sym_int4", "int4", "BigDL", _bigdl(SYM_INT4), "f16"),
    Scheme("asym_int4", "int4", "BigDL", _bigdl(ASYM_INT4), "f16+min"),
    Scheme("sym_int5", "int5", "BigDL", _bigdl(SYM_INT5), "f16"),
    Scheme("sym_int8", "int8", "BigDL", _bigdl(SYM_INT8), "f32"),
    Scheme("fp32i8", "int8", "ChatRWKV", _chatrwkv(F32, np.float32), "f32+min"),
    Scheme("fp16i8", "int8", "ChatRWKV", _chatrwkv(F16, np.float16), "f16+min"),
    *(Scheme(name, f"int{kept.bits}", "MLX", _mlx(kept), "f16+min") for name, kept in MLX_SCHEMES.items()),
    *(_onnx(name, kept) for name, kept in ONNX_SCHEMES.items()),
)

#: Scheme name -> scheme.
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}
