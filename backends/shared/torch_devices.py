"""torch's devices: opened by name or refused with the reason, waited for, their memory given back."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from backends.api import Unavailable, Unsupported

#: Set, torch runs an operator that MPS lacks on the CPU and says so only on stderr.
MPS_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"

_NAMES = {"cpu": "cpu", "cuda": "cuda, cuda:<index>", "mps": "mps"}


def open_device(name: str, runtime: str, kinds: tuple[str, ...] = ("cpu", "cuda", "mps")) -> Any:
    """``torch.device`` of a name such as ``cuda:1``; Unsupported or Unavailable says why it cannot be used."""
    import torch

    kind, colon, index = name.partition(":")
    if kind not in kinds or (colon and (kind != "cuda" or not index.isdecimal())):
        raise Unsupported(f"{runtime} has no device {name!r} here; it has {', '.join(_NAMES[k] for k in kinds)}")
    if kind == "cuda":
        check_cuda(int(index or 0))
        return torch.device("cuda", int(index or 0))
    if kind == "mps":
        check_mps()
    return torch.device(kind)


def check_cuda(index: int) -> None:
    """Raise Unavailable where torch cannot use the CUDA device of an index."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            raise Unavailable(
                f"torch {torch.__version__} is a build without CUDA", "see https://pytorch.org/get-started"
            )
        check_driver(driver_version(), torch.version.cuda)
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f"; CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else ""
        raise Unavailable("torch sees no CUDA device", f"it needs an NVIDIA GPU and driver; see nvidia-smi{hint}")
    if index >= torch.cuda.device_count():
        raise Unavailable(f"there is no cuda:{index}", f"torch sees {torch.cuda.device_count()} CUDA device(s)")


def driver_version() -> int | None:
    """Newest CUDA that the installed driver has, as 1000 * major + 10 * minor; ``None``: no driver answers."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else version.value


def check_driver(driver: int | None, built_for: str | None) -> None:
    """Raise Unavailable for a driver of an older major CUDA than torch was built for."""
    needed = re.match(r"(\d+)", built_for or "")
    if driver is not None and needed is not None and driver // 1000 < int(needed[1]):
        raise Unavailable(
            f"the NVIDIA driver is too old: it has CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"torch was built for {built_for}",
            "install a newer driver, or a torch for the older CUDA",
        )


def check_mps() -> None:
    """Raise Unavailable without an MPS device, Unsupported where torch may silently leave it for the CPU."""
    import torch

    if not torch.backends.mps.is_available():
        raise Unavailable("torch sees no MPS device", "it needs macOS on Apple silicon and torch built for it")
    if os.environ.get(MPS_FALLBACK, "0") not in ("", "0"):
        raise Unsupported(f"{MPS_FALLBACK} is set, so operators could run on the CPU unseen; unset it")


def wait(device: Any) -> None:
    """Until the device has done all it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def allocated_bytes(device: Any) -> int | None:
    """Bytes that tensors of this process take on a device; ``None`` on the CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(torch.mps.current_allocated_memory()) if device.type == "mps" else None


def give_back(device: Any) -> None:
    """Return what torch keeps of freed device memory, for other processes and the next cell."""
    import torch

    if device.type == "cpu":
        return
    gc.collect()
    with suppress(RuntimeError):  # a device that has failed has nothing to give back
        wait(device)
    if device.type == "cuda":
        _clear_workspaces()
    (torch.cuda if device.type == "cuda" else torch.mps).empty_cache()


def _clear_workspaces() -> None:
    """cuBLAS keeps a workspace for every stream it has worked on; torch's way to free them is no public one."""
    import torch

    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


@contextmanager
def loading(device: Any, runtime: str) -> Iterator[None]:
    """What is loaded inside is on the device at the end; where its memory runs out, it is given back first.

    Raises Unavailable for memory that ran out.
    """
    import torch

    short = None
    try:
        yield
        wait(device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # MPS raises a plain RuntimeError, "MPS backend out of memory".
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        short = str(error).partition(". ")[0]
    if short is not None:  # outside the handler: its traceback holds the tensors
        give_back(device)
        raise Unavailable(
            f"{runtime} ran out of memory of {device} while loading: {short}", "try a smaller scheme or model"
        )
