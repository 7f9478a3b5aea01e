"""Whether Triton can run here, and on which device: versions, driver, compute capability, memory."""

from __future__ import annotations

import ctypes
import os
import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as installed_version
from typing import Any

from backends.api import Unavailable, Unsupported
from backends.shared.torch_devices import check_cuda
from reference.config import Config
from reference.errors import ConfigError
from reference.schemes import stored_bytes

OLDEST_TRITON = (3, 6)
OLDEST_TORCH = (2, 8)  # torch.mm with a type for its result

#: Compute capability from which there is bfloat16, and which the kernels are compiled and checked for.
OLDEST_CAPABILITY = (8, 0)

_INSTALL = "pip install torch triton, or this project as '.[triton]'"
_INTERPRETER = "TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to check them"

#: What a CUDA context, loaded kernels and cuBLAS's workspace take on the card.
_CONTEXT_BYTES = 700 << 20
_GIB = 1 << 30

#: Tokens of a prompt that run at once; longer ones in pieces, the state handed on.
PIECE = 2048

#: Lengths of prompts whose graphs are kept, with what they need.
KEPT_PROMPTS = 2

#: Positions whose logits are on the card at once where all of a text's are wanted.
SCORED_ROWS = 256


def interpreted() -> bool:
    """Whether Triton's interpreter is on, by the variable and the values that Triton itself goes by."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def installed(package: str) -> str:
    """Version of a package without importing it; empty where it is not installed."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return ""


def check() -> None:
    """Raise Unavailable where nothing of this can run; imports neither torch nor triton."""
    triton, torch = installed("triton"), installed("torch")
    for package, found in (("triton", triton), ("torch", torch)):
        if not found:
            raise Unavailable(f"{package} is not installed", _INSTALL)
    check_pair(triton, torch, torch_wants())
    if interpreted():
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Unavailable("no CUDA driver here (libcuda.so.1)", f"it needs an NVIDIA GPU; {_INTERPRETER}") from None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        raise Unavailable("the CUDA driver does not answer", f"see nvidia-smi; {_INTERPRETER}")


def torch_wants() -> str:
    """The version of Triton that the installed torch was built with; empty where it does not say."""
    for text in requires("torch") or ():
        found = re.match(r"triton\s*\(?==\s*([0-9.]+)", text)
        if found:
            return found[1]
    return ""


def check_pair(triton: str, torch: str, wanted: str) -> None:
    """Raise Unavailable for versions too old, or for a Triton that is not the one torch was built with."""
    for package, found, oldest in (("triton", triton, OLDEST_TRITON), ("torch", torch, OLDEST_TORCH)):
        if _numbers(found) < oldest:
            least = ".".join(map(str, oldest))
            raise Unavailable(f"{package} {found} is too old; {least} is the oldest that works", _INSTALL)
    if wanted and _numbers(wanted) != _numbers(triton):
        raise Unavailable(f"torch {torch} belongs with triton {wanted}, not {triton}", f"pip install triton=={wanted}")


def _numbers(version: str) -> tuple[int, int]:
    parts = re.findall(r"\d+", version)
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 else (0, 0)


def open_device(name: str) -> Any:
    """``torch.device`` of ``cuda``, ``cuda:1``, or of ``cpu`` in the interpreter. Raises Unavailable, Unsupported."""
    import torch

    from backends.triton_cuda.tiles import INTERPRETED

    kind, colon, index = name.partition(":")
    if kind not in ("cuda", "cpu") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise Unsupported(f"triton has no device {name!r}; it has cuda and cuda:<index>, and cpu in the interpreter")
    if interpreted() != INTERPRETED:  # Triton decided when the kernels were defined
        raise Unsupported("TRITON_INTERPRET was changed after this process had defined its kernels; start another")
    if kind == "cpu":
        if not interpreted():
            raise Unsupported(f"triton compiles for GPUs only; {_INTERPRETER}")
        return torch.device("cpu")
    if interpreted():
        raise Unsupported(f"TRITON_INTERPRET is set, so no kernel is compiled for {name}; unset it, or take device cpu")
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is a build without CUDA", "see https://pytorch.org/get-started")
    check_cuda(int(index or 0))
    device = torch.device("cuda", int(index or 0))
    check_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return device


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """Raise Unsupported for a GPU older than the kernels are compiled for."""
    if capability < OLDEST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, OLDEST_CAPABILITY))
        raise Unsupported(f"{name} has compute capability {found}; the kernels need {least}")


def needed_bytes(config: Config, scheme: str, piece: int) -> int:
    """Predicted bytes on the card: weights, what pieces of so many tokens need, a context."""
    c, f, v = config.n_embd, config.n_ffn, config.n_vocab
    rows = (
        (1 + KEPT_PROMPTS) * piece * (4 * c + 2 * 3 * c + 4 * 4 * c + 2 * c + 6 * f)
    )  # stream, mixed, k v r and out, out as its product takes it, k and its square
    unpacked = 2 * c * max(f, c) if scheme.startswith(("q4", "q8")) else 0
    state = 8 * config.n_layer * 5 * c * 4
    return stored_bytes(config, scheme) + rows + unpacked + state + 4 * v * (SCORED_ROWS + 2) + _CONTEXT_BYTES


def check_memory(config: Config, scheme: str, piece: int, free: int, total: int, schemes: tuple[str, ...]) -> None:
    """Raise Unavailable, naming what would fit, where the prediction is more than is free."""
    needed = needed_bytes(config, scheme, piece)
    if needed <= free:
        return
    fitting = []
    for other in schemes:
        try:
            if needed_bytes(config, other, piece) <= free:
                fitting.append(f"{other} ({needed_bytes(config, other, piece) / _GIB:.1f} GiB)")
        except ConfigError:  # groups that do not divide a row of this model
            continue
    would = f"{', '.join(fitting)} would fit" if fitting else "no scheme of this model would fit"
    raise Unavailable(
        f"{scheme} needs {needed / _GIB:.1f} GiB on the card, {free / _GIB:.1f} of {total / _GIB:.1f} are free", would
    )
