"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from reference.errors import CheckpointError


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[BinaryIO]:
    """A file to write that replaces ``path`` when the block ends, and is removed when it fails.

    A symbolic link is followed. Raises :class:`CheckpointError` where the folder does not exist,
    ``path`` is something else than a file, or writing fails.
    """
    target = _target(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{path}: exists and is not a regular file; choose another name")
    part = _part(target)
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """A folder to fill that becomes ``path`` when the block ends, and is removed when it fails.

    Raises :class:`CheckpointError` where ``path`` exists and is not an empty folder: what is in it
    is never deleted.
    """
    target = _target(path)
    if os.path.exists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise CheckpointError(f"{path}: exists already; choose another name or remove it first")
    part = _part(target)
    try:
        os.mkdir(part)
        yield part
        if os.path.isdir(target):
            os.rmdir(target)  # renaming onto an empty folder is not portable
        os.rename(part, target)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _target(path: str) -> str:
    target = os.path.realpath(path)
    if not os.path.isdir(os.path.dirname(target)):
        raise CheckpointError(f"{path}: its folder does not exist; create {os.path.dirname(path) or target} first")
    return target


def _part(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name[:100]}.{secrets.token_hex(4)}.part")
