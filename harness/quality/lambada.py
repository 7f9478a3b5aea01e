"""LAMBADA: is the last word of a passage the one that the model finds likeliest? (https://arxiv.org/abs/1606.06031)

A file has one ``{"text": ...}`` a line, as OpenAI's preprocessing of the test set has it. The prompt is all but the
last word, after the id between documents where the vocabulary has one, as in BlinkDL's own figures; a passage
counts where every token of `` word`` is the likeliest after those before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.api import Session, State
from harness.checks import call
from harness.models import Model
from harness.quality.passage import check_ids
from harness.quality.scores import check_logits
from reference.errors import InputError
from reference.tokenizer import load_tokenizer

#: What is looked for beside a checkpoint.
FILE = "lambada_test.jsonl"


@dataclass(frozen=True)
class Question:
    """Ids of a passage but its last word, and of that word."""

    prompt: tuple[int, ...]
    word: tuple[int, ...]


def beside(model: Model) -> str | None:
    """The file in the folder of a model's checkpoint, if there is one."""
    near = Path(model.weights.source)
    if model.weights.synthetic or not near.exists():
        return None
    found = (near if near.is_dir() else near.parent) / FILE
    return str(found) if found.is_file() else None


def questions(path: str, model: Model, limit: int, tokenizer: str | None = None) -> list[Question]:
    """``limit`` passages spread evenly over a file. Raises InputError naming the line that cannot be one."""
    found = load_tokenizer(tokenizer) if tokenizer else model.tokenizer()
    lines = _lines(path)
    start = () if found.end_of_text is None else (found.end_of_text,)
    chosen = []
    for i in range(min(limit, len(lines))):
        number, line = lines[len(lines) * i // min(limit, len(lines))]
        before, word = _split(line, f"{path}:{number}")
        try:
            prompt, answer = (*start, *found.encode(before)), tuple(found.encode(" " + word))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        check_ids([*prompt, *answer], model, Path(path))
        chosen.append(Question(prompt, answer))
    return chosen


def sha256(asked: Sequence[Question]) -> str:
    """Hash of what is asked: two shares of other questions are not compared."""
    return hashlib.sha256(json.dumps([[q.prompt, q.word] for q in asked]).encode()).hexdigest()


def answers(
    session: Session, asked: Sequence[Question], n_vocab: int, tell: Callable[[str], None] = lambda text: None
) -> np.ndarray:
    """Which questions a session answers, bool ``(n,)``. Raises :class:`BadLogits`."""
    right = np.zeros(len(asked), bool)
    for i, question in enumerate(asked):
        right[i] = _answers(session, question, n_vocab, i)
        if i % 16 == 15:
            tell(f"LAMBADA, {i + 1} of {len(asked)}")
    return right


def _answers(session: Session, question: Question, n_vocab: int, number: int) -> bool:
    state: State | None = None
    fed: Sequence[int] = question.prompt
    for token in question.word:
        logits, state = call(session, fed, state)
        check_logits(logits, (n_vocab,), {"question": number})
        if int(np.argmax(logits)) != token:
            return False
        fed = [token]
    return True


def _lines(path: str) -> list[tuple[int, str]]:
    """Number and text of the lines that are not blank."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f'cannot read {path}: {error.strerror}; --data takes one {{"text": ...}} a line') from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f'{path}: is empty; --data takes one {{"text": ...}} a line')
    return lines


def _split(line: str, where: str) -> tuple[str, str]:
    """A passage but its last word, and that."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where}: not {{"text": "..."}}; --data takes LAMBADA\'s test set in JSON lines')
    before, _, word = text.rstrip().rpartition(" ")
    if not before.strip() or not word:
        raise InputError(f"{where}: {text[:40]!r} has no last word after others")
    return before, word
