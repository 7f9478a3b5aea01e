"""From weights to a library and its params folder, once, in the cache or where the user wants it.

The compiler runs in a process of its own: it is not loaded where a model is timed, and a process that holds
TVM's runtime alone cannot load it any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from backends.api import Unsupported
from backends.tvm_mlc import params
from backends.tvm_mlc.storage import arrays
from reference.cache import cache_folder
from reference.config import Config
from reference.converted import derived
from reference.weights import Weights

#: Files of this package that neither a library nor its params come from.
_RUN_TIME = ("__init__.py", "arena.py", "instrument.py", "mlc_library.py", "native.py", "session.py", "states.py")

#: Files of ``reference`` that they come from besides.
_CODECS = ("codecs_mlc.py", "mlc_params.py")

#: What the compiler said of a library, beside it in the cache.
_TOLD = "told.json"

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from backends.tvm_mlc.compile import main; main(json.loads(sys.argv[2]))"
)


def exported(checkpoint: Weights, scheme: str, rescale_every: int = 0) -> Path:
    """Folder of the library and ``params`` for this machine's CPU."""
    name = f"tvm-{_library_name(scheme, 'llvm', rescale_every)}"
    return derived(checkpoint, name, lambda folder: _export(checkpoint, scheme, folder, rescale_every))


def _export(checkpoint: Weights, scheme: str, folder: Path, rescale_every: int) -> None:
    folder.mkdir()
    export(checkpoint, scheme, "llvm", folder, rescale_every)


def export(
    checkpoint: Weights, scheme: str, target: str, folder: Path, rescale_every: int = 0, cached: bool = True
) -> dict[str, Any]:
    """Fill ``folder``, which is empty; what :func:`backends.tvm_mlc.artefacts.write` tells of the library.

    Raises :class:`backends.api.Unsupported` for a target that the installed TVM generates no code for.
    """
    library, told = _library(checkpoint.config, scheme, target, rescale_every, cached)
    for file in library.iterdir():
        if file.name != _TOLD:
            shutil.copyfile(file, folder / file.name)
    if not cached:
        shutil.rmtree(library)
    (folder / "params").mkdir()
    chat = params.chat_config(checkpoint, scheme)
    params.write(folder / "params", arrays(checkpoint, scheme, rescale_every), chat, checkpoint.source)
    return told


def _library(config: Config, scheme: str, target: str, rescale_every: int, cached: bool) -> tuple[Path, dict[str, Any]]:
    """Folder of a library, which all weights of its shape share; a new one, the caller's, if not ``cached``."""
    sizes = [config.n_layer, config.n_embd, config.n_ffn, config.n_vocab]
    root = cache_folder() / "tvm"
    root.mkdir(parents=True, exist_ok=True)
    kept = root / f"{'-'.join(map(str, sizes))}-{_library_name(scheme, target, rescale_every)}"
    if cached and kept.exists():
        return kept, json.loads((kept / _TOLD).read_text())
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        told = _compile({"sizes": sizes, "scheme": scheme, "target": target, "rescale_every": rescale_every}, made)
        (made / _TOLD).write_text(json.dumps(told))
        if not cached:
            return made, told
        with contextlib.suppress(OSError):  # another process was faster, with the same
            made.rename(kept)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    shutil.rmtree(made, ignore_errors=True)
    return kept, told


def _compile(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    request = json.dumps({**asked, "folder": str(folder)})
    command = [sys.executable, "-c", _BOOT, json.dumps([path for path in sys.path if path]), request]
    done = subprocess.run(command, capture_output=True, env=_environment(), check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"TVM's compiler ended with {done.returncode}: {''.join(last)[:300]}")
    told: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    if "unsupported" in told:
        raise Unsupported(told["unsupported"])
    return told


def _library_name(scheme: str, target: str, rescale_every: int) -> str:
    rescaled = f"-rescale{rescale_every}" if rescale_every else ""
    return f"{scheme}-{target}{rescaled}-{_cpu()}-{version('apache-tvm')}-{generator()}"


@cache
def generator() -> str:
    """Hash of the code that generates libraries and params: what other code has made is not taken from the cache."""
    digest = hashlib.sha256()
    for package, wanted in (("backends.tvm_mlc", None), ("reference", _CODECS)):
        for file in sorted(files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py") and (file.name in wanted if wanted else file.name not in _RUN_TIME):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TVM_USE_RUNTIME_LIB"}


def _cpu() -> str:
    """Names the instructions this machine's CPU has, since code for another's may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
