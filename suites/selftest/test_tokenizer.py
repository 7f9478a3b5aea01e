"""Tokenizers: round trips, streams and outside oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.tokenizer import ByteTokenizer, PileTokenizer, Tokenizer, WorldTokenizer, load_tokenizer
from reference.tokenizer_world import MSGPACK_FILE, load_world
from suites.selftest.vocabularies import HELDOUT, data_file, lambada, small_pile_file, world_vocabulary

TEXTS = st.text() | st.text("ab  \n\t.,é字🙂") | st.lists(st.sampled_from(HELDOUT.split()), max_size=30).map(" ".join)


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    return world_vocabulary()


@pytest.fixture(scope="module")
def world_ids(world: WorldTokenizer) -> dict[bytes, int]:
    return {world.token_bytes(i): i for i in range(1, world.n_vocab)}


@pytest.fixture(scope="module")
def pile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pile_file(tmp_path_factory.mktemp("pile"))


@pytest.fixture(scope="module")
def pile(pile_file: Path) -> PileTokenizer:
    return PileTokenizer(pile_file)


# --- round trips -------------------------------------------------------------------------------------------------


@given(data=st.binary())
def test_bytes_are_their_own_ids(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(data) == list(data)
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@given(data=st.binary() | TEXTS.map(str.encode))
def test_world_round_trips_any_bytes(world: WorldTokenizer, data: bytes) -> None:
    ids = world.encode(data)
    assert world.decode_bytes(ids) == data
    assert 0 not in ids


def longest_match(ids: dict[bytes, int], data: bytes) -> list[int]:
    """The definition: at every byte, the longest token that is a prefix of the rest."""
    found = []
    while data:
        token = next(data[:n] for n in range(128, 0, -1) if data[:n] in ids)
        found.append(ids[token])
        data = data[len(token) :]
    return found


@given(ids=st.lists(st.integers(1, 65529), max_size=20))
def test_world_matches_the_longest_token_at_every_byte(
    world: WorldTokenizer, world_ids: dict[bytes, int], ids: list[int]
) -> None:
    data = world.decode_bytes(ids)
    assert world.encode(data) == longest_match(world_ids, data)


@given(data=st.data())
def test_any_vocabulary_matches_the_longest_token(data: st.DataObject) -> None:
    letters = st.text("ab .,\n", min_size=1, max_size=4).map(str.encode)
    tokens = sorted(data.draw(st.sets(letters, max_size=12)) | {b"%c" % c for c in b"ab .,\n"})
    tokenizer = WorldTokenizer(dict(enumerate(tokens, 1)))
    text = data.draw(st.text("ab .,\n")).encode()
    assert tokenizer.encode(text) == longest_match({token: i for i, token in enumerate(tokens, 1)}, text)


@given(text=TEXTS)
def test_pile_round_trips_text_in_nfc(pile: PileTokenizer, text: str) -> None:
    normal = pile._tokenizer.normalizer.normalize_str(text)
    assert pile.decode(pile.encode(text)) == normal
    assert pile.encode(text.encode()) == pile.encode(text)


def test_string_and_its_utf8_have_the_same_ids(world: WorldTokenizer) -> None:
    for tokenizer in (world, ByteTokenizer()):
        assert tokenizer.encode("naïve 字🙂") == tokenizer.encode("naïve 字🙂".encode())
        assert tokenizer.encode("") == []
        assert tokenizer.decode([]) == ""


def test_world_ids_known_from_the_vocabulary_file(world: WorldTokenizer) -> None:
    assert world.encode("hello world") == [34550, 40213]
    assert world.encode(b"\x00\xff") == [1, 256]
    assert (world.name, world.n_vocab, world.end_of_text) == ("World", 65530, 0)
    assert world.decode([34550, 0, 40213]) == "hello world"


def test_world_forgets_words_but_not_how_to_match(world: WorldTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.encode(HELDOUT)
    monkeypatch.setattr("reference.tokenizer_world._MEMORY", 10)
    monkeypatch.setattr("reference.tokenizer_world._WORD", 5)
    world._words.clear()
    assert world.encode(HELDOUT) == before
    assert 0 < len(world._words) <= 10


# --- streams -----------------------------------------------------------------------------------------------------


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    for _ in range(2):  # flush starts afresh
        pieces = [*map(stream.feed, ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode("utf-8", "replace")


@given(data=st.binary() | st.text("aé字🙂").map(str.encode))
def test_stream_of_bytes_equals_the_whole(data: bytes) -> None:
    check_stream(ByteTokenizer(), list(data))


@given(ids=st.lists(st.integers(0, 65529)) | st.lists(st.integers(0, 256)))
def test_stream_of_world_ids_equals_the_whole(world: WorldTokenizer, ids: list[int]) -> None:
    check_stream(world, ids)


@given(data=st.data())
def test_stream_of_pile_ids_equals_the_whole(pile: PileTokenizer, data: st.DataObject) -> None:
    check_stream(pile, data.draw(st.lists(st.integers(0, pile.n_vocab - 1))))


@given(text=st.text("aé字🙂"))
def test_stream_of_valid_text_never_gives_part_of_a_character(text: str) -> None:
    stream = ByteTokenizer().stream()
    assert [c for byte in text.encode() if (c := stream.feed(byte))] == list(text)
    assert stream.flush() == ""


# --- oracles -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Any:
    reason = "pyrwkv-tokenizer is the oracle of World ids; pip install pyrwkv-tokenizer"
    return pytest.importorskip("pyrwkv_tokenizer", reason=reason).RWKVTokenizer()


@given(text=TEXTS)
def test_world_ids_are_those_of_pyrwkv_tokenizer(world: WorldTokenizer, oracle: Any, text: str) -> None:
    assert world.encode(text) == oracle.encode(text)
    assert world.decode(oracle.encode(text)) == text


@pytest.mark.parametrize("read", [lambda: HELDOUT, lambada], ids=["heldout", "lambada"])
def test_world_ids_of_a_whole_text_are_those_of_pyrwkv_tokenizer(
    world: WorldTokenizer, oracle: Any, read: Callable[[], str]
) -> None:
    text = read()
    assert world.encode(text) == oracle.encode(text)


def test_world_files_of_both_formats_hold_the_same_tokens(world: WorldTokenizer) -> None:
    tokens = load_world(data_file(MSGPACK_FILE))
    assert [tokens.token_bytes(i) for i in range(65530)] == [world.token_bytes(i) for i in range(65530)]


@given(data=st.data())
def test_pile_decodes_as_the_tokenizers_library_does(pile: PileTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, pile.n_vocab - 1)))
    assert pile.decode(ids) == pile._tokenizer.decode(ids, skip_special_tokens=False)


def test_the_real_pile_file() -> None:
    tokenizer = load_tokenizer(data_file("20B_tokenizer.json"))
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.end_of_text) == ("Pile", 50277, 0)
    assert tokenizer.encode("Hello  world<|endoftext|>") == [12092, 50276, 10186, 0]
    text = lambada()[:50000]
    assert tokenizer.decode(tokenizer.encode(text)) == text
