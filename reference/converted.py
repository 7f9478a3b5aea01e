"""What a runtime wants instead of the user's checkpoint: written once, into the cache, keyed by content.

Two processes that want the same thing do not both make it, and one that is killed leaves nothing that
could be taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from reference.cache import cache_folder
from reference.checkpoint import save_checkpoint
from reference.tensor_file import release
from reference.weights import Weights

try:
    import fcntl
except ImportError:  # a system without it: two processes may then both convert, and the last one's file stays
    fcntl = None  # type: ignore[assignment]

#: Raise it when a writer writes something else than before: what older versions cached is then left alone.
CONVERSION = 1


def converted(weights: Weights, format: str, scheme: str | None = None) -> Path:
    """The checkpoint as ``format`` in ``scheme`` (:func:`reference.save_checkpoint`), a file or a folder."""
    return derived(weights, f"{format}-{scheme or 'asis'}", lambda path: save_checkpoint(weights, path, format, scheme))


def derived(weights: Weights, name: str, make: Callable[[Path], None]) -> Path:
    """A file or folder that ``make(path)`` writes from ``weights``; ``name`` says which one, ending included.

    ``make`` gets a path that does not exist yet, in a folder that does.
    """
    target = cache_folder() / "converted" / f"{content_key(weights)[:32]}-{CONVERSION}" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if not target.exists():
            _sweep(target)
            part = target.with_name(f".{name}.{secrets.token_hex(4)}.part{target.suffix}")
            try:
                make(part)
                os.replace(part, target)
            finally:
                _remove(part)
    return target


def content_key(weights: Weights) -> str:
    """``weights.key`` where it is known, else a hash over every tensor."""
    if weights.key:
        return weights.key
    digest = hashlib.sha256(repr(weights.config).encode())
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.stored} {tensor.shape}".encode())
        digest.update(tensor.read().tobytes())
        release(tensor)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(target: Path) -> None:
    """Remove what killed conversions to the same target left."""
    for part in target.parent.glob(f".{target.name}.*.part*"):
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
