"""The tokenizer of RWKV-4 Pile and Raven models: GPT-NeoX's byte-level BPE, run by ``tokenizers``.

This is the only file that imports ``tokenizers``, and it does so when a tokenizer is loaded.
"""

from __future__ import annotations

from pathlib import Path

from reference.errors import InputError, TokenError
from reference.vocabulary import Vocabulary, utf8

FILES = ("20B_tokenizer.json", "tokenizer.json")


def find_pile_file(near: Path | None) -> Path:
    """The tokenizer beside the checkpoint (folder ``near``); raises :class:`InputError` if there is none."""
    for name in FILES if near else ():
        if near and (near / name).is_file():
            return near / name
    where = f"in {near}" if near else "beside the checkpoint"
    raise InputError(
        f"the Pile tokenizer is missing; put {FILES[0]} {where} (it is part of https://github.com/BlinkDL/ChatRWKV)"
    )


class PileTokenizer(Vocabulary):
    """Wraps a ``tokenizers.Tokenizer``. Text is normalised to NFC before it is encoded, as in training."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers  # type: ignore[import-untyped]
        except ImportError:
            raise InputError("the Pile vocabulary needs the tokenizers package; pip install tokenizers") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  tokenizers raises plain Exception for a malformed file
            raise InputError(f"{path}: not a file of the tokenizers library: {error}") from None
        added = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        tokens = {}
        for text, i in self._tokenizer.get_vocab().items():
            tokens[i] = added[i].encode("utf-8") if i in added else _token_bytes(text, path)
        end = next((i for i, text in added.items() if text == "<|endoftext|>"), None)
        super().__init__("Pile", tokens, end_of_text=end)

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of ``text``; raises :class:`TokenError` for bytes that are not UTF-8."""
        try:
            text = utf8(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenError(f"byte {error.start} is not UTF-8; the Pile tokenizer takes text only") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the rest for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}


_BYTE = _byte_of_character()


def _token_bytes(text: str, path: Path) -> bytes:
    try:
        return bytes(_BYTE[c] for c in text)
    except KeyError as error:
        raise InputError(
            f"{path}: token {text!r} holds {error}; a byte-level BPE is needed, as in {FILES[0]}"
        ) from None
