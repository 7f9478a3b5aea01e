"""The code that a child interpreter runs: one zip of this checkout's reference, backends and what measures.

Named by its content, so that the same code is written once and a child cannot be given half of another.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import secrets
import shutil
import tempfile
import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import backends
import harness
import reference
from reference.cache import cache_folder

#: Of harness, only what a foreign interpreter can run.
HARNESS_FILES = (
    *("__init__.py", "hardware.py", "logits_watch.py", "measure.py", "memory.py", "names.py", "noise.py"),
    *("noise_gpu.py", "samples.py", "turns.py", "batch.py", "cuda_order.py"),
    *("machine/__init__.py", "machine/cpu.py", "machine/gpu.py", "machine/limits.py", "machine/facts.py"),
    "machine/work.py",
    *("isolation/__init__.py", "isolation/frames.py", "isolation/placement.py", "isolation/sources.py"),
    "isolation/worker.py",
    # What the far end of an ssh connection needs besides.
    *("isolation/archive.py", "isolation/child.py", "isolation/environments.py", "isolation/far.py"),
    "isolation/tail.py",
    *("isolation/leftovers.py", "isolation/lifeline.py", "isolation/requirements.py", "isolation/spawn.py"),
)

#: Environment variable with more folders to import from, as JSON.
PATHS = "RWKV_BENCH_PATHS"

#: What a child is started with: ``python -I -c BOOT ARCHIVE READ WRITE``.
BOOT = (
    "import json, os, sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True; "
    f"sys.path += json.loads(os.environ.pop('{PATHS}', '[]')); "
    "from harness.isolation.worker import main; main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)


def shipped() -> dict[str, Path]:
    """Name in the archive -> file."""
    found = {}
    for package in (reference, backends):
        root = Path(str(package.__file__)).parent
        found.update({f"{root.name}/{file.relative_to(root).as_posix()}": file for file in sorted(root.rglob("*.py"))})
    root = Path(str(harness.__file__)).parent
    found.update({f"harness/{name}": root / name for name in HARNESS_FILES})
    return found


@lru_cache(maxsize=1)
def code_archive() -> Path:
    """The archive's path; written to the cache, or where that cannot be to a folder that ends with this process."""
    data = _packed()
    digest = hashlib.sha256(data).hexdigest()[:32]
    try:
        return _write(cache_folder() / "code", digest, data)
    except OSError:
        # Not under a name that others can foresee: what lies there is run.
        folder = Path(tempfile.mkdtemp(prefix="rwkv-bench-code-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return _write(folder, digest, data)


def _packed() -> bytes:
    """The archive's bytes, the same for the same code."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(shipped().items()):
            # One date for all, the earliest there is in a zip.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _write(folder: Path, digest: str, data: bytes) -> Path:
    target = folder / f"{digest}.zip"
    with suppress(OSError):
        if target.read_bytes() == data:  # and not what a full disk or a power failure left of it
            return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{digest}.{secrets.token_hex(4)}.part"
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target
