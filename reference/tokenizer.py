"""Text -> token ids -> text, by the vocabulary of the model.

Three vocabularies exist among RWKV-4 models: the Pile's (``20B_tokenizer.json``), World's
(``tokenizer_model`` or ``rwkv_vocab_v20230424.txt``), and plain bytes (the embedded model).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from reference.errors import InputError
from reference.tokenizer_pile import FILES as PILE_FILES
from reference.tokenizer_pile import PileTokenizer, find_pile_file
from reference.tokenizer_world import MSGPACK_FILE, TEXT_FILE, WorldTokenizer, find_world_file, load_world
from reference.vocabulary import TextStream, Vocabulary, utf8

__all__ = [
    "ByteTokenizer",
    "PileTokenizer",
    "TextStream",
    "Tokenizer",
    "WorldTokenizer",
    "load_tokenizer",
    "tokenizer_for",
]

#: Sizes of model vocabularies, which are rounded up from those of the tokenizers.
BYTE_VOCAB = 256
PILE_VOCABS = range(50254, 50304 + 1)
WORLD_VOCABS = range(65529, 65536 + 1)


class Tokenizer(Protocol):
    """What every tokenizer does. ``end_of_text`` is the id between documents, ``None`` where there is none."""

    name: str
    n_vocab: int
    end_of_text: int | None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text; bytes are taken as UTF-8 where the vocabulary needs text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, with U+FFFD for what is not UTF-8; raises TokenError for an unknown id."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, exactly."""

    def stream(self) -> TextStream:
        """A decoder with ``feed(id) -> str`` and ``flush() -> str`` that never splits a character."""


class ByteTokenizer(Vocabulary):
    """Every byte is its own id: the vocabulary of the embedded model."""

    def __init__(self) -> None:
        super().__init__("byte", {i: bytes([i]) for i in range(BYTE_VOCAB)}, end_of_text=None)

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of ``text``, a string as UTF-8."""
        return list(utf8(text))


#: Kind -> loader that looks for its file beside a checkpoint.
_KINDS: dict[str, Callable[[Path | None], Tokenizer]] = {
    "bytes": lambda near: ByteTokenizer(),
    "world": lambda near: load_world(find_world_file(near)),
    "pile": lambda near: PileTokenizer(find_pile_file(near)),
}


def load_tokenizer(kind_or_path: str | os.PathLike[str], near: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A tokenizer by kind (``bytes``, ``world``, ``pile``), or from a vocabulary file or a folder with one.

    ``near`` is the checkpoint or its folder, where a kind's file is looked for. World's is also
    found in an installed ``rwkv`` package. Raises :class:`InputError` if there is no such file.
    """
    name = os.fspath(kind_or_path)
    if name in _KINDS:
        return _KINDS[name](_folder(near))
    path = Path(name)
    if path.is_dir():
        return _load_file(_vocabulary_in(path))
    if path.is_file():
        return _load_file(path)
    guess = difflib.get_close_matches(name.lower(), _KINDS, n=1, cutoff=0.5)
    hint = f"did you mean {guess[0]!r}? " if guess else ""
    raise InputError(f"no tokenizer {name!r}; {hint}give {', '.join(_KINDS)}, or the path of a vocabulary file")


def tokenizer_for(n_vocab: int, folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a model by the size of its vocabulary; its file is looked for in ``folder``.

    256: bytes; 50254 to 50304: Pile; 65529 to 65536: World. Raises :class:`InputError` for any
    other size, and for a missing file, naming it.
    """
    for kind, sizes in (("bytes", (BYTE_VOCAB,)), ("pile", PILE_VOCABS), ("world", WORLD_VOCABS)):
        if n_vocab in sizes:
            return load_tokenizer(kind, folder)
    raise InputError(
        f"no tokenizer for a vocabulary of {n_vocab}; known: {BYTE_VOCAB} (bytes), {PILE_VOCABS[0]} to "
        f"{PILE_VOCABS[-1]} (Pile), {WORLD_VOCABS[0]} to {WORLD_VOCABS[-1]} (World); give token ids instead"
    )


def _folder(near: str | os.PathLike[str] | None) -> Path | None:
    if near is None:
        return None
    path = Path(near)
    return path.parent if path.is_file() else path


def _vocabulary_in(folder: Path) -> Path:
    names = (MSGPACK_FILE, TEXT_FILE, *PILE_FILES)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"no vocabulary in {folder}; put one of {', '.join(names)} there")


def _load_file(path: Path) -> Tokenizer:
    """World or Pile by the first byte: JSON opens with a brace, a msgpack map with 0x80-0x8f, 0xde or 0xdf."""
    with path.open("rb") as file:
        first = file.read(1)
    if first == b"{":
        return PileTokenizer(path)
    if first.isdigit() or first >= b"\x80":
        return load_world(path)
    raise InputError(f"{path}: not a vocabulary; one of {MSGPACK_FILE}, {TEXT_FILE}, {PILE_FILES[0]} is needed")
