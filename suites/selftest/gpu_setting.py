"""What the tests of gpu-check ask it for, and a row that a command printed."""

from __future__ import annotations

from typing import Any

from harness.gpu_check.steps import Offer, Setting
from harness.hardware import Hardware
from harness.rows import Row

H200 = Hardware("h200", "cuda:0", "NVIDIA H200")
OFFERS = (
    Offer("torch", ("fp32", "fp16", "bf16"), ("fp16", "bf16")),
    Offer("triton", ("fp16", "q4f16_1", "q0f16"), ("q0f16", "fp16", "q4f16_1")),
    Offer("rwkv", ("fp32", "fp16", "fp16i8"), ("fp16", "fp16i8")),
)
SETTING = Setting("cuda:0", OFFERS, ("169m", "7b-world"), "tiny", "overflow.safetensors", "blocks.4.ffn.k2")


def measured(**more: Any) -> Row:
    about = {"hardware": "h200", "backend": "torch", "model": "tiny", "scheme": "fp16", "metric": "parity"}
    return Row(kind="measured", run="r", time="2026-11-21T00:00:00+00:00", **{**about, "reason": "x", **more})
