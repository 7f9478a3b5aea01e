"""RWKV-4 in eager PyTorch, on CPU, CUDA and MPS: the readable fast baseline.

    __init__  what it offers, and whether it can run here; imports no torch
    model     the forward pass
    linear    matrix products
    adjusted  the forward pass with some results in float32, for fixes that are tried
    session   the contract of backends.api over it
    mps       what it needs of torch on Apple GPUs

What is computed: matrix products take activations of the scheme's type, accumulate in float32 and
round their result to that type; the residual stream has that type too, so ``fp16`` overflows where
plain half-precision code does. LayerNorm statistics and the whole WKV recurrence are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from typing import Any

from backends.api import BackendInfo, Session, Unavailable, Unsupported
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

_INSTALL = "pip install torch, or this project as '.[torch]'"

INFO = BackendInfo(
    name="torch",
    description="eager PyTorch, oneDNN matrix products on CPU",
    origin="this project, backends/torch_eager",
    devices=("cpu", "cuda", "mps"),
    schemes={
        "fp32": Arithmetic(),
        "fp16": Arithmetic(activations="fp16", residual="fp16"),
        "bf16": Arithmetic(activations="bf16", residual="bf16"),
    },
)


def check() -> None:
    """Raises Unavailable where torch is not installed; does not import it."""
    if find_spec("torch") is None:
        raise Unavailable("torch is not installed", _INSTALL)


def version() -> str:
    """Version of torch, without importing it; empty where it is not installed."""
    try:
        return installed_version("torch")
    except PackageNotFoundError:
        return ""


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session with the weights stored as ``scheme`` on ``device`` (``cpu``, ``cuda``, ``cuda:1``, ``mps``).

    ``threads=None`` leaves torch's own number of CPU threads. Raises Unavailable or Unsupported.
    """
    return _opened(checkpoint, scheme, device, threads, None)


def adjust(checkpoint: Weights, scheme: str, device: str, threads: int | None, change: Mapping[str, Any]) -> Session:
    """The same with a change of arithmetic; see :mod:`backends.api`. Raises Unsupported for one it cannot make."""
    return _opened(checkpoint, scheme, device, threads, change)


def _opened(
    checkpoint: Weights, scheme: str, device: str, threads: int | None, change: Mapping[str, Any] | None
) -> Session:
    if scheme not in INFO.schemes:
        raise Unsupported(f"torch has no scheme {scheme!r}; it has {', '.join(INFO.schemes)}")
    check()
    from backends.shared.torch_devices import open_device
    from backends.torch_eager.session import open_session

    place = open_device(device, INFO.name)
    if place.type == "mps":
        from backends.torch_eager.mps import check_operators

        check_operators(scheme)
    return open_session(apply(checkpoint, scheme), scheme, place, threads, change)
