"""Text from a session: sampling, reproducibility, streaming, and what ends it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from harness.generate import NonFiniteLogits, Speed, choose, generate, speeds
from suites.selftest.conftest import Done
from suites.selftest.scripted import VOCAB, FakeClock, Scripted

Bench = Callable[..., Done]
LOGITS = arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-30, 30, width=32))


@given(LOGITS, st.integers(0, 100))
def test_no_temperature_and_no_mass_are_greedy(logits: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert choose(logits, 0, 0.9, rng) == choose(logits, 1, 0, rng) == int(logits.argmax())


@given(LOGITS, st.floats(0.1, 5), st.floats(0.05, 1), st.integers(0, 100))
def test_a_choice_lies_in_the_smallest_set_that_reaches_top_p(
    logits: np.ndarray, temperature: float, top_p: float, seed: int
) -> None:
    chosen = choose(logits, temperature, top_p, np.random.default_rng(seed))
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    p /= p.sum()
    better = p[p > p[chosen]].sum()
    assert better < top_p or np.isclose(better, top_p)


def test_choices_follow_the_distribution() -> None:
    rng, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.3, 0.2], np.float32))
    counts = np.bincount([choose(logits, 1, 1, rng) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.03


def run(session: Any, prompt: Sequence[int], n: int, **options: Any) -> list[int]:
    return list(generate(session, prompt, n, temperature=0, **options))


def test_ids_continue_the_prompt_and_times_leave_sampling_out() -> None:
    clock = FakeClock()
    speed = Speed()
    assert run(Scripted(clock, [700, 10]), [0, 0, 0], 4, speed=speed, clock=clock) == [3, 4, 0, 1]
    assert speed == Speed(prompt_tokens=3, prompt_ns=700, decode_tokens=3, decode_ns=30)
    assert speeds(speed).startswith("prefill 3 tokens at ")
    assert speeds(Speed(1, 1000)) == "prefill 1 token at 1000000.0 tok/s"


def test_it_ends_at_the_end_of_text() -> None:
    assert run(Scripted(FakeClock(), [1]), [0], 10, stop=4) == [1, 2, 3]
    assert len(run(Scripted(FakeClock(), [1]), [0], 2 * VOCAB, stop=None)) == 2 * VOCAB


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_it_by_name(bad: float) -> None:
    ids: list[int] = []
    with pytest.raises(NonFiniteLogits, match=r"(NaN|Inf) in logit 2 at generated token 3"):
        ids.extend(run(Scripted(FakeClock(), [1], bad={3: bad}), [0], 10))


def text(bench: Bench, small: str, *options: str) -> str:
    done = bench("generate", "The list", "--model", small, "--threads", "1", "--tokens", "24", *options)
    assert done.code == 0
    assert re.search(r"prefill 8 tokens at .* tok/s, decode 23 tokens at .* tok/s", done.err)
    assert "not checked for parity" in done.err
    return done.out


def test_seeds_reproduce(small: str, bench: Bench) -> None:
    assert text(bench, small, "--seed", "5") == text(bench, small, "--seed", "5")
    assert text(bench, small, "--seed", "5") != text(bench, small, "--seed", "6")
    assert text(bench, small, "--temperature", "0") == text(bench, small, "--temperature", "0", "--seed", "9")


def test_backends_and_schemes_write_the_same_greedy_text(small: str, bench: Bench) -> None:
    expected = text(bench, small, "--temperature", "0")
    assert expected.startswith("The list")
    assert text(bench, small, "--temperature", "0", "--quant", "q0f32") == expected
    assert text(bench, small, "--temperature", "0", "--quant", "int4")  # a class is its first scheme
    pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")
    assert text(bench, small, "--temperature", "0", "--backend", "torch") == expected


def test_the_embedded_model_writes_words(bench: Bench) -> None:
    done = bench("generate", "The list", "--temperature", "0", "--threads", "1", "--tokens", "40")
    assert len(re.findall(r"\b[a-z]{2,}\b", done.out)) >= 6


class Stream(io.StringIO):
    """Standard output that remembers its flushes."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_text_appears_as_it_is_made(small: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    bench("generate", "x", "--model", small, "--tokens", "8", "--threads", "1")
    assert stream.flushed[0] == "x"
    assert len(set(stream.flushed)) > 4


@pytest.mark.parametrize(("data", "code"), [(b"def", 0), (b"\xff\xfe", 0), (b"", 2)])
def test_a_prompt_from_standard_input(
    data: bytes, code: int, small: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    done = bench("generate", "-", "--model", small, "--tokens", "2", "--threads", "1")
    assert done.code == code
    assert done.out.startswith(data.decode("utf-8", "replace"))


def test_bytes_in_an_argument_that_are_no_text(small: str, bench: Bench) -> None:
    done = bench("generate", "a\udcff", "--model", small, "--tokens", "2", "--threads", "1")
    assert done.code == 0
    assert done.out.startswith("a\ufffd")


def test_a_failing_backend_is_1_and_what_it_wrote_is_kept(small: str, bench: Bench) -> None:
    options = ("--backend", "faulty", "--device", "nan", "--threads", "1", "--tokens", "60")
    done = bench("generate", "x", "--model", small, *options)
    assert done.code == 1
    assert len(done.out) > 20
    assert (
        done.err
        == "rwkv-bench: faulty: NaN in logit 7 at generated token 39; rwkv-bench parity shows where it begins\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cuda"), "numpy does not run on cuda"),
        (("--backend", "faulty", "--device", "clean", "--quant", "Q4_0"), "faulty has no scheme Q4_0"),
    ],
)
def test_what_is_not_offered_is_3(options: tuple[str, ...], words: str, small: str, bench: Bench) -> None:
    done = bench("generate", "x", "--model", small, *options)
    assert (done.code, done.out) == (3, "")
    assert words in done.err


def test_a_missing_vocabulary_is_one_line(bench: Bench, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = bench("generate", "x", "--model", "169m", "--threads", "1")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "20B_tokenizer.json" in done.err
    assert str(tmp_path) in done.err
