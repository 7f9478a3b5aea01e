"""The largest finite value of each float format, and which format holds which result."""

from __future__ import annotations

from reference.numerics import ROUND, Arithmetic

FP16, BF16, FP32 = "fp16", "bf16", "fp32"

#: Largest finite value.
LIMITS = {FP16: 65504.0, BF16: 3.3895314e38, FP32: 3.4028235e38}


def kind_of(arithmetic: Arithmetic, name: str) -> str:
    """Type of the result of an operation (``att.k``); types of products' inputs only mean fp32."""
    if name in ("emb", "blocks.0.ln0") or name.endswith("residual"):
        return arithmetic.residual
    return arithmetic.activations if arithmetic.activations in ROUND else FP32


def kind_within(arithmetic: Arithmetic, name: str) -> str:
    """Type of what an operation keeps on its way to the result: the sums and exponentials of WKV have their own."""
    return arithmetic.wkv if name == "att.wkv" else kind_of(arithmetic, name)
