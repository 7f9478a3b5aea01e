"""The model files that rwkv.cpp reads, in the cache: FP32 or FP16 written here, the rest quantized by the library.

A quantized file keeps embedding and head as the file it is made from has them. That one is FP16 where every
matrix of the checkpoint is stored in fp16, and FP32 else, so no value is rounded that the scheme
(:mod:`reference.schemes`) does not round.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backends.api import Unsupported
from backends.rwkv_cpp.library import Library
from reference.config import is_matrix
from reference.converted import converted, derived
from reference.numerics import row_blocks
from reference.weights import Weights


def model_file(library: Library, checkpoint: Weights, scheme: str) -> Path:
    """The file of ``checkpoint`` in a scheme that the library has. Raises Unsupported."""
    if scheme not in library.api.formats:
        return converted(checkpoint, "ggml", scheme)
    _check_rows(checkpoint, scheme, library.api.block[scheme])

    def quantize(path: Path) -> None:
        if scheme == "Q4_1_O":
            _check_outliers(checkpoint)
        library.quantize(converted(checkpoint, "ggml", source_scheme(checkpoint)), path, scheme)

    return derived(checkpoint, f"rwkv.cpp-{library.found.digest()}-{scheme}.bin", quantize)


def source_scheme(checkpoint: Weights) -> str:
    """The scheme of the file that is quantized."""
    stored = {tensor.stored for name, tensor in checkpoint.items() if is_matrix(name)}
    return "FP16" if stored == {"f16"} else "FP32"


def _check_rows(checkpoint: Weights, scheme: str, block: int) -> None:
    """The library of 2023 cuts the rest of a row off without a word, a newer one aborts."""
    config = checkpoint.config
    if config.n_embd % block or config.n_ffn % block:
        raise Unsupported(
            f"{scheme} packs blocks of {block} weights, which do not divide rows of {config.n_embd} and "
            f"{config.n_ffn}; rwkv.cpp takes this model as FP32 or FP16"
        )


def _check_outliers(checkpoint: Weights) -> None:
    """A block without any weight but 0 has no outlier: the library stores index 65535 and then writes there."""
    for name, tensor in checkpoint.items():
        if not is_matrix(name) or name in ("emb.weight", "head.weight"):
            continue
        for rows in row_blocks(tensor):
            blocks = tensor.rows(rows, np.float32).reshape(-1, 32)
            if not (np.abs(blocks) > 0).any(axis=1).all():
                raise Unsupported(
                    f"rwkv.cpp crashes on Q4_1_O where 32 weights in a row are all zero, as in {name} of this model"
                )
