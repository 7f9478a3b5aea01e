"""Which token ids quality is measured on: segments spread over a text, each read from the initial state.

One run of neighbouring positions says little of the rest of a text, whose parts differ; segments from all over
it do (docs/quality.md). The state starts afresh in each, so that any backend reads the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.models import EMBEDDED, Model
from reference.errors import InputError
from reference.tokenizer import Tokenizer, load_tokenizer

#: The text that stands where no ``--text`` is given: what the embedded model was not trained on.
HELD_OUT = EMBEDDED / "heldout.txt"

#: Bytes of text read at first for each token wanted; more where that does not do.
_BYTES_PER_TOKEN = 16

#: How far a segment's beginning is moved to stand behind a space or a line break.
_WORD = 64


class Call(NamedTuple):
    """Positions ``start`` to ``stop`` as one call; ``fresh``: from the initial state."""

    start: int
    stop: int
    fresh: bool


@dataclass(frozen=True)
class Passage:
    """Token ids and, for each, the one that follows in the text.

    ids, following  ``(n,)``; position t is to predict ``following[t]``
    n_bytes         ``(n,)`` bytes of what is predicted; ``None``: ids that stand for no text
    context         the state starts afresh every so many positions; 0: only at the first
    spacing         from one segment's beginning to the next in the text, in lengths of a segment; Inf: of no text
    """

    name: str
    ids: np.ndarray
    following: np.ndarray
    n_bytes: np.ndarray | None
    context: int
    spacing: float = math.inf

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Hash of all that a result depends on, the name of the text apart."""
        digest = hashlib.sha256(f"{self.context}".encode())
        for array in (self.ids, self.following):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def calls(self, most: int) -> Iterator[Call]:
        """The passage in calls of at most ``most`` positions, none across the end of a segment."""
        n, segment = len(self), self.context or len(self)
        for first in range(0, n, segment):
            end = min(n, first + segment)
            for start in range(first, end, most):
                yield Call(start, min(end, start + most), start == first)


def passage_of(
    model: Model, text: str | None, tokens: int, context: int, tokenizer: str | None = None, seed: int = 0
) -> Passage:
    """``tokens`` positions of a text file, or of the held-out text; of random ids for synthetic weights.

    Rounded down to whole segments; fewer where the text is short. Raises InputError for a text that cannot be
    read, is empty or too short, holds what the vocabulary lacks, and for a model whose tokenizer is not at
    hand.
    """
    if text is None and model.weights.synthetic:
        whole = whole_segments(tokens, context)
        drawn = np.random.default_rng(seed).integers(0, model.config.n_vocab, whole + 1)
        return Passage(f"random ids, seed {seed}", drawn[:-1], drawn[1:], None, context)
    path = Path(text) if text is not None else HELD_OUT
    found = load_tokenizer(tokenizer) if tokenizer else model.tokenizer()
    data = _bytes_of(path)
    segments = [_followed(data, path, tokens, found)] if not context else _segments(data, path, tokens, context, found)
    ids, following = (np.concatenate(part) for part in zip(*segments, strict=True))
    check_ids(np.concatenate([ids, following]), model, path)
    n_bytes = np.array([len(found.decode_bytes([int(token)])) for token in following])
    bytes_apart = len(data) / len(segments)
    spacing = max(1.0, bytes_apart / (float(n_bytes.sum()) / len(segments)))
    return Passage(path.name, ids, following, n_bytes, context, spacing)


def whole_segments(tokens: int, context: int) -> int:
    """The positions that are used of those asked for: whole segments, at least two."""
    return max(2, tokens // context) * context if context else tokens


def check_ids(ids: Sequence[int] | np.ndarray, model: Model, path: Path) -> None:
    """Raise InputError for an id that the model does not have."""
    largest = int(np.max(ids))
    if largest >= model.config.n_vocab:
        raise InputError(
            f"{path}: token {largest} is outside the vocabulary of {model.name}, {model.config.n_vocab}; "
            "does the tokenizer belong to this model? --tokenizer names another"
        )


def _bytes_of(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; --text takes a file of plain text") from None
    if not data.strip():
        raise InputError(f"{path}: is empty; --text takes a file of plain text")
    return data


_Pair = tuple[np.ndarray, np.ndarray]


def _followed(data: bytes, path: Path, tokens: int, tokenizer: Tokenizer) -> _Pair:
    """The beginning of a text: at most ``tokens`` ids and those that follow them."""
    found = np.array(_beginning(data, 0, tokens + 1, path, tokenizer))
    _check_length(len(found) - 1, 32, path, "")
    return found[:-1], found[1:]


def _beginning(data: bytes, start: int, count: int, path: Path, tokenizer: Tokenizer) -> list[int]:
    """The first ``count`` ids from byte ``start`` on; fewer only where the text ends."""
    length = _BYTES_PER_TOKEN * count
    while True:
        end = _character(data, start + length)
        ids = _encode(tokenizer, data[start:end], path)
        # The last ids of a text that was cut are not those of the whole one.
        sure = len(ids) if end == len(data) else len(ids) - _WORD
        if sure >= count or end == len(data):
            return ids[:count]
        length *= 4


def _segments(data: bytes, path: Path, tokens: int, context: int, tokenizer: Tokenizer) -> list[_Pair]:
    """Segments of ``context`` positions whose beginnings are spread evenly over the text and do not overlap."""
    wanted = whole_segments(tokens, context) // context
    found: list[_Pair] = []
    end = 0
    for i in range(wanted):
        start = max(end, _word(data, len(data) * i // wanted))
        ids = _beginning(data, start, context + 1, path, tokenizer)
        if len(ids) <= context:  # the text ends here
            break
        end = start + len(tokenizer.decode_bytes(ids))
        found.append((np.array(ids[:-1]), np.array(ids[1:])))
    _check_length(context * len(found), 2 * context, path, f" in segments of {context}; --context takes shorter ones")
    return found


def _check_length(positions: int, least: int, path: Path, how: str) -> None:
    if positions < least:
        raise InputError(f"{path}: too short, {max(0, positions)} positions; at least {least} are needed{how}")


def _encode(tokenizer: Tokenizer, data: bytes, path: Path) -> list[int]:
    try:
        return tokenizer.encode(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _word(data: bytes, start: int) -> int:
    """The beginning of the first word from ``start`` on, if there is one near; else of the next character."""
    if start == 0:
        return 0
    for space in (b"\n", b" "):
        at = data.find(space, start - 1, start + _WORD)
        if at >= 0:
            return at + 1
    return _character(data, start)


def _character(data: bytes, at: int) -> int:
    """The first beginning of a UTF-8 character from ``at`` on."""
    at = min(at, len(data))
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at
