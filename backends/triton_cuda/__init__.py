"""RWKV-4 in Triton kernels for NVIDIA GPUs: a step of decoding is one CUDA graph, a prompt runs through cuBLAS.

    __init__      what it offers, and whether it can run here; imports neither torch nor triton
    machine       versions, driver, devices, memory: every reason why it cannot
    types, tiles  types of results, block sizes
    kernels_*     norm: embedding, LayerNorm, token shift; gemv: products with one vector, with what follows each,
                  and the arg-max; wkv: the recurrence over a prompt; gemm: packed matrices and squared ReLU
    matrix        stored matrices and their products
    stored        what a model keeps on its device: weights, buffers of a step
    place         a checkpoint onto the device
    model         the step and the pass over a prompt
    graph         capture of a CUDA graph: all that the interpreter cannot show
    session       the contract of backends.api

Without a GPU the kernels run in Triton's interpreter, on numpy: ``TRITON_INTERPRET=1`` in the environment, device
``cpu``. It checks results and is slow; nothing chooses it silently.

What is computed: products add up in float32. In ``fp16`` and the packed schemes their inputs are rounded to float16,
and nothing else is: results, residual stream and WKV are float32, and rows of squared ReLU and of r * wkv too large
for float16 are divided by a power of two. So no matrix makes it overflow; weights of a LayerNorm do that put its result
beyond 65504, near a thousand and more (no trained model's are). ``q0f16`` is MLC-LLM's arithmetic, all of it float16
but WKV, and overflows where that does. In ``bf16`` the stream and WKV are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.api import BackendInfo, Session, Unsupported
from backends.triton_cuda import machine
from reference.config import Config
from reference.numerics import Arithmetic
from reference.weights import Weights

_SAFE = Arithmetic(activations="fp16rows")

INFO = BackendInfo(
    name="triton",
    description="Triton kernels for NVIDIA GPUs, decoding as one CUDA graph"
    + ("; INTERPRETED on the CPU" if machine.interpreted() else ""),
    origin="this project, backends/triton_cuda",
    devices=("cuda", "cpu"),
    schemes={
        "fp16": _SAFE,
        "bf16": Arithmetic(activations="bf16"),
        "fp32": Arithmetic(),
        "q4f16_1": _SAFE,
        "q4f16_0": _SAFE,
        "q8f16_1": _SAFE,
        "q0f16": Arithmetic(activations="fp16", residual="fp16"),
    },
    thread_control=False,
)


def check() -> None:
    """Raises Unavailable without triton, torch, the version of one that belongs to the other, or a CUDA driver."""
    machine.check()


def version() -> str:
    """Version of Triton."""
    return machine.installed("triton")


def device_bytes(config: Config, scheme: str) -> int:
    """Predicted bytes on the card; what is free is held against it before anything is loaded."""
    return machine.needed_bytes(config, scheme, machine.PIECE)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session on ``cuda``, ``cuda:<index>``, or in the interpreter on ``cpu``. Raises Unavailable, Unsupported."""
    return _opened(checkpoint, scheme, device, {})


def adjust(checkpoint: Weights, scheme: str, device: str, threads: int | None, change: Mapping[str, Any]) -> Session:
    """The same with ``rescale_every``, for ``q0f16``; the others keep in float32 what it rescales."""
    unknown = sorted(set(change) - {"rescale_every"})
    if unknown:
        raise Unsupported(f"triton cannot change {', '.join(unknown)}; it can change rescale_every, and has fp16")
    if scheme != "q0f16":
        raise Unsupported(f"triton rescales q0f16 only; {scheme} keeps its residual stream in float32")
    return _opened(checkpoint, scheme, device, change)


def _opened(checkpoint: Weights, scheme: str, device: str, change: Mapping[str, Any]) -> Session:
    if scheme not in INFO.schemes:
        raise Unsupported(f"triton has no scheme {scheme!r}; it has {', '.join(INFO.schemes)}")
    check()
    from backends.triton_cuda.session import open_session

    return open_session(checkpoint, scheme, device, int(change.get("rescale_every", 0)))
