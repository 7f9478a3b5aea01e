"""BigDL-LLM's and ipex-llm's block formats for CPUs: ggml's of mid-2023 with blocks of 64 instead of 32.

Source: ``ggml_quantize_tensor`` of the ``libllama_*.so`` that bigdl-llm 2.4.0 and ipex-llm 2.2.0 bring;
their bytes are the same, on every instruction set. The source is not public: the formats were found by
quantizing chosen blocks, and are held bit for bit against the library in suites/parity/test_bigdl.py.

    sym_int4    float16 scale; a nibble per weight, weight i beside weight i + 32
    asym_int4   float16 scale, float16 minimum; nibbles
    sym_int5    float16 scale; the fifth bits of all weights, 8 bytes; nibbles
    sym_int8    float32 scale; a signed byte per weight

Deliberate differences: a block that holds NaN or Inf, or spans more than float32, gets the scale NaN, so
that the fault stays visible in all of it (the library steps over NaN and gives the weight any code). Of
codes that a scale of zero makes meaningless, and of the sign of a zero that is a scale or a minimum,
nothing is promised.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from reference.codecs_ggml import Q4_0, Q4_1, Q5_0, GgmlBlocks, round_half_away, scaled

BLOCK = 64

_F32 = np.dtype("<f4")


def _encode_sym_int8(blocks: np.ndarray) -> np.ndarray:
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = round_half_away(scaled(blocks, d)).astype(np.int8)
    scale = np.where(np.isfinite(d), d, np.float32(np.nan)).astype(_F32)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)


def _decode_sym_int8(blocks: np.ndarray) -> np.ndarray:
    scale = np.ascontiguousarray(blocks[:, :4]).view(_F32).astype(np.float32)
    return np.asarray(scale * blocks[:, 4:].view(np.int8).astype(np.float32))


# ``file_type`` is the number of the format in ``ggml_tensor_qtype``.
SYM_INT4 = replace(Q4_0, group=BLOCK, block_bytes=34, file_type=2)
ASYM_INT4 = replace(Q4_1, group=BLOCK, block_bytes=36, file_type=3)
SYM_INT5 = replace(Q5_0, group=BLOCK, block_bytes=42, file_type=6)
SYM_INT8 = GgmlBlocks(file_type=8, block_bytes=68, encode=_encode_sym_int8, decode=_decode_sym_int8, group=BLOCK)
