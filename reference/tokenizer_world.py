"""The World tokenizer of RWKV-4 World models: at every byte, the longest token that matches.

Format and algorithm: BlinkDL's ``rwkv_tokenizer.py`` in the ``rwkv`` package. The vocabulary comes
as text (``rwkv_vocab_v20230424.txt``) or as the msgpack map that MLC-LLM and faster-rwkv keep
beside the weights (``tokenizer_model``); both hold ids 1 to 65529, and id 0 is end of text.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from reference.errors import InputError, TokenError
from reference.vocabulary import Vocabulary, utf8

TEXT_FILE = "rwkv_vocab_v20230424.txt"
MSGPACK_FILE = "tokenizer_model"

#: Words remembered with their ids, and the longest one worth remembering (bytes).
_MEMORY = 1 << 16
_WORD = 32

#: Bytes that begin a word, chosen for speed on prose and code; any choice gives the same ids.
_CUTS = b" \n.,()"


class WorldTokenizer(Vocabulary):
    """Greedy longest match over ``tokens`` (id -> bytes, without id 0). Takes any bytes.

    Id 0, end of text, has no bytes: it is never encoded and decodes to nothing.
    """

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        super().__init__("World", {0: b"", **tokens}, end_of_text=0)
        self._words = _Words(tokens)
        self._split = _word_pattern(tokens)

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of ``text``, a string as UTF-8; raises :class:`TokenError` if the vocabulary lacks a byte."""
        words = self._split.findall(utf8(text))
        return list(chain.from_iterable(map(self._words.__getitem__, words)))


class _Words(dict[bytes, "list[int]"]):
    """Word -> ids, found on first use; a text repeats its words, so most look-ups are one hash."""

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        super().__init__()
        self._ids = {token: i for i, token in tokens.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in tokens.values():
            if len(token) > 1:
                lengths.setdefault(token[:2], set()).add(len(token))
        # First two bytes -> the lengths worth trying, longest first.
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def __missing__(self, word: bytes) -> list[int]:
        ids = self._match(word)
        if len(word) <= _WORD:
            if len(self) >= _MEMORY:
                self.clear()
            self[word] = ids
        return ids

    def _match(self, data: bytes) -> list[int]:
        """Greedy longest match. A slice cut short by the end of ``data`` can only match all that is left."""
        ids, lengths, found = self._ids, self._lengths, []
        i = 0
        while i < len(data):
            for length in lengths.get(data[i : i + 2], ()):
                token = ids.get(data[i : i + length])
                if token is not None:
                    break
            else:
                length = 1
                token = ids.get(data[i : i + 1])
                if token is None:
                    raise TokenError(f"the World vocabulary has no token for byte 0x{data[i]:02x}; is its file whole?")
            found.append(token)
            i += length
        return found


def _word_pattern(tokens: Mapping[int, bytes]) -> re.Pattern[bytes]:
    """Cuts text before each byte of ``_CUTS`` where no token reaches across, so that words can be matched alone.

    Whether one may reach across is told by the byte before: in the real vocabulary, a space never
    follows anything but white space.
    """
    before: dict[int, set[int]] = {b: set() for b in _CUTS}
    for token in tokens.values():
        for i in range(1, len(token)):
            if token[i] in before:
                before[token[i]].add(token[i - 1])
    others = b"[^%s]*" % _escaped(_CUTS)
    joined = b"|".join(b"(?<=[%s])%s" % (_escaped(found), _escaped([b])) for b, found in before.items() if found)
    return re.compile(b"(?s:.)%s(?:(?:%s)%s)*" % (others, joined, others) if joined else b"(?s:.)" + others)


def _escaped(data: Iterable[int]) -> bytes:
    return b"".join(b"\\x%02x" % b for b in sorted(data))


def find_world_file(near: Path | None) -> Path:
    """The vocabulary beside the checkpoint (folder ``near``), else the one the ``rwkv`` package ships.

    The package is looked up, not imported: importing it pulls torch in.
    """
    folders = [near] if near else []
    spec = importlib.util.find_spec("rwkv")
    if spec is not None:
        folders += [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        for name in (MSGPACK_FILE, TEXT_FILE):
            if (folder / name).is_file():
                return folder / name
    where = f" in {near}" if near else " beside the checkpoint"
    raise InputError(f"the World vocabulary is missing; put {MSGPACK_FILE} or {TEXT_FILE}{where}, or pip install rwkv")


def load_world(path: Path) -> WorldTokenizer:
    """Read a World vocabulary, text or msgpack; raises :class:`InputError` saying what is wrong where."""
    data = path.read_bytes()
    tokens = read_text(data, str(path)) if data[:1].isdigit() else read_msgpack(data, str(path))
    if not tokens:
        raise InputError(f"{path}: the vocabulary is empty")
    if min(tokens) < 1:
        raise InputError(f"{path}: id {min(tokens)} is not a token of the World vocabulary, whose ids start at 1")
    if len(set(tokens.values())) != len(tokens) or b"" in tokens.values():
        raise InputError(f"{path}: a token is empty or there twice; this is not a World vocabulary")
    return WorldTokenizer(tokens)


_LINE = re.compile(r"([0-9]+) (.*) ([0-9]+)")


def read_text(data: bytes, source: str) -> dict[int, bytes]:
    """Lines ``id literal length``: a Python string or bytes literal and its length in bytes."""
    tokens: dict[int, bytes] = {}
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: byte {error.start} is not UTF-8; this is not {TEXT_FILE}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip("\r"))
        token = _literal(match.group(2)) if match else None
        if match is None or token is None or len(token) != int(match.group(3)):
            raise InputError(f"{source}:{number}: not 'id literal length' as in {TEXT_FILE}: {line[:40]!r}")
        if int(match.group(1)) in tokens:
            raise InputError(f"{source}:{number}: id {match.group(1)} is there twice")
        tokens[int(match.group(1))] = token
    return tokens


def _literal(text: str) -> bytes | None:
    try:
        value = ast.literal_eval(text)
        return value.encode("utf-8") if isinstance(value, str) else value if isinstance(value, bytes) else None
    except (ValueError, SyntaxError):
        return None


#: First byte of a msgpack value -> bytes of the number after it: an id, or the length of a string or binary.
_UINT = {0xCC: 1, 0xCD: 2, 0xCE: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_MAP = {0xDE: 2, 0xDF: 4}


def read_msgpack(data: bytes, source: str) -> dict[int, bytes]:
    """A msgpack map {id: raw bytes} and nothing else; a longer count than the file holds allocates nothing.

    Format: https://github.com/msgpack/msgpack/blob/master/spec.md
    """
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        if at + n > len(data):
            raise InputError(f"{source}: ends at byte {len(data)}, inside the vocabulary; the file is cut short")
        at += n
        return data[at - n : at]

    def number(sizes: dict[int, int], short: int, mask: int, what: str) -> int:
        """The number that starts here; ``short`` is the prefix of its one-byte form, ``mask`` that form's bits."""
        first = take(1)[0]
        if first & ~mask & 0xFF == short:
            return first & mask
        if first not in sizes:
            raise InputError(f"{source}: byte 0x{first:02x} at {at - 1} is not {what}; is this a {MSGPACK_FILE} file?")
        return int.from_bytes(take(sizes[first]), "big")

    tokens: dict[int, bytes] = {}
    for _ in range(number(_MAP, 0x80, 0x0F, "a msgpack map")):
        token = number(_UINT, 0x00, 0x7F, "a token id")
        if token in tokens:
            raise InputError(f"{source}: id {token} is there twice")
        tokens[token] = take(number(_BYTES, 0xA0, 0x1F, "a string"))
    if at != len(data):
        raise InputError(f"{source}: {len(data) - at} bytes after the vocabulary; is this a {MSGPACK_FILE} file?")
    return tokens
