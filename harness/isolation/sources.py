"""Where a worker gets what it is to run: a backend's module, a model's weights.

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from backends.api import Session, Unavailable, Unsupported
from reference.checkpoint import load_checkpoint
from reference.synthetic import synthetic
from reference.weights import Weights


def optional(module: ModuleType, name: str, *arguments: Any) -> Any:
    """What an optional function of a backend module returns; ``None`` where there is none."""
    function = getattr(module, name, None)
    return None if function is None else function(*arguments)


def loaded(
    module: ModuleType,
    weights: Weights,
    scheme: str,
    device: str,
    threads: int | None,
    change: Mapping[str, Any] | None = None,
) -> Session:
    """What ``load`` of a backend module returns, or ``adjust`` for a change of arithmetic; raises Unsupported."""
    if not change:
        session: Session = module.load(weights, scheme, device, threads)
        return session
    if not hasattr(module, "adjust"):
        raise Unsupported(f"{module.INFO.name} has no adjust(): its arithmetic cannot be changed")
    adjusted: Session = module.adjust(weights, scheme, device, threads, change)
    return adjusted


def backend_of(named: Mapping[str, str]) -> ModuleType:
    """``{"module": dotted name, or that and :object}``, ``{"file": path}`` or ``{"source", "name"}``."""
    if "module" in named:
        dotted, _, inside = named["module"].partition(":")
        found: Any = importlib.import_module(dotted)
        for name in filter(None, inside.split(".")):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]
    path = named["file"] if "file" in named else _written(named["name"], named["source"])
    spec = importlib.util.spec_from_file_location(f"rwkv_bench_backend_{os.path.basename(path)[:-3]}", path)
    if spec is None or spec.loader is None:
        raise Unavailable(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _written(name: str, source: str) -> str:
    """A file with that content, in the temporary folder that goes with this process."""
    path = os.path.join(tempfile.mkdtemp(), name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(source)
    return path


def weights_of(model: Mapping[str, Any]) -> Weights:
    """``{"preset", "seed"}`` or ``{"path"}``, and ``key``, the content's hash."""
    found = synthetic(model["preset"], model["seed"]) if "preset" in model else _opened(model["path"])
    return replace(found, key=model["key"])


def _opened(path: str) -> Weights:
    return load_checkpoint(path, scan=False)  # the near side has looked for NaN
