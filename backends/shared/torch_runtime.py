"""torch as several runtimes use it: devices by name, and what it keeps per process."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np

from backends.api import Unsupported
from backends.shared.torch_devices import open_device

#: Scheme -> name of torch's type for its activations.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def package_version(package: str) -> str:
    """Version of an installed package without importing it; empty where it is not installed."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return ""


def check_threads(threads: int | None, runtime: str) -> None:
    """Raise Unsupported for a number of threads that torch does not take."""
    if threads is not None and threads < 1:
        raise Unsupported(f"{runtime} needs at least one CPU thread; {threads} were asked for")


def check_device(device: str, runtime: str) -> None:
    """Raise Unsupported for a device other than ``cpu``, ``cuda``, ``cuda:<index>``, Unavailable for one not here."""
    open_device(device, runtime, ("cpu", "cuda"))


def settle(threads: int | None, runtime: str) -> None:
    """Set what torch keeps per process, which another session or library may have changed since; cheap.

    TF32 and sums in half precision would break the declared arithmetic; importing ``rwkv`` turns TF32 on.
    """
    import torch

    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        if torch.get_num_threads() != threads:
            raise Unsupported(f"{runtime} runs {torch.get_num_threads()} threads where {threads} were asked for")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def to_numpy(tensor: Any) -> np.ndarray:
    """A float32 copy in host memory; later in-place operations do not reach it."""
    import torch

    return np.asarray(tensor.detach().to("cpu", torch.float32, copy=True).numpy())
