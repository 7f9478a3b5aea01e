"""Start the worker of a backend: which interpreter, which environment variables, which model file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from backends.api import Unavailable
from harness.isolation.archive import BOOT, PATHS, code_archive
from harness.isolation.child import Child, ChildDied
from harness.isolation.environments import Environment, find
from harness.isolation.remote import Line
from harness.isolation.requirements import Requirements, declared
from reference.cache import cache_folder
from reference.checkpoint import save_checkpoint
from reference.weights import Weights

#: Variables by which thread pools that are built at import are told their size.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

#: File names are read there as they are here.
_UTF8 = ("-X", f"utf8={int(sys.getfilesystemencoding() == 'utf-8')}")

#: Nothing is fetched while a backend runs.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def requirements(backend: ModuleType) -> Requirements | None:
    """The environment that a backend's file declares; ``None`` if it runs in ours."""
    # An object that a package offers as its backend is of the module that defines it.
    module: Any = backend if hasattr(backend, "__file__") else sys.modules.get(getattr(backend, "__module__", ""))
    file = getattr(module, "__file__", None)
    return None if file is None or not os.path.isfile(file) else declared(Path(file))


def environment(name: str, backend: ModuleType) -> Environment | None:
    """The built environment of a backend, ``None`` if it runs in ours; raises Unavailable if it is not built."""
    wanted = requirements(backend)
    return None if wanted is None else find(name, wanted)


def start(name: str, backend: ModuleType, threads: int | None = None, timeout: float | None = None) -> Line:
    """A worker for a backend, in its environment, with nothing loaded. Raises Unavailable, ChildDied, ChildTimedOut."""
    found = environment(name, backend)
    python = sys.executable if found is None else os.fspath(found.python)
    told = variables(threads)
    if found is None:
        # What is importable here is so there: -I leaves out what PYTHONPATH and the user's own folder have.
        told[PATHS] = json.dumps([os.path.abspath(path) for path in sys.path])
    command = [python, *_UTF8, "-I", "-c", BOOT, os.fspath(code_archive())]
    if found is None:
        return _started(command, told, timeout)
    try:
        return _started(command, told, timeout)
    except (ChildDied, OSError) as error:
        cure = f"delete {found.python.parents[1]} and run rwkv-bench setup {name}"
        raise Unavailable(f"{name}: its environment does not start: {error}", cure) from None


def _started(command: Sequence[str], environment: Mapping[str, str], timeout: float | None) -> Line:
    child = Child(command, environment, timeout)
    try:
        return Line(child)
    except BaseException:
        child.kill()
        raise


def variables(threads: int | None) -> dict[str, str]:
    """Environment variables of a worker on this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, **our_variables(threads), "RWKV_BENCH_CACHE": os.fspath(cache_folder().absolute())}


def our_variables(threads: int | None) -> dict[str, str]:
    """What every worker is told, wherever it runs."""
    pools = {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    return {**_OFFLINE, **pools, "RWKV_BENCH_ISOLATED": "1"}


def model_at(weights: Weights, seed: int | None, name: str, folder: Path) -> Mapping[str, Any]:
    """How a worker gets the weights: made there, opened from the same file, or from a copy in ``folder``."""
    if seed is not None and weights.synthetic and weights.key:
        return {"preset": name, "seed": seed, "key": weights.key}
    if weights.key and os.path.exists(weights.source):
        return {"path": os.path.abspath(weights.source), "key": weights.key}
    path = folder / "model.safetensors"
    save_checkpoint(weights, path, "safetensors")
    return {"path": os.fspath(path), "key": weights.key}
