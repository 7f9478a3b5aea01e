"""Quality's parts one by one: intervals, passages, the cached baseline, scores."""

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
from harness.models import Model, open_model
from harness.quality import baseline
from harness.quality.baseline import call_length, log_probabilities
from harness.quality.intervals import (
    Mean,
    edges,
    exponential,
    fraction,
    mean,
    not_negative,
    positive,
    ratio,
    student,
    wilson,
)
from harness.quality.passage import HELD_OUT, Passage, passage_of
from harness.quality.scores import BadLogits, divergence, overlap, score
from harness.without_codec import NotComparable
from reference.config import Config
from reference.errors import InputError
from reference.forward import forward
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.conftest import SMALL
from suites.selftest.vocabularies import data_file

# --- intervals -------------------------------------------------------------------------------------------------------


def interval(found: Mean) -> tuple[float, float]:
    """The interval of a mean that has one."""
    assert found.interval is not None
    return found.interval


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (7, 2.364624), (30, 2.042272), (31, 2.039513), (120, 1.979930)],
)
def test_student_is_the_table(degrees: int, expected: float) -> None:
    assert student(degrees) == pytest.approx(expected, abs=1e-6)


def test_wilson_is_the_textbook() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = wilson(1.0, 2000)
    assert 0.998 < low < 0.9982
    assert high == 1


def test_blocks_are_segments_by_their_place_or_runs() -> None:
    """Of segments that are far apart, every one to 32 is a block; of near ones as many as are far enough apart."""
    assert edges(384, 128).tolist() == [0, 128, 256, 384]
    assert len(edges(64 * 128, 128)) - 1 == 32
    assert [len(edges(4096, 128, spacing)) - 1 for spacing in (38, 16, 8, 4, 1)] == [32, 32, 16, 8, 8]
    assert set(np.diff(edges(4096, 128, 4))) == {512}
    assert np.diff(edges(1000, 0)).tolist() == [125] * 8
    with pytest.raises(ValueError, match="compared with each other"):
        edges(128, 128)


def test_a_mean_is_the_mean_and_its_interval_that_of_the_blocks() -> None:
    values = np.arange(64.0)
    found = mean(values, edges(64, 8))
    blocks = 3.5 + 8 * np.arange(8)
    half = 2.36462425 * blocks.std(ddof=1) / math.sqrt(8)
    assert found.value == 31.5
    assert found.blocks == tuple(blocks)
    assert found.interval == pytest.approx((31.5 - half, 31.5 + half))
    assert exponential(found).value == pytest.approx(math.exp(31.5))


def test_fewer_than_eight_blocks_have_no_interval() -> None:
    blocks = edges(7 * 16, 16)
    values = np.arange(112.0)
    for found in (mean(values, blocks), positive(values, blocks), fraction(values / 112, blocks)):
        assert (found.interval, len(found.blocks)) == (None, 7)
    assert exponential(mean(values, blocks)).interval is None


def test_no_interval_leaves_what_is_possible() -> None:
    """A surprise that is mostly zero: perplexity from 1, bits from 0."""
    values = np.zeros(128)
    values[3] = 100.0
    found = positive(values, edges(128, 16))
    assert interval(found)[0] == 0
    assert interval(exponential(found))[0] == 1
    assert interval(not_negative(ratio(values, np.ones(128), edges(128, 16))))[0] == 0


def test_beyond_float64_is_infinite() -> None:
    found = exponential(mean(np.full(128, 1e38), edges(128, 16)))
    assert (found.value, found.interval) == (math.inf, None)
    low, high = np.full(64, 0.0), np.full(64, 1400.0)
    assert exponential(mean(np.concatenate([low, high]), edges(128, 16))).interval is None


def test_a_ratio_weighs_its_positions() -> None:
    values, weights = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 1.0, 2.0, 4.0])
    found = ratio(np.tile(values, 4), np.tile(weights, 4), np.arange(0, 17, 2))
    assert found.value == 1.5
    assert found.blocks == (1.5,) * 8
    assert found.interval == pytest.approx((1.5, 1.5))


def test_what_never_varied_is_not_certain() -> None:
    found = fraction(np.ones(2048), edges(2048, 64))
    assert found.value == 1
    assert interval(found)[0] < 0.9985
    assert positive(np.zeros(2048), edges(2048, 64)).interval == (0, 0)


@pytest.mark.parametrize("kind", ["mean", "fraction"])
def test_intervals_cover_dependent_positions(kind: str) -> None:
    """Segments with a level of their own and alike neighbours: about 95 % of intervals hold the true mean."""
    rng = np.random.default_rng(7)
    hits, trials = 0, 400
    for _ in range(trials):
        level = np.repeat(rng.normal(0, 0.5, 32), 64)
        noise = rng.normal(size=(32, 64))
        for t in range(1, 64):
            noise[:, t] += 0.6 * noise[:, t - 1]
        values = np.exp(0.5 * (level + noise.ravel()))
        if kind == "fraction":
            values, truth = (values > 1).astype(float), 0.5
            found = fraction(values, edges(2048, 64))
        else:
            found = mean(values, edges(2048, 64))
            variances = [sum(0.36**j for j in range(t + 1)) for t in range(64)]
            truth = float(np.mean([math.exp(0.125 * (0.25 + v)) for v in variances]))
        low, high = interval(found)
        hits += low <= truth <= high
    assert 0.91 <= hits / trials <= 0.985


# --- passages --------------------------------------------------------------------------------------------------------


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
