"""Which passages of a text are scored, and in which calls."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness.models import Model, open_model
from harness.quality.passage import HELD_OUT, Passage, passage_of
from reference.config import Config
from reference.errors import InputError
from reference.synthetic import synthetic
from suites.selftest.vocabularies import data_file


@pytest.fixture(scope="module")
def tiny() -> Model:
    return open_model("tiny")


def test_segments_are_spread_over_the_text(tiny: Model) -> None:
    passage = passage_of(tiny, None, 1024, 64)
    text = HELD_OUT.read_bytes()
    starts: list[int] = []
    for at in range(0, 1024, 64):
        segment = bytes(passage.ids[at : at + 64].tolist()) + bytes([passage.following[at + 63]])
        assert passage.following[at : at + 63].tolist() == passage.ids[at + 1 : at + 64].tolist()
        # Some lines of it occur twice: the first that does not overlap is meant.
        starts.append(text.index(segment, starts[-1] + 65 if starts else 0))
    assert starts[0] == 0
    assert max(abs(start - len(text) * i // 16) for i, start in enumerate(starts)) <= 64
    assert all(start == 0 or text[start - 1 : start] in b" \n" for start in starts)
    assert passage.n_bytes is not None
    assert passage.n_bytes.sum() == 1024


def test_how_far_apart_segments_are(tiny: Model, tmp_path: Path) -> None:
    assert passage_of(tiny, None, 4096, 128).spacing == pytest.approx(155_276 / 4096)
    (tmp_path / "part.txt").write_bytes(HELD_OUT.read_bytes()[:16_384])
    assert passage_of(tiny, str(tmp_path / "part.txt"), 4096, 128).spacing == pytest.approx(4)
    assert passage_of(open_model("169m"), None, 300, 128).spacing == math.inf


def test_tokens_are_whole_segments(tiny: Model) -> None:
    assert len(passage_of(tiny, None, 1000, 128)) == 896
    assert len(passage_of(open_model("169m"), None, 1000, 128)) == 896
    assert len(passage_of(tiny, None, 1000, 0)) == 1000


def test_long_tokens_are_not_too_little_text(tmp_path: Path) -> None:
    """Runs of spaces, of which one id is far longer than of a word."""
    config = Config(n_layer=1, n_embd=32, n_ffn=32, n_vocab=65536)
    model = Model("world", synthetic(config, 0), "0" * 64)
    (tmp_path / "runs.txt").write_bytes((b" " * 3000 + b"\nword\n") * 20)
    passage = passage_of(model, str(tmp_path / "runs.txt"), 128, 32, str(data_file("tokenizer_model")))
    assert len(passage) == 128
    assert passage.n_bytes is not None
    assert passage.n_bytes.mean() > 16


def test_one_run_is_the_beginning(tiny: Model) -> None:
    passage = passage_of(tiny, None, 1000, 0)
    assert bytes(passage.ids.tolist()) == HELD_OUT.read_bytes()[:1000]
    assert [tuple(call) for call in passage.calls(400)] == [(0, 400, True), (400, 800, False), (800, 1000, False)]


def test_calls_never_cross_a_segment() -> None:
    ids = np.zeros(300, int)
    found = list(Passage("x", ids, ids, None, 128).calls(100))
    assert [tuple(call) for call in found] == [
        *((0, 100, True), (100, 128, False), (128, 228, True), (228, 256, False), (256, 300, True)),
    ]


def test_a_text_shorter_than_asked_is_read_whole(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(b"word " * 100)
    passage = passage_of(tiny, str(tmp_path / "short.txt"), 4096, 64)
    assert len(passage) == 64 * 7
    assert len(passage_of(tiny, str(tmp_path / "short.txt"), 4096, 0)) == 499


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"abc", "too short, 0 positions"), (b"x" * 129, "too short, 64")],
)
def test_too_little_text(content: bytes, words: str, tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        passage_of(tiny, str(tmp_path / "a.txt"), 4096, 64)


def test_a_tokenizer_of_another_model(tiny: Model) -> None:
    vocabulary = data_file("tokenizer_model")
    with pytest.raises(InputError, match=r"outside the vocabulary of tiny, 256; .*--tokenizer"):
        passage_of(tiny, None, 1024, 64, str(vocabulary))


def test_world_and_pile_segments_count_the_bytes_they_predict() -> None:
    for name, n_vocab in (("tokenizer_model", 65536), ("20B_tokenizer.json", 50277)):
        config = Config(n_layer=1, n_embd=32, n_ffn=32, n_vocab=n_vocab)
        model = Model("other", synthetic(config, 0), "0" * 64)
        passage = passage_of(model, str(HELD_OUT), 2048, 64, str(data_file(name)))
        assert len(passage) == 2048
        assert passage.n_bytes is not None
        assert 2.5 < passage.n_bytes.mean() < 6


def test_synthetic_weights_get_random_ids() -> None:
    model = open_model("169m")
    passage = passage_of(model, None, 256, 64, seed=5)
    assert (passage.n_bytes, passage.name) == (None, "random ids, seed 5")
    assert passage.ids.max() > 40_000
    assert passage.sha256 != passage_of(model, None, 256, 64, seed=6).sha256
