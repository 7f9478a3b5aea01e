"""Backend name -> module, without importing any of them: built in, installed, or one file of the user's."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from backends.api import BackendInfo
from reference.errors import InputError

#: The entry-point group by which an installed package adds backends.
GROUP = "rwkv_bench.backends"

#: Order is the order of tables: what starts fastest comes first.
BUILT_IN: dict[str, str] = {
    "numpy": "backends.numpy_reference",
    "torch": "backends.torch_eager",
    "triton": "backends.triton_cuda",
    "onnx": "backends.onnx_cpu",
    "rwkv.cpp": "backends.rwkv_cpp",
    "bigdl-llm": "backends.bigdl_llm",
    "ipex-llm": "backends.ipex_llm_rwkv",
    "rwkv": "backends.rwkv_pip",
    "transformers": "backends.transformers_rwkv",
    "ncnn": "backends.ncnn_rwkv",
    "faster-rwkv": "backends.faster_rwkv",
    "tvm": "backends.tvm_mlc",
    "mlc-chat": "backends.mlc_chat_cli",
    "mlx": "backends.mlx_rwkv",
}

#: Backend -> the environment variable that names a library or program of the user's, which it then drives.
LIBRARIES: dict[str, str] = {
    "rwkv.cpp": "RWKV_CPP_LIBRARY",
    "faster-rwkv": "RWKV_BENCH_FASTER_RWKV",
    "tvm": "RWKV_BENCH_TVM_LIBRARY",
    "mlc-chat": "RWKV_BENCH_MLC_CHAT",
}

#: Usable by name, never part of ``all``: they exist for the tests of the harness itself.
HIDDEN: dict[str, str] = {"faulty": "backends.faulty", "deadly": "backends.deadly"}


class UnknownBackend(InputError):
    """No backend of that name, or a file that is not one; one line."""


def backend_names() -> list[str]:
    """What ``--backend all`` means: built-in and installed backends."""
    return [*BUILT_IN, *sorted(set(_installed()) - set(BUILT_IN))]


def load_backend(name: str) -> ModuleType:
    """The module of a backend: a name, an installed entry point, or a path to a ``.py`` file.

    Raises :class:`UnknownBackend`, with the nearest names, for anything else.
    """
    built_in = {**BUILT_IN, **HIDDEN}.get(name)
    if name.endswith(".py"):
        module = _from_file(Path(name).absolute())
    elif built_in is not None:
        module = importlib.import_module(built_in)
    elif name in (installed := _installed()):
        module = _from_package(installed[name])
    else:
        near = difflib.get_close_matches(name, backend_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownBackend(
            f"no backend {name!r}; {hint}backends: {', '.join(backend_names())}, or the path of a .py file"
        )
    info = getattr(module, "INFO", None)
    if not isinstance(info, BackendInfo) or not callable(getattr(module, "load", None)):
        raise UnknownBackend(
            f"{name}: a backend needs INFO (a backends.api.BackendInfo) and load(); see backends/api.py"
        )
    if not info.devices or not info.schemes:
        lacking = "schemes" if info.devices else "devices"
        raise UnknownBackend(f"{name}: INFO names no {lacking}; at least one is needed")
    return module


def place(name: str) -> dict[str, str]:
    """Where another interpreter finds a backend: ``{"module": dotted name}`` or ``{"file": absolute path}``.

    The name is one that :func:`load_backend` takes.
    """
    if name.endswith(".py"):
        return {"file": os.path.abspath(name)}
    built_in = {**BUILT_IN, **HIDDEN}.get(name)
    return {"module": built_in or _installed()[name].value}


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _from_package(point: EntryPoint) -> ModuleType:
    """What an entry point names: a module, or an object with the same names (``package.module:object``)."""
    try:
        loaded: ModuleType = point.load()
    except Exception as error:  # somebody else's package may raise anything while it is imported
        raise UnknownBackend(f"{point.name} ({point.value}): importing it raised {_told(error)}") from error
    return loaded


@cache
def _from_file(path: Path) -> ModuleType:
    """Imported once, however often it is asked for."""
    if not os.path.isfile(path):  # unlike Path.is_file, false for a name that is too long as well
        raise UnknownBackend(f"{path}: no such file; --backend takes a name or the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"rwkv_bench_backend_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnknownBackend(f"{path}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything while it is imported
        del sys.modules[spec.name]
        raise UnknownBackend(f"{path}: importing it raised {_told(error)}") from error
    return module


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
