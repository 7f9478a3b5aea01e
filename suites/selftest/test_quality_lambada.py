"""LAMBADA: which questions a file asks, and which of them a session answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from harness.models import Model, open_model
from harness.quality.lambada import answers, beside, questions, sha256
from harness.without_codec import NotComparable
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.errors import InputError
from reference.synthetic import synthetic
from suites.selftest.vocabularies import data_file


@pytest.fixture(scope="module")
def tiny() -> Model:
    return open_model("tiny")


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


class Reciting:
    """Knows some texts by heart: the byte that follows what it has read, or a zero byte."""

    def __init__(self, *known: str) -> None:
        self.known = [text.encode() for text in known]

    def forward(self, tokens: Sequence[int], state: bytes | None) -> tuple[np.ndarray, bytes]:
        read = (state or b"") + bytes(tokens)
        logits = np.zeros(256, np.float32)
        following = [text[len(read)] for text in self.known if text.startswith(read) and len(text) > len(read)]
        logits[following[0] if following else 0] = 1
        return logits, read


def test_the_last_word_counts_where_all_of_it_is_right(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "lambada.jsonl"
    file.write_text(lines("a stone is a stone", "the sea is blue", "it was John", "say the word"))
    asked = questions(str(file), tiny, 100)
    assert bytes(asked[1].prompt) == b"the sea is"
    assert bytes(asked[1].word) == b" blue"
    assert sha256(asked) == sha256(questions(str(file), tiny, 4)) != sha256(asked[:3])
    # The second begins rightly and ends wrongly, the fourth is not known at all.
    session = Reciting("a stone is a stone", "the sea is blank", "it was John")
    assert answers(session, asked, 256).tolist() == [True, False, True, False]


def test_questions_are_spread_over_the_file(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "lambada.jsonl"
    file.write_text("\n" + lines(*(f"number {i}" for i in range(10))) + "\n")
    assert [bytes(q.word) for q in questions(str(file), tiny, 5)] == [f" {i}".encode() for i in (0, 2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"text\n", r":1: not \{"),
        (b'{"text": 3}\n', r":1: not \{"),
        (b"[" * 100_000, r":1: not \{"),
        (b'{"text": "fine words"}\n{"text": "alone"}\n', ":2: 'alone' has no last word"),
    ],
)
def test_a_file_that_is_not_lambada(content: bytes, words: str, tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=words):
        questions(str(tmp_path / "a.jsonl"), tiny, 10)


def test_an_answer_that_is_not_finite_is_none(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("one two", "three four"))

    class Broken(Reciting):
        def forward(self, tokens: Sequence[int], state: bytes | None) -> tuple[np.ndarray, bytes]:
            logits, read = super().forward(tokens, state)
            return (logits * np.float32("nan") if read.startswith(b"three") else logits), read

    with pytest.raises(NotComparable, match="question 1: NaN at token 0"):
        answers(Broken("one two"), questions(str(tmp_path / "a.jsonl"), tiny, 10), 256)


def test_the_file_beside_a_checkpoint_is_found(tiny: Model, tmp_path: Path) -> None:
    save_checkpoint(tiny.weights, tmp_path / "model.safetensors", "safetensors", "fp16")
    mine = open_model(str(tmp_path / "model.safetensors"))
    assert beside(mine) is None
    (tmp_path / "lambada_test.jsonl").write_text(lines("one two"))
    assert beside(mine) == str(tmp_path / "lambada_test.jsonl")
    assert beside(open_model("169m")) is None


def test_the_public_file_with_the_world_vocabulary() -> None:
    data, vocabulary = data_file("lambada_test.jsonl"), data_file("tokenizer_model")
    config = Config(n_layer=1, n_embd=32, n_ffn=32, n_vocab=65536)
    model = Model("world", synthetic(config, 0), "")
    asked = questions(str(data), model, 1 << 20, str(vocabulary))
    assert len(asked) == 5153
    assert all(question.prompt[0] == 0 and question.word for question in asked)
    assert sum(len(question.word) == 1 for question in asked) / 5153 > 0.7
