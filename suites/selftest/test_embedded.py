"""The embedded model is what its README says: small, finite, trained, and able to write."""

from __future__ import annotations

import re

import numpy as np
import pytest

from harness.compare import log_softmax
from harness.generate import generate
from harness.models import EMBEDDED, TINY, open_model
from harness.session import open_session
from reference.config import count_parameters
from reference.forward import forward

MODEL = open_model(TINY)
TEXT = (EMBEDDED / "heldout.txt").read_bytes()


def test_the_files_are_of_the_promised_size() -> None:
    assert (EMBEDDED / "tiny.safetensors").stat().st_size <= 5_000_000
    assert len(TEXT) >= 100_000
    assert 1_500_000 <= count_parameters(MODEL.config) <= 2_500_000
    assert MODEL.config.n_embd % 128 == 0
    assert MODEL.config.n_ffn % 128 == 0
    assert not MODEL.weights.non_finite
    assert not MODEL.weights.synthetic


def test_bits_per_byte_on_held_out_text() -> None:
    """The first 24 kB, state carried along, as the README states it; float32 sums differ in the sixth digit."""
    weights, state, nats = MODEL.weights.in_memory(), None, 0.0
    text = np.frombuffer(TEXT[:24_001], np.uint8)
    for start in range(0, len(text) - 1, 1000):
        block = text[start : start + 1000]
        logits, state = forward(weights, block, state, all_logits=True)
        following = text[start + 1 : start + 1 + len(block)]
        nats -= float(log_softmax(logits)[np.arange(len(following)), following].sum())
    bits = nats / np.log(2) / (len(text) - 1)
    page = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"first 24,000 predictions it is ([0-9]\.[0-9]{4})", page)
    assert stated is not None
    assert bits <= 2.2
    assert bits == pytest.approx(float(stated.group(1)), abs=1e-4)


def test_it_writes_recognisable_text() -> None:
    """Most of the words it writes are words of the documentation it was trained on the like of."""
    tokenizer = MODEL.tokenizer()
    prompt = tokenizer.encode("This function returns ")
    with open_session("numpy", MODEL) as opened:
        written = tokenizer.decode(list(generate(opened.session, prompt, 400, temperature=0.5, seed=1)))
    words = re.findall(r"[a-z]{3,}", written)
    known = set(re.findall(r"[a-z]{3,}", TEXT.decode()))
    assert len(words) > 30
    assert sum(word in known for word in words) / len(words) > 0.8
