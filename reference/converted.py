"""What a runtime wants instead of the user's checkpoint: written once, into the cache, keyed by content.

Two processes that want the same thing do not both make it, and one that is killed leaves nothing that
could be taken for it. The sizes of all its files are kept beside it and compared at every use: what was
truncated or lost since, or cached before sizes were kept, is made again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from reference.cache import cache_folder
from reference.checkpoint import save_checkpoint
from reference.errors import CheckpointError
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

    ``make`` gets a path that does not exist yet, in a folder that does. Raises :class:`CheckpointError`
    where the cache cannot be written, and what ``make`` raises.
    """
    target = cache_folder() / "converted" / f"{content_key(weights)[:32]}-{CONVERSION}" / name
    if _is_whole(target):
        return target
    with _locked(target):
        if not _is_whole(target):
            _sweep(target)
            part = target.with_name(f".{name}.{secrets.token_hex(4)}.part{target.suffix}")
            try:
                make(part)
                with _in_the_cache():
                    _put(part, target)
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
    with _lock_file(target) as lock:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_file(target: Path) -> TextIO:
    with _in_the_cache():
        target.parent.mkdir(parents=True, exist_ok=True)
        return open(target.with_name(f".{target.name}.lock"), "w")


@contextlib.contextmanager
def _in_the_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the cache {cache_folder()} cannot be written ({error.strerror or error});"
            " set RWKV_BENCH_CACHE to a folder that can"
        ) from None


def _put(part: Path, target: Path) -> None:
    """Rename ``part`` to ``target``, both it and its sizes on the disk before."""
    sizes: dict[str, int] = {}
    for name, file in _files(part):
        _sync(file)
        sizes[name] = file.lstat().st_size
    for folder in (part, *part.rglob("*")):
        if folder.is_dir():
            _sync(folder)
    listed = part.with_name(f"{part.name}.sizes")
    try:
        listed.write_text(json.dumps(sizes))
        _sync(listed)
        _remove(target)  # what is there is not whole, and a folder cannot be replaced
        os.replace(listed, _sizes_of(target))
        os.replace(part, target)
    finally:
        _remove(listed)
    _sync(target.parent)


def _is_whole(target: Path) -> bool:
    """Whether all files are there in the sizes that they were made in; others beside them are a runtime's own."""
    try:
        sizes = json.loads(_sizes_of(target).read_text())
        same = all((target / name).lstat().st_size == size for name, size in sizes.items())
        return same and target.is_dir() == ("." not in sizes)
    except (OSError, ValueError, AttributeError):  # absent, or no JSON object
        return False


def _sizes_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.sizes")


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder under its relative name; a file by itself is called ``.``."""
    if not path.is_dir():
        yield ".", path
        return
    for file in path.rglob("*"):
        if not file.is_dir():
            yield file.relative_to(path).as_posix(), file


def _sync(path: Path) -> None:
    """Onto the disk; folders where the system can."""
    if not path.is_dir():
        with open(path, "rb" if os.name == "posix" else "rb+") as file:
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove what killed conversions to the same target left."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.????????.part*"):
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
