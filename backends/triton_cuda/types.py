"""Which type each kind of result has, for every scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

#: torch's type -> Triton's.
TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

#: Given to every launch: a product and the sum it goes into are one rounding, on every version of Triton.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Types:
    """Types of results, torch's.

    inputs    what a matrix is multiplied by
    made      what comes out of a product, and what is made of that until the next product
    stream    the residual stream
    limited   rows of squared ReLU and of r * wkv are divided by a power of two where they would leave ``inputs``
    """

    inputs: torch.dtype
    made: torch.dtype
    stream: torch.dtype

    @property
    def limited(self) -> bool:
        return self.inputs == torch.float16 and self.made == torch.float32


_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16

#: Nothing but the inputs of products is rounded to float16, so nothing else can leave its range: LayerNorm's results
#: do where its own weights are near a thousand and more, the other inputs are limited.
_SAFE = Types(_F16, _F32, _F32)

#: Scheme -> types.
TYPES: dict[str, Types] = {
    "fp16": _SAFE,
    "bf16": Types(_BF16, _BF16, _F32),
    "fp32": Types(_F32, _F32, _F32),
    "q0f16": Types(_F16, _F16, _F16),
    "q4f16_0": _SAFE,
    "q4f16_1": _SAFE,
    "q8f16_1": _SAFE,
}
