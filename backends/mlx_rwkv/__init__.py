# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "numpy>=1.26",
#   "safetensors>=0.4",
#   "mlx[cpu]==0.32.0; sys_platform == 'linux'",
#   "mlx==0.32.0; sys_platform == 'darwin'",
# ]
# ///
"""RWKV-4 on Apple's MLX: Apple GPUs, and CPUs, where what it computes can be checked without a Mac.

    __init__  what it offers, and whether it can run here; imports no MLX
    schemes   what is kept and computed with, by scheme name
    weights   matrices on the device, quantized by MLX itself
    model     the forward pass
    wkv       the recurrence over time in log2(T) steps
    session   the contract of backends.api over them

The speed on a CPU of Linux is none of MLX's aims (a reference BLAS, one thread), and no claim about MLX.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec

from backends.api import BackendInfo, Session, Unavailable, Unsupported
from backends.mlx_rwkv.schemes import SCHEMES
from reference.weights import Weights

INFO = BackendInfo(
    name="mlx",
    description="Apple's MLX; 4 and 8 bits by quantized_matmul; its speed on a Linux CPU is no claim",
    origin="https://github.com/ml-explore/mlx",
    devices=("mps", "cpu"),
    schemes={name: kept.metal for name, kept in SCHEMES.items()},
    device_arithmetic={(name, "cpu"): kept.cpu for name, kept in SCHEMES.items()},
    thread_control=False,
)


def check() -> None:
    """Raises Unavailable where MLX is not installed; does not import it."""
    if find_spec("mlx") is None:
        raise Unavailable("mlx is not installed", "run rwkv-bench setup mlx")


def version() -> str:
    """Version of MLX, without importing it; empty where it is not installed."""
    try:
        return installed_version("mlx")
    except PackageNotFoundError:
        return ""


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session on ``cpu`` or ``mps``, the Apple GPU; ``threads`` has no meaning to MLX.

    Raises Unavailable, Unsupported, or ConfigError where the scheme's groups do not divide a row of the model.
    """
    if scheme not in SCHEMES:
        raise Unsupported(f"mlx has no scheme {scheme!r}; it has {', '.join(SCHEMES)}")
    if device not in INFO.devices:
        raise Unsupported(f"mlx has no device {device!r} here; it has cpu and mps, the Apple GPU")
    check()
    if device == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise Unavailable("mlx sees no Apple GPU", "it needs macOS on Apple silicon; --device cpu computes anywhere")
    from backends.mlx_rwkv.session import open_session

    return open_session(checkpoint, scheme, device)
