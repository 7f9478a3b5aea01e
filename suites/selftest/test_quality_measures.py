"""The cached baseline of quality, and scores against it."""

from __future__ import annotations

import math
import os
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from harness.compare import log_softmax
from harness.models import Model
from harness.quality import baseline
from harness.quality.baseline import call_length, log_probabilities
from harness.quality.passage import Passage
from harness.quality.scores import BadLogits, divergence, overlap, score
from harness.without_codec import NotComparable
from reference.config import Config
from reference.forward import forward
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.conftest import SMALL

# --- the baseline ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quality"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return synthetic(SMALL, 3)


@pytest.fixture(scope="module")
def passage() -> Passage:
    drawn = np.random.default_rng(0).integers(0, 256, 601)
    return Passage("ids", drawn[:-1], drawn[1:], None, 0)


def test_the_baseline_is_the_reference_in_float64(weights: Weights, passage: Passage, cache: Path) -> None:
    chunks = list(log_probabilities(weights, "fp32", passage, None))
    assert [chunk.shape for chunk in chunks] == [(256, 256), (256, 256), (88, 256)]
    exact = log_softmax(forward(weights, passage.ids, all_logits=True, dtype=np.float64)[0])
    found = np.concatenate(chunks)
    assert np.abs(found - exact).max() <= 2.0**-24 * np.abs(exact).max()
    assert divergence(exact, log_softmax(found)).max() < 2e-12
    assert not cache.exists()


def test_rounding_of_the_baseline_by_the_size_of_a_divergence(weights: Weights) -> None:
    """Near nothing it is of second order; elsewhere of first, at most ``2^-24 sum P (|l| + E|l|) |d|`` a position."""
    ids = np.random.default_rng(3).integers(0, 256, 200)
    p = log_softmax(forward(weights, ids, all_logits=True, dtype=np.float64)[0])
    rounded = log_softmax(p.astype(np.float32))
    q = log_softmax(p + 0.14 * np.random.default_rng(4).normal(size=p.shape))
    assert divergence(p, q).mean() == pytest.approx(0.01, rel=0.2)
    off = np.abs(divergence(rounded, q) - divergence(p, q))
    chance, size = np.exp(p), np.abs(p)
    spread = size + (chance * size).sum(axis=-1, keepdims=True)
    assert (off <= 2.0**-24 * (chance * spread * np.abs(p - q)).sum(axis=-1) + 2e-12).all()
    assert 2e-12 < off.max() < 9e-9


def test_the_second_time_it_is_read(
    weights: Weights, passage: Passage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [np.array(rows) for rows in log_probabilities(weights, "Q4_0", passage, "key")]
    assert [file.suffix for file in cache.iterdir()] == [".npy"]
    monkeypatch.setattr(baseline, "forward", None)
    again = list(log_probabilities(weights, "Q4_0", passage, "key"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(TypeError):
        list(log_probabilities(weights, "Q4_0", passage, "other weights"))


@pytest.mark.parametrize("damage", [b"", b"x" * 100, "cut", "zeros"])
def test_a_damaged_cache_is_computed_again(
    damage: bytes | str, weights: Weights, passage: Passage, cache: Path
) -> None:
    first = [np.array(rows) for rows in log_probabilities(weights, "fp32", passage, "key")]
    file = next(cache.iterdir())
    data = file.read_bytes()
    broken = data[:5000] if damage == "cut" else data[:9000] + bytes(5000) + data[14000:]
    file.write_bytes(damage if isinstance(damage, bytes) else broken)
    again = list(log_probabilities(weights, "fp32", passage, "key"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert file.read_bytes() == data


def test_an_interrupted_baseline_leaves_nothing(weights: Weights, passage: Passage, cache: Path) -> None:
    found = log_probabilities(weights, "fp32", passage, "key")
    next(found)
    assert [file.suffix for file in cache.iterdir()] == [".part"]
    found.close()  # type: ignore[attr-defined]
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(
    weights: Weights, passage: Passage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(list(log_probabilities(weights, "fp32", passage, "key"))) == 3
    monkeypatch.setattr(baseline, "FP32_BYTES", 1000)
    cache.unlink()
    assert len(list(log_probabilities(weights, "fp32", passage, "key"))) == 3
    assert not cache.exists()


def test_files_not_used_for_longest_make_room(
    weights: Weights, passage: Passage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three fit; the fourth takes the place of the one that was used before the two others."""
    size = 4 * len(passage) * 256
    monkeypatch.setattr(baseline, "CACHE_BYTES", 3 * size + 3 * 200)  # with their headers
    files: dict[str, Path] = {}
    for age, key in enumerate(("first", "second", "third")):
        list(log_probabilities(weights, "fp32", passage, key))
        (files[key],) = set(cache.iterdir()) - set(files.values())
        os.utime(files[key], (1000 + age, 1000 + age))
    list(log_probabilities(weights, "fp32", passage, "first"))  # read: now the last to go
    list(log_probabilities(weights, "fp32", passage, "fourth"))
    assert not files["second"].exists()
    assert files["first"].exists()
    assert files["third"].exists()
    assert len(list(cache.iterdir())) == 3


def test_one_file_larger_than_all_room_leaves_only_itself(
    weights: Weights, passage: Passage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("one", "two"):
        list(log_probabilities(weights, "fp32", passage, key))
    monkeypatch.setattr(baseline, "CACHE_BYTES", 1000)
    list(log_probabilities(weights, "fp32", passage, "three"))
    assert len(list(cache.iterdir())) == 1


def test_what_a_killed_process_left_is_swept_and_what_is_being_written_is_not(
    weights: Weights, passage: Passage, cache: Path
) -> None:
    cache.mkdir(parents=True)
    old, new = cache / "old.part", cache / "new.part"
    for part, age in ((old, 2 * 86400), (new, 60)):
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age,) * 2)
    list(log_probabilities(weights, "fp32", passage, "key"))
    assert not old.exists()
    assert new.exists()


# --- scores ----------------------------------------------------------------------------------------------------------


class Answering:
    """The reference over ``weights``, its logits changed by ``spoil(logits, position)``; single steps only."""

    def __init__(self, weights: Weights, spoil: object = None) -> None:
        self.weights, self.spoil = weights.in_memory(), spoil

    def forward(self, tokens: Sequence[int], state: object) -> tuple[np.ndarray, object]:
        position, past = state if isinstance(state, tuple) else (0, None)
        logits, new = forward(self.weights, tokens, past)
        if callable(self.spoil):
            logits = self.spoil(logits, position)
        return logits, (position + len(tokens), new)


class Scored(Answering):
    """The same with logits of every position in one call."""

    def logits(self, tokens: Sequence[int], state: object) -> np.ndarray:
        past = state[1] if isinstance(state, tuple) else None
        return forward(self.weights, tokens, past, all_logits=True)[0]


def model_of(weights: Weights) -> Model:
    return Model("small", weights, "")


def test_steps_and_scoring_say_the_same(weights: Weights, passage: Passage, cache: Path) -> None:
    """With the state carried through, and with segments."""
    for context in (0, 100):
        part = Passage("ids", passage.ids, passage.following, None, context)
        one, other = (score(kind(weights), model_of(weights), "fp32", part) for kind in (Answering, Scored))
        for name, values in vars(one).items():
            assert np.allclose(values, vars(other)[name], rtol=1e-4, atol=1e-6), name
        assert one.kl.max() < 1e-10
        assert one.top1.all()


def test_the_parts_add_up(weights: Weights, passage: Passage, cache: Path) -> None:
    """KL(p||q) = KL(p||s) + E_p[log s - log q], whatever the three are; and each is what a plain sum gives."""
    rng = np.random.default_rng(1)
    p, s, q = (log_softmax(2 * rng.normal(size=(20, 300))) for _ in range(3))
    added = (np.exp(p) * (s - q)).sum(axis=-1)
    assert divergence(p, q) == pytest.approx(divergence(p, s) + added, rel=1e-12)
    assert divergence(p, q) == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1), rel=1e-12)
    found = score(Answering(weights), model_of(weights), "Q4_0", passage)  # exact weights where Q4_0's are expected
    assert found.kl_weights is not None
    assert found.kl_kernel is not None
    assert found.kl.max() < 1e-10
    assert found.kl_weights.mean() > 1e-4
    assert found.kl_kernel.mean() > 1e-4


def test_small_divergences_come_out_right() -> None:
    """1e-14 and below, where a plain sum gives rounding; against extended precision."""
    rng = np.random.default_rng(2)
    logits = 3 * rng.normal(size=(8, 500))
    moved = logits + 1e-7 * rng.normal(size=logits.shape)
    p, q = (x.astype(np.longdouble) for x in (logits, moved))
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    exact = (np.exp(p) * (p - q)).sum(-1)
    found = divergence(log_softmax(logits), log_softmax(moved))
    assert (found > 0).all()
    assert found == pytest.approx(exact.astype(float), rel=0.02)


def test_overlap_counts_common_tokens() -> None:
    p, q = np.array([[5.0, 4, 3, 2, 1, 0, -1]]), np.array([[5.0, 4, 3, -2, -3, 2, 1]])
    assert overlap(p, q, 5)[0] == pytest.approx(3 / 5)
    assert overlap(p[:, :2], q[:, :2], 5)[0] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_is_no_result(value: float, weights: Weights, passage: Passage) -> None:
    def spoil(logits: np.ndarray, position: int) -> np.ndarray:
        logits[7] = value if position == 300 else logits[7]
        return logits

    with pytest.raises(NotComparable, match=r"^position 300: (NaN|Inf) at token 7$") as raised:
        score(Answering(weights, spoil), model_of(weights), "fp32", passage)
    assert isinstance(raised.value, BadLogits)
    assert raised.value.where == {"position": 300, "token": 7}


def test_the_words_are_the_same_however_it_is_run(weights: Weights, passage: Passage) -> None:
    class Broken(Scored):
        def logits(self, tokens: Sequence[int], state: object) -> np.ndarray:
            found = super().logits(tokens, state)
            if state is not None:
                found[300 - 256, 7], found[301 - 256, 0] = np.inf, np.nan
            return found

    with pytest.raises(BadLogits, match=r"^position 300: Inf at token 7$"):
        score(Broken(weights), model_of(weights), "fp32", passage)


def test_a_session_may_reuse_its_buffer(weights: Weights, passage: Passage, cache: Path) -> None:
    class Reusing(Scored):
        buffer = np.empty((256, 256), np.float32)

        def forward(self, tokens: Sequence[int], state: object) -> tuple[np.ndarray, object]:
            found = super().forward(tokens, state)
            self.buffer[:] = np.nan
            return found

        def logits(self, tokens: Sequence[int], state: object) -> np.ndarray:
            out = self.buffer[: len(tokens)]
            out[:] = super().logits(tokens, state)
            return out

    found, right = (score(kind(weights), model_of(weights), "fp32", passage) for kind in (Reusing, Scored))
    assert np.array_equal(found.nll, right.nll)
    assert np.array_equal(found.kl, right.kl)


@pytest.mark.parametrize("spoil", [lambda x, at: x[:-1], lambda x, at: x.tolist(), lambda x, at: x.astype(np.float64)])
def test_what_is_no_logits_is_no_result(spoil: object, weights: Weights, passage: Passage) -> None:
    with pytest.raises(NotComparable, match="position 0: returned"):
        score(Answering(weights, spoil), model_of(weights), "fp32", passage)


def test_weights_on_which_the_reference_itself_fails(weights: Weights, passage: Passage) -> None:
    broken = weights.map(
        lambda name, tensor: Tensor.of(tensor.array() * np.float32("nan")) if name == "ln_out.bias" else tensor
    )
    with pytest.raises(NotComparable, match="the reference itself gives NaN"):
        score(Answering(weights), model_of(broken), "fp32", passage)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_passage(cache: Path) -> None:
    """65536 tokens of vocabulary: 512 positions more would be 256 MiB in float64, three times."""
    config = Config(n_layer=1, n_embd=32, n_ffn=32, n_vocab=65536)
    weights = synthetic(config, 0)
    ids = np.random.default_rng(0).integers(0, 65536, 769)
    session = Scored(weights)
    assert call_length(65536) == 64
    peaks = []
    for positions in (256, 768):
        passage = Passage("ids", ids[:positions], ids[1 : positions + 1], None, 128)
        tracemalloc.start()
        try:
            score(session, Model("wide", weights, "wide"), "Q4_0", passage)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + (4 << 20)
