"""Token ids -> bytes -> text: the half of a tokenizer that all of them share."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping

from reference.errors import TokenError


class Vocabulary:
    """The bytes of every token id.

    name         what the vocabulary is called in messages
    n_vocab      one more than the largest id; a model's own size may be rounded up beyond it
    end_of_text  the id that separates documents, ``None`` where there is none
    """

    def __init__(self, name: str, tokens: Mapping[int, bytes], end_of_text: int | None) -> None:
        self.name = name
        self.n_vocab = max(tokens) + 1
        self.end_of_text = end_of_text
        self._bytes = tokens

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one id; raises :class:`TokenError` for an id the vocabulary does not have."""
        try:
            return self._bytes[token]
        except KeyError:
            raise TokenError(
                f"token {token} is not in the {self.name} vocabulary of {self.n_vocab}; "
                "does the tokenizer belong to this model?"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids`` in a row; raises :class:`TokenError` for an unknown id."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one at a time."""
        return TextStream(self)


class TextStream:
    """Text of ids as they arrive. All that is fed and flushed, joined, equals ``decode`` of all ids.

    A character whose bytes are spread over several tokens is held back until it is whole, so what
    has been given out never changes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that ``token`` completes, often one word, sometimes none."""
        return self._decoder.decode(self._vocabulary.token_bytes(token))

    def flush(self) -> str:
        """What is held back, as U+FFFD, and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def utf8(text: str | bytes) -> bytes:
    """Text as bytes; raises :class:`TokenError` for a lone surrogate, which UTF-8 cannot say."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenError(
            f"the text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "it was decoded wrongly, pass the bytes instead"
        ) from None
