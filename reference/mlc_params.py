"""Weights as the arrays that MLC-LLM keeps for a compiled library: packed matrices, scales, and floats."""

from __future__ import annotations

import numpy as np

from reference.codecs_mlc import MlcGroups, MlcPacked
from reference.errors import ConfigError
from reference.schemes import Packed, codec_of, get_scheme
from reference.weights import Tensor

#: Pack at most this many weights at a time, which bounds the memory of what lies between.
_BLOCK_ELEMENTS = 1 << 20


def mlc_arrays(name: str, tensor: Tensor, scheme: str) -> dict[str, np.ndarray]:
    """The arrays of the tensor of a canonical name under one of MLC's schemes, by MLC's names, in C order.

    A quantized ``X.weight`` ``(N, K)`` gives ``X.q_weight``, uint32, and ``X.q_scale``, float16 or float32; in
    schemes ``_0`` both are transposed (layout KN), except those of the embedding. See
    :meth:`reference.codecs_mlc.MlcGroups.arrays` for the shapes. What is not quantized keeps its name, in the
    model's type, ``time_decay`` and ``time_first`` in float32, values as in the checkpoint. ``X`` is the
    checkpoint's own name.

    Raises :class:`ConfigError` for a scheme that is not MLC's.
    """
    if get_scheme(scheme).system != "MLC":
        raise ConfigError(f"scheme {scheme} is not one of MLC-LLM's; choose one such as q4f16_1")
    kept = codec_of(scheme).format(name)
    if not (isinstance(kept, Packed) and isinstance(kept.packing, MlcGroups)):
        return {name: kept.keep(name, tensor).read()}
    stem = name[: -len("weight")]
    packed = _packed(tensor, kept.packing)
    return {stem + part: array for part, array in kept.packing.arrays(packed).items()}


def _packed(tensor: Tensor, packing: MlcGroups) -> MlcPacked:
    """The whole matrix, packed a block of rows at a time."""
    rows, columns = tensor.shape
    step = max(1, _BLOCK_ELEMENTS // columns)
    blocks = [packing.quantize(tensor.rows(slice(start, start + step))) for start in range(0, rows, step)]
    return MlcPacked(
        np.concatenate([block.q_weight for block in blocks]),
        np.concatenate([block.q_scale for block in blocks]),
        columns,
    )
