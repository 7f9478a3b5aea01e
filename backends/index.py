"""Backend name -> module, without importing any of them: built in, installed, or one file of the user's."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
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
}

#: Usable by name, never part of ``all``: they exist for the tests of the harness itself.
HIDDEN: dict[str, str] = {"faulty": "backends.faulty"}


class UnknownBackend(InputError):
    """No backend of that name, or a file that is not one; one line."""


def backend_names() -> list[str]:
    """What ``--backend all`` means: built-in and installed backends."""
    return [*BUILT_IN, *sorted(set(_installed()) - set(BUILT_IN))]


def load_backend(name: str) -> ModuleType:
    """The module of a backend: a name, an installed entry point, or a path to a ``.py`` file.

    Raises :class:`UnknownBackend`, with the nearest names, for anything else.
    """
    target = {**BUILT_IN, **HIDDEN}.get(name) or _installed().get(name)
    if name.endswith(".py"):
        module = _from_file(Path(name))
    elif target is not None:
        module = importlib.import_module(target.partition(":")[0])
    else:
        near = difflib.get_close_matches(name, backend_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownBackend(
            f"no backend {name!r}; {hint}backends: {', '.join(backend_names())}, or the path of a .py file"
        )
    if not isinstance(getattr(module, "INFO", None), BackendInfo) or not callable(getattr(module, "load", None)):
        raise UnknownBackend(
            f"{name}: a backend needs INFO (a backends.api.BackendInfo) and load(); see backends/api.py"
        )
    return module


def _installed() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=GROUP)}


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UnknownBackend(f"{path}: no such file; --backend takes a name or the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"rwkv_bench_backend_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnknownBackend(f"{path}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything while it is imported
        del sys.modules[spec.name]
        raise UnknownBackend(f"{path}: importing it raised {type(error).__name__}: {error}") from error
    return module
