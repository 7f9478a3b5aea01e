"""Matrix products: the fastest that torch has for a device, a type and a size, all of one arithmetic.

Inputs of the scheme's type, sums in float32, the result rounded once to the scheme's type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]

#: Smaller matrices stay in the cache, where a packed order gains nothing and a second thread costs more than it brings.
_PACK_ELEMENTS = 1 << 18

#: From this many rows on, upcasting a whole fp16 matrix costs less than torch's fp16 GEMM without it.
_UPCAST_ROWS = 3


def make_linear(weight: Tensor) -> Linear:
    """``x (T, K)`` times ``weight (N, K)`` transposed, by the fastest product torch has for it."""
    if weight.device.type == "cpu":
        if weight.dtype == torch.float16 and not onednn_packs(torch.float16) and onednn_packs(torch.float32):
            return lambda x: _half_linear(x, weight)
        # F.linear hands float32 to MKL, which has no AVX-512 and no threaded GEMV on AMD, and bfloat16 to
        # oneDNN in an order that is repacked at every call.
        if weight.numel() >= _PACK_ELEMENTS and onednn_packs(weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            return lambda x: _onednn(x, packed)
    return lambda x: F.linear(x, weight)


def _half_linear(x: Tensor, weight: Tensor) -> Tensor:
    """fp16 on a CPU that has no fp16 arithmetic: sums are float32 and rounded once in both branches."""
    if len(x) < _UPCAST_ROWS:
        return F.linear(x, weight)  # a GEMV that upcasts as it reads; its GEMM is a slow plain loop
    return _onednn(x.float(), weight.float()).half()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


@cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether this build and CPU have oneDNN's product with packed weights for a type."""
    try:
        _onednn(torch.ones(1, 2, dtype=dtype), torch.ops.mkldnn._reorder_linear_weight(torch.ones(2, 2, dtype=dtype)))
    except (AttributeError, RuntimeError):
        return False
    return True
