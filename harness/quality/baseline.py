"""The reference's log-probabilities over a passage: what everything else is compared with.

Computed in float64 call by call, kept as float32, so that neither the vocabulary nor the passage decides how much
memory is taken. Rounding to float32 moves a log-probability l by at most 2^-24 |l|. Near zero that moves a
divergence by less than 2e-12 nat (|l| up to 32); elsewhere by its first order, at most 2^-24 sum P (|l| + E|l|) |d|
with d the difference of log-probabilities: up to 9e-9 at a divergence of 0.01, a millionth of it. Cached by content
in one file, written as it is computed and whole or not at all. The files together are held to CACHE_BYTES: those
that were not used for longest go first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import reference
from harness.budget import hold
from harness.compare import log_softmax
from harness.hardware import SMALL_PARAMETERS
from harness.quality.passage import Passage
from reference.cache import cache_folder
from reference.config import count_parameters
from reference.forward import forward
from reference.schemes import apply
from reference.weights import Weights

#: A call holds this many positions, or fewer where the vocabulary is large.
MOST_POSITIONS = 256
_CALL_ELEMENTS = 1 << 22

#: Elements of one float64 array that is worked on at a time.
WORK_ELEMENTS = 1 << 20

#: Files of the fp32 weights may be this large; those of a scheme, which are many, this.
FP32_BYTES, SCHEME_BYTES = 4 << 30, 64 << 20

#: All files together; a new one makes room for itself.
CACHE_BYTES = 8 << 30

#: A file that is still being written after so many seconds was left by a process that was killed.
_LEFT_SECONDS = 24 * 3600


def call_length(n_vocab: int) -> int:
    """Positions of one call, whoever makes it."""
    return max(1, min(MOST_POSITIONS, _CALL_ELEMENTS // n_vocab))


def log_probabilities(weights: Weights, scheme: str, passage: Passage, key: str | None) -> Iterator[np.ndarray]:
    """Float32 ``(positions, n_vocab)`` for every call of ``passage.calls(call_length(n_vocab))``, in order.

    key  content hash of ``weights``; ``None``: not cached

    Only one array is alive at a time. What is not finite is passed on as it is.
    """
    n_vocab = weights.config.n_vocab
    path = _path(key, scheme, passage) if key else None
    known = _cached(path, (len(passage), n_vocab)) if path is not None else None
    if known is not None:
        for call in passage.calls(call_length(n_vocab)):
            yield known[call.start : call.stop]
        return
    most = FP32_BYTES if scheme == "fp32" else SCHEME_BYTES
    with _Writer(path if 4 * len(passage) * n_vocab <= most else None, (len(passage), n_vocab)) as writer:
        for rows in _computed(weights, scheme, passage):
            writer.write(rows)  # before it is handed on: nobody need ask for what comes after the last
            yield rows


def _computed(weights: Weights, scheme: str, passage: Passage) -> Iterator[np.ndarray]:
    small = count_parameters(weights.config) < SMALL_PARAMETERS
    state: np.ndarray | None = None
    stored = hold(apply(weights, scheme))
    for call in passage.calls(call_length(weights.config.n_vocab)):
        with threadpool_limits(1 if small else None, user_api="blas"):
            past = None if call.fresh else state
            logits, state = forward(
                stored, passage.ids[call.start : call.stop], past, all_logits=True, dtype=np.float64
            )
        rows = _normalised(logits)
        del logits  # twice as large as what is handed on, and not needed while that is used
        yield rows


def _normalised(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities ``(positions, n_vocab)`` in float32, a few rows at a time in float64."""
    out = np.empty(logits.shape, np.float32)
    step = max(1, WORK_ELEMENTS // logits.shape[-1])
    for a in range(0, len(logits), step):
        out[a : a + step] = log_softmax(logits[a : a + step])
    return out


class _Writer:
    """A ``.npy`` file that appears once all rows are in it; a disk that is full or read-only is done without."""

    def __init__(self, path: Path | None, shape: tuple[int, int]) -> None:
        self._path, self._file, self._part = path, None, ""
        self._left = shape[0]
        if path is None:
            return
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            if 4 * shape[0] * shape[1] > shutil.disk_usage(path.parent).free // 4:
                return
            make_room(path.parent, 4 * shape[0] * shape[1])
            file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False)  # noqa: SIM115
            self._file, self._part = file, file.name
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)

    def __enter__(self) -> _Writer:
        return self

    def write(self, rows: np.ndarray) -> None:
        """The next positions; with the last of them the file is there."""
        if self._file is None or self._path is None:
            return
        self._left -= len(rows)
        try:
            self._file.write(np.ascontiguousarray(rows, "<f4").data)
            if self._left == 0:
                self._file.close()
                os.replace(self._part, self._path)
                self._file = None
        except OSError:
            self._drop()

    def __exit__(self, *_: object) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(self._part)


def _cached(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """A file of before, mapped; ``None`` for none, another shape, or a content that is no probabilities."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if found.shape != shape or found.dtype != np.float32:
        return None
    for start in range(0, len(found), 64):
        total = np.exp(found[start : start + 64].astype(np.float64)).sum(axis=-1)
        if not np.all(np.abs(total - 1) < 1e-4):
            return None
    with suppress(OSError):
        os.utime(path)  # used now: the last to go
    return np.asarray(found)


def make_room(folder: Path, wanted: int) -> None:
    """Remove files that were not used for longest until ``wanted`` bytes more are within CACHE_BYTES.

    A file that another process has mapped stays readable to it. What cannot be removed stays.
    """
    known = sorted((found for file in folder.glob("*.npy") if (found := _age_and_size(file))), key=lambda one: one[0])
    total = sum(size for _, size, _ in known)
    for _, size, file in known:
        if total + wanted <= CACHE_BYTES:
            return
        with suppress(OSError):
            file.unlink()
            total -= size


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for part in folder.glob("*.part"):
        found = _age_and_size(part)
        if found is not None and time.time() - found[0] > _LEFT_SECONDS:
            with suppress(OSError):
                part.unlink()


def _age_and_size(file: Path) -> tuple[float, int, Path] | None:
    """When it was last used, in seconds, and its bytes; ``None`` where it has gone meanwhile."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime, about.st_size, file


def _path(key: str, scheme: str, passage: Passage) -> Path:
    text = repr((key, scheme, passage.sha256, _source(), np.__version__))
    return cache_folder() / "quality" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"


@lru_cache(maxsize=1)
def _source() -> str:
    """Hash of the code that computes: what other code has computed is not ours."""
    digest = hashlib.sha256()
    for file in [*sorted(Path(reference.__file__).parent.glob("*.py")), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
