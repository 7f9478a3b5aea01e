"""Model names -> weights: a checkpoint path, the embedded ``tiny``, or a preset with synthetic weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import reference
from harness.budget import keeps
from harness.names import did_you_mean
from reference.cache import cache_folder
from reference.checkpoint import load_checkpoint
from reference.config import Config, preset, preset_names
from reference.errors import ConfigError, InputError
from reference.synthetic import synthetic
from reference.tokenizer import Tokenizer, tokenizer_for
from reference.weights import Tensor, Weights

TINY = "tiny"
EMBEDDED = Path(reference.__file__).parent / "embedded"


@dataclass(frozen=True)
class Model:
    """A model as asked for: ``name``, its weights, a hash of its content; ``seed`` of synthetic weights."""

    name: str
    weights: Weights
    sha256: str
    seed: int | None = None

    @property
    def config(self) -> Config:
        return self.weights.config

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's vocabulary; raises InputError naming the file that is missing."""
        near = Path(self.weights.source)
        near = near if near.exists() else Path.cwd()  # synthetic weights have no file
        return tokenizer_for(self.config.n_vocab, near if near.is_dir() else near.parent)


def model_names() -> list[str]:
    """Names that need no file."""
    return [TINY, *preset_names()]


def model_config(name: str) -> Config:
    """Configuration of a model without reading its weights' data."""
    if name == TINY:
        return load_checkpoint(str(EMBEDDED / "tiny.safetensors"), scan=False).config
    if looks_like_path(name):
        return load_checkpoint(name, scan=False).config
    return _preset(name)


def open_model(name: str, seed: int = 0) -> Model:
    """Open a model; ``seed`` is that of synthetic weights.

    Raises :class:`reference.errors.InputError` for an unknown name or an unreadable file.
    """
    if name == TINY:
        path = EMBEDDED / "tiny.safetensors"
        return _model(name, load_checkpoint(str(path)), _hash_files([path]))
    if looks_like_path(name):
        return _model(name, load_checkpoint(name), content_hash(Path(name)))
    config = _preset(name)
    weights = _kept(synthetic(name, seed), config)
    return _model(name, weights, hashlib.sha256(f"synthetic 1 {config} {seed}".encode()).hexdigest(), seed)


def _model(name: str, weights: Weights, sha256: str, seed: int | None = None) -> Model:
    return Model(name, replace(weights, key=sha256), sha256, seed)


def is_generated(name: str) -> bool:
    """Whether a model's weights are made here and held in memory, rather than mapped from a file."""
    return name != TINY and not looks_like_path(name)


def looks_like_path(name: str) -> bool:
    """Whether a model name is meant as a path: it exists, or has a folder or a file ending in it."""
    return os.sep in name or "/" in name or os.path.exists(name) or bool(Path(name).suffix)


def _preset(name: str) -> Config:
    try:
        return preset(name)
    except ConfigError:
        known = model_names()
        hint = did_you_mean(name, known)
        raise InputError(f"no model {name!r}; {hint}models: {', '.join(known)}, or the path of a checkpoint") from None


def _kept(weights: Weights, config: Config) -> Weights:
    """Synthetic tensors are made at every read; keep them as stored where memory allows."""
    if not keeps(weights.nbytes):
        return weights
    made: dict[str, np.ndarray] = {}

    def once(name: str, tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            if name not in made:
                made[name] = tensor.read()
            return made[name]

        return Tensor(tensor.stored, tensor.shape, read)

    return weights.map(once)


def content_hash(path: Path) -> str:
    """SHA-256 over a checkpoint file, or over the weight files and config of a folder.

    Remembered per path, size and time of change, because a 7B file takes a minute to read.
    """
    kinds = (".json", ".bin", ".safetensors")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in kinds)
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    note = cache_folder() / "sha256" / key
    with suppress(OSError, UnicodeDecodeError):
        known = note.read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", known):  # not what a killed writer or a full disk left
            return known
    digest = _hash_files(files)
    with suppress(OSError):  # a cache that cannot be written is done without
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest, encoding="ascii")
    return digest


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for block in _blocks(files):
        digest.update(block)
    return digest.hexdigest()


def _blocks(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                yield block


#: Of the gate's prompt, the last ids are drawn from the whole vocabulary: text alone never meets most of it. First come
#: the last id, id 0, which is padding elsewhere, and one id twice in a row.
SPREAD = slice(36, 48)


def gate_tokens(model: Model, n: int, seed: int = 0) -> list[int]:
    """The prompt of the parity gate and of timing: ``n`` ids; another ``seed`` gives another prompt.

    Real text from a place that ``seed`` decides, with the ids at SPREAD from the whole vocabulary; random
    ids throughout where the tokenizer's file is not at hand.
    """
    rng = np.random.default_rng(seed)
    last = model.config.n_vocab - 1
    drawn = [int(i) for i in rng.integers(0, last + 1, n)]
    twice = drawn[SPREAD.start : SPREAD.start + 1]
    drawn[SPREAD.start : SPREAD.start + 4] = [last, 0, *twice, *twice][: max(n - SPREAD.start, 0)]
    text = (EMBEDDED / "heldout.txt").read_text(encoding="utf-8")
    start = 7919 * seed % len(text)
    try:
        ids = [int(i) for i in model.tokenizer().encode((text[start:] + text[:start])[: 16 * n])]
    except InputError:
        return drawn
    prompt = (ids * (n // len(ids) + 1))[:n]
    prompt[SPREAD] = drawn[SPREAD]
    return prompt
