"""The code that a child interpreter runs: one zip of this checkout's reference, backends and what measures.

Named by its content, so that the same code is written once and a child cannot be given half of another.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import backends
import harness
import reference
from reference.cache import cache_folder

#: Of harness, only what a foreign interpreter can run.
HARNESS_FILES = (
    "__init__.py",
    "measure.py",
    "memory.py",
    "samples.py",
    "isolation/__init__.py",
    "isolation/frames.py",
    "isolation/placement.py",
    "isolation/worker.py",
)

#: What a child is started with: ``python -I -c BOOT ARCHIVE READ WRITE``.
BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True; "
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
    """The archive's path; written to the cache, or to the temporary folder where that is read-only."""
    content = {name: file.read_bytes() for name, file in shipped().items()}
    digest = hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()[:32]
    try:
        return _write(cache_folder() / "code", digest, content)
    except OSError:
        return _write(Path(tempfile.gettempdir()) / f"rwkv-bench-code-{os.getuid()}", digest, content)


def _write(folder: Path, digest: str, content: dict[str, bytes]) -> Path:
    target = folder / f"{digest}.zip"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{digest}.{os.getpid()}.part"
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    os.replace(part, target)
    return target
