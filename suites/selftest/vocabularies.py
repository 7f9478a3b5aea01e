"""Vocabularies to test tokenizers with: the real ones where they are, and a small one of the Pile's kind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import reference
from reference.tokenizer_world import WorldTokenizer, find_world_file, load_world

#: Public files too large to be part of this repository; tests use them where they are.
DATA = Path(__file__).parents[3] / "shared" / "data"
HELDOUT = (Path(reference.__file__).parent / "embedded" / "heldout.txt").read_text(encoding="utf-8")


def data_file(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    return DATA / name


def lambada() -> str:
    lines = data_file("lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


def world_vocabulary() -> WorldTokenizer:
    """The vocabulary that the rwkv package ships."""
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("the World vocabulary comes with the rwkv package; pip install --no-deps rwkv")
    return load_world(find_world_file(None))


def small_pile_file(folder: Path) -> Path:
    """Write a small byte-level BPE like the Pile's: NFC, two special tokens first, runs of spaces last."""
    tokenizers = pytest.importorskip("tokenizers", reason="Pile models need the tokenizers package")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(HELDOUT[:20000].splitlines(), trainer)
    bpe.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    path = folder / "20B_tokenizer.json"
    bpe.save(str(path))
    return path
