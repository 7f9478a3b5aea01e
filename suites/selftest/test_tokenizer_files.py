"""Choosing a tokenizer, reading its file, and every error on the way."""

from __future__ import annotations

import builtins
import contextlib
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.errors import InputError, TokenError
from reference.tokenizer import ByteTokenizer, PileTokenizer, WorldTokenizer, load_tokenizer, tokenizer_for
from reference.tokenizer_world import MSGPACK_FILE, TEXT_FILE, find_world_file, load_world, read_msgpack, read_text
from suites.selftest.vocabularies import small_pile_file, world_vocabulary


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    return world_vocabulary()


@pytest.fixture(scope="module")
def pile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pile_file(tmp_path_factory.mktemp("pile"))


@pytest.fixture(scope="module")
def pile(pile_file: Path) -> PileTokenizer:
    return PileTokenizer(pile_file)


# --- choosing ----------------------------------------------------------------------------------------------------


def write_text(path: Path, tokens: dict[int, bytes]) -> Path:
    path.write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in tokens.items()), encoding="utf-8")
    return path


def packed(tokens: dict[int, bytes]) -> bytes:
    """Msgpack with every form in turn of an id, of a string and of a binary that can hold it."""
    parts = [b"\xdf" + struct.pack(">I", len(tokens))]
    for n, (i, token) in enumerate(tokens.items()):
        ids = [b"\xce" + struct.pack(">I", i), b"\xcd" + struct.pack(">H", i)]
        ids += [b"\xcc" + bytes([i])] if i < 256 else []
        ids += [bytes([i])] if i < 128 else []
        lengths = [b"\xc5" + struct.pack(">H", len(token)), b"\xdb" + struct.pack(">I", len(token))]
        lengths += [bytes([kind, len(token)]) for kind in (0xC4, 0xD9)]
        lengths += [bytes([0xA0 | len(token)])] if len(token) < 32 else []
        parts += [ids[n % len(ids)], lengths[n % len(lengths)], token]
    return b"".join(parts)


SMALL = {1: b"a", 2: b" ", 3: b"a b", 4: b"b", 300: b" b" * 20, 5: b"\xff", 6: "é".encode(), 7: b"\\'\""}


@given(tokens=st.dictionaries(st.integers(1, 65535), st.binary(min_size=1, max_size=200), max_size=40))
def test_msgpack_vocabularies_of_every_form_are_read(tokens: dict[int, bytes]) -> None:
    assert read_msgpack(packed(tokens), "file") == tokens


@given(data=st.binary(max_size=50), cut=st.integers(0, 40))
def test_msgpack_of_any_bytes_is_read_or_an_input_error(data: bytes, cut: int) -> None:
    good = packed(SMALL)
    for bad in (good[:cut], good + b"\x00", good[: 5 + cut] + data):
        with contextlib.suppress(InputError):  # a random tail may also be right
            assert isinstance(read_msgpack(bad, "file"), dict)


def test_small_vocabularies_load_by_kind_by_file_and_by_folder(tmp_path: Path) -> None:
    text, binary = tmp_path / "text", tmp_path / "binary"
    text.mkdir()
    binary.mkdir()
    write_text(text / TEXT_FILE, SMALL)
    (binary / MSGPACK_FILE).write_bytes(packed(SMALL))
    for folder, name in ((text, TEXT_FILE), (binary, MSGPACK_FILE)):
        for tokenizer in (
            load_tokenizer(folder),
            load_tokenizer(folder / name),
            load_tokenizer("world", near=folder),
            load_tokenizer("world", near=folder / name),
            tokenizer_for(65536, folder),
            tokenizer_for(65529, str(folder)),
        ):
            assert tokenizer.n_vocab == 301
            assert tokenizer.encode("a ba bé") == [3, 3, 6]  # "a b" reaches across the space
            assert tokenizer.encode("b b" + " b" * 20) == [4, 300, 2, 4]
            assert tokenizer.decode([3, 0, 4]) == "a bb"


def test_tokenizer_for_goes_by_the_size_of_the_vocabulary(world: WorldTokenizer, pile_file: Path) -> None:
    assert tokenizer_for(256).name == "byte"
    assert tokenizer_for(65536).name == world.name
    for n in (50254, 50277, 50304):
        assert tokenizer_for(n, pile_file.parent).name == "Pile"
    for n in (255, 257, 50253, 50305, 65528, 65537):
        with pytest.raises(InputError, match=f"no tokenizer for a vocabulary of {n}; known: 256 "):
            tokenizer_for(n)


def test_load_tokenizer_by_kind_and_path(world: WorldTokenizer, pile_file: Path) -> None:
    assert load_tokenizer("bytes").encode("a") == [97]
    assert load_tokenizer("world").encode("hello world") == world.encode("hello world")
    for tokenizer in (
        load_tokenizer("pile", pile_file.parent),
        load_tokenizer(pile_file),
        load_tokenizer(pile_file.parent),
    ):
        assert tokenizer.end_of_text == 0
        assert tokenizer.decode(tokenizer.encode("a    b<|endoftext|>")) == "a    b<|endoftext|>"


def test_finding_the_world_vocabulary_does_not_import_rwkv(
    world: WorldTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rwkv", raising=False)
    assert find_world_file(None).name == TEXT_FILE
    assert "rwkv" not in sys.modules


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=f"World vocabulary is missing; put {MSGPACK_FILE} or {TEXT_FILE} in {tmp_path}"
    ):
        tokenizer_for(65536, tmp_path)
    with pytest.raises(InputError, match="beside the checkpoint, or pip install rwkv"):
        load_tokenizer("world")
    with pytest.raises(InputError, match=f"Pile tokenizer is missing; put 20B_tokenizer.json in {tmp_path}"):
        tokenizer_for(50277, tmp_path)
    with pytest.raises(InputError, match=r"put 20B_tokenizer\.json beside the checkpoint"):
        tokenizer_for(50277)
    with pytest.raises(InputError, match=f"no vocabulary in {tmp_path}; put one of {MSGPACK_FILE}"):
        load_tokenizer(tmp_path)


def test_an_unknown_kind_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="no tokenizer 'World'; did you mean 'world'"):
        load_tokenizer("World")
    with pytest.raises(InputError, match=r"no tokenizer '/no/such/file'; give bytes, world, pile, or the path"):
        load_tokenizer("/no/such/file")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello"])
def test_a_file_that_is_no_vocabulary(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match="file: not a vocabulary; one of"):
        load_tokenizer(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 'a' 1\n2 'b'\n", "file:2: not 'id literal length'"),
        (b"1 'a' 2\n", "file:1: not 'id literal length'"),
        (b"1 open('x') 1\n", "file:1: not 'id literal length'"),
        (b"1 17 1\n", "file:1: not 'id literal length'"),
        (b"1 'a 1\n", "file:1: not 'id literal length'"),
        (b"1 'a' 1\n1 'b' 1\n", "file:2: id 1 is there twice"),
        (b"1 '\xff' 1\n", "file: byte 3 is not UTF-8"),
    ],
)
def test_a_broken_text_vocabulary_is_named_by_line(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_text(content, "file")


def test_a_text_vocabulary_with_windows_line_ends_is_read() -> None:
    assert read_text(b"1 'a' 1\r\n2 b'\\xff' 1\r\n\r\n", "file") == {1: b"a", 2: b"\xff"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x81\x01\xa1", "ends at byte 3, inside the vocabulary"),
        (b"\xdf\xff\xff\xff\xff", "ends at byte 5, inside the vocabulary"),
        (b"\x81\xa1a\x01", "byte 0xa1 at 1 is not a token id"),
        (b"\x81\x01\xc0", "byte 0xc0 at 2 is not a string"),
        (b"\x91\x01", "byte 0x91 at 0 is not a msgpack map"),
        (b"\x82\x01\xa1a\x01\xa1b", "id 1 is there twice"),
        (b"\x81\x01\xa1a\x00", "1 bytes after the vocabulary"),
        (b"\x81\x00\xa1a", "id 0 is not a token of the World vocabulary"),
        (b"\x82\x01\xa1a\x02\xa1a", "a token is empty or there twice"),
        (b"\x81\x01\xa0", "a token is empty or there twice"),
        (b"\x80", "the vocabulary is empty"),
    ],
)
def test_a_broken_msgpack_vocabulary_is_named_by_byte(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / MSGPACK_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"{MSGPACK_FILE}: {message}"):
        load_world(tmp_path / MSGPACK_FILE)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0"}'])
def test_a_broken_pile_file_is_an_input_error(tmp_path: Path, content: str) -> None:
    pytest.importorskip("tokenizers", reason="Pile models need the tokenizers package")
    (tmp_path / "20B_tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"20B_tokenizer\.json: not a file of the tokenizers library"):
        tokenizer_for(50277, tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="Pile models need the tokenizers package")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"two words": 0, "unk": 1}, unk_token="unk"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="token 'two words' holds ' '; a byte-level BPE is needed"):
        tokenizer_for(50277, tmp_path)


def test_the_tokenizers_package_is_asked_for_by_name(pile_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match="needs the tokenizers package; pip install tokenizers"):
        load_tokenizer(pile_file)


def test_an_unknown_id_is_named(world: WorldTokenizer, pile: PileTokenizer) -> None:
    for tokenizer, bad in ((world, 65530), (world, -1), (pile, pile.n_vocab), (ByteTokenizer(), 256)):
        message = f"token {bad} is not in the {tokenizer.name} vocabulary of {tokenizer.n_vocab}; does the tokenizer"
        for decode in (tokenizer.decode, tokenizer.decode_bytes, lambda ids, t=tokenizer: t.stream().feed(ids[-1])):
            with pytest.raises(TokenError, match=message):
                decode([1, bad])


def test_text_that_cannot_be_encoded_is_named(pile: PileTokenizer) -> None:
    with pytest.raises(TokenError, match=r"lone surrogate U\+D800 at character 2"):
        ByteTokenizer().encode("ab\ud800")
    with pytest.raises(TokenError, match="byte 1 is not UTF-8; the Pile tokenizer takes text only"):
        pile.encode(b"a\xff")
    with pytest.raises(TokenError, match="no token for byte 0x7a"):
        WorldTokenizer({1: b"a", 2: b"ab"}).encode("abaz")
