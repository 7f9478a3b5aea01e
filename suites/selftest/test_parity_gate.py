"""The judge is judged: the clean control passes, every scripted fault is caught and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import faulty
from backends.api import Session
from backends.faulty import FAULTS
from backends.numpy_reference import NumpySession
from harness.checks import Check, worst
from harness.compare import logits_error
from harness.measure import Samples, Sampling, measure_decode, measure_first_call, measure_prefill
from harness.parity import Gate, gate
from harness.timed_check import decode_checks, following, long_check, prefill_checks, returned_check
from harness.tolerance import K, Truth, beyond_gate, derive
from harness.trace_point import first_bad_point
from reference.config import Config
from reference.forward import STATE_ROWS, forward
from reference.numerics import Arithmetic
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

CONFIG = Config(3, 64, 256, 120)
WEIGHTS = synthetic(CONFIG, 2).in_memory()
TOKENS = np.random.default_rng(2).integers(0, CONFIG.n_vocab, 48)

#: Fault -> what the first failing check must say.
CAUGHT = {
    "nan": "decode: NaN at position 39, token 7",
    "inf": "decode: Inf at position 39, token 7",
    "drift": "decode (position",
    "late": "decode (position 4",
    "state": "decode (position 1",
    "mutation": "replay of position 1",
    "second-call": "decode (position",
    "dtype": "position 0: returned float64, not float32",
    "shape": "position 0: returned shape (119,), not (120,)",
    "list": "position 0: returned list, not a numpy array",
    "empty": "position 0: returned shape (0,), not (120,)",
}


@pytest.fixture(scope="module")
def truth() -> Truth:
    return derive(WEIGHTS, "fp32", Arithmetic(), TOKENS)


def judged(fault: str, truth: Truth) -> Gate:
    return gate(faulty.load(WEIGHTS, "fp32", fault, None), truth)


def test_the_clean_control_passes(truth: Truth) -> None:
    found = judged("clean", truth)
    assert found.passed
    assert found.first_bad is None
    assert {check.name for check in found.logits} >= {
        "decode",
        "prefill",
        "chunks",
        "handover",
        "replay of position 47",
    }
    assert {check.name for check in found.state} == {"state after decode", "state after prefill"}


@pytest.mark.parametrize("fault", CAUGHT)
def test_every_fault_is_caught_and_named(fault: str, truth: Truth) -> None:
    found = judged(fault, truth)
    assert not found.passed
    assert CAUGHT[fault] in str(found.first_bad)


def test_the_list_of_faults_is_complete() -> None:
    assert set(FAULTS) == {*CAUGHT, "clean", "exception"}


def test_an_exception_is_the_callers_to_report(truth: Truth) -> None:
    with pytest.raises(RuntimeError, match="kernel launch failed"):
        judged("exception", truth)


def test_an_empty_gate_has_proved_nothing() -> None:
    assert not Gate((), ()).passed


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 2.0])
def test_a_check_fails_unless_the_error_is_known_to_be_small(error: float) -> None:
    check = Check("decode", "rms", error, 1.0, "here")
    assert not check.passed
    assert not Gate((check,), ()).passed
    assert worst([Check("other", "rms", 0.9, 1.0, "there"), check]) is check


PROMPT = [int(t) for t in np.random.default_rng(3).integers(0, CONFIG.n_vocab, 200)]


class Long(faulty.FaultySession):
    """Right for every prompt of up to 64 tokens, and with a wrong state after longer ones."""

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, new = super().forward(tokens, state)
        if len(tokens) > 64:
            new[1][0, 0, 3] += 0.01
        return logits, new


class Late(faulty.FaultySession):
    """Wrong once more than 100 tokens lie behind, however they were run."""

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, new = super().forward(tokens, state)
        return (logits[::-1].copy() if new[0] > 100 else logits), new


class Buffer(faulty.FaultySession):
    """Returns the same array for every prompt, and a wrong one for long prompts."""

    def __init__(self, weights: Weights, fault: str) -> None:
        super().__init__(weights, fault)
        self.buffer = np.zeros(CONFIG.n_vocab, np.float32)

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, new = super().forward(tokens, state)
        self.buffer[:] = logits[::-1] if len(tokens) > 64 else logits
        return self.buffer, new


@pytest.fixture(scope="module")
def beyond() -> np.ndarray:
    found = beyond_gate(WEIGHTS, "fp32", PROMPT, following(PROMPT))
    assert found is not None
    return found


@pytest.mark.parametrize("wrong", [Long, Late, Buffer])
def test_an_error_beyond_the_gate_is_found_at_the_timed_length(
    wrong: type[faulty.FaultySession], truth: Truth, beyond: np.ndarray
) -> None:
    assert gate(wrong(WEIGHTS, "clean"), truth).passed
    bad = long_check(wrong(WEIGHTS, "clean"), PROMPT, truth, beyond)
    assert not bad.passed
    assert "200 tokens in one call" in str(bad)
    assert long_check(faulty.FaultySession(WEIGHTS, "clean"), PROMPT, truth, beyond).passed


@pytest.mark.parametrize("wrong", [Long, Buffer])
def test_without_truth_a_wrong_length_of_call_is_found_still(wrong: type[faulty.FaultySession], truth: Truth) -> None:
    assert not long_check(wrong(WEIGHTS, "clean"), PROMPT, truth, None).passed
    found = long_check(faulty.FaultySession(WEIGHTS, "clean"), PROMPT, truth, None)
    assert found.passed
    assert "against itself in short calls only" in str(found)


class Tiring(faulty.FaultySession):
    """Right for the first calls, stale after them."""

    def __init__(self, weights: Weights, fault: str, good: int = 10**9) -> None:
        super().__init__(weights, fault)
        self.good, self.stale = good, np.zeros(CONFIG.n_vocab, np.float32)

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, new = super().forward(tokens, state)
        self.good -= 1
        return (logits if self.good >= 0 else self.stale), new


class Remembering(faulty.FaultySession):
    """Times like a cache: the logits of the first long prompt for every long prompt."""

    known: np.ndarray | None = None

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, new = super().forward(tokens, state)
        if len(tokens) > 64:
            self.known = logits if self.known is None else self.known
            return self.known, new
        return logits, new


def timed(session: Session) -> tuple[Samples, Samples]:
    sampling = Sampling(repeats=3, warmup=1)
    return measure_prefill(session, PROMPT, sampling), measure_decode(session, PROMPT, 20, sampling)


def failing(session: Session, truth: Truth) -> list[str]:
    prefill, decode = timed(session)
    checks = [*prefill_checks(session, truth, prefill), *decode_checks(session, PROMPT, truth, decode)]
    return [str(check) for check in checks if not check.passed]


def test_what_the_timed_calls_returned_is_judged(truth: Truth) -> None:
    assert failing(faulty.FaultySession(WEIGHTS, "clean"), truth) == []
    assert "decode after timing" in failing(Tiring(WEIGHTS, "clean", 60), truth)[0]
    assert any(text.startswith("timed prefill") for text in failing(Remembering(WEIGHTS, "clean"), truth))


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_wrong_first_call_is_caught(value: float, truth: Truth) -> None:
    class Cold(faulty.FaultySession):
        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            logits, new = super().forward(tokens, state)
            return (np.full_like(logits, value) if self._calls == 1 else logits), new

    for session, passes in ((Cold(WEIGHTS, "clean"), False), (faulty.FaultySession(WEIGHTS, "clean"), True)):
        first = measure_first_call(session, PROMPT)
        assert returned_check("first call", session, truth, first).passed == passes


def test_a_greedy_loop_that_stops_computing_while_timed_is_caught(truth: Truth) -> None:
    class Lazy(faulty.FaultySession):
        def greedy(self, token: int, state: Any, n: int) -> tuple[np.ndarray, Any]:
            ids = []
            for step in range(n):
                if step < 16:
                    logits, state = self.forward([token], state)
                    token = int(logits.argmax())
                ids.append(token if step < 16 else 0)
            return np.array(ids), state

    assert gate(Lazy(WEIGHTS, "clean"), truth).passed
    assert any(text.startswith("timed decode") for text in failing(Lazy(WEIGHTS, "clean"), truth))


def test_a_greedy_loop_that_leaves_a_wrong_state_is_caught(truth: Truth) -> None:
    class Forgetful(Greedy):
        rank = -1

        def greedy(self, token: int, state: Any, n: int) -> tuple[np.ndarray, Any]:
            return super().greedy(token, state, n)[0], state

    assert "greedy state" in str(gate(Forgetful(WEIGHTS, "clean"), truth).first_bad)


def test_scoring_that_ignores_its_state_is_caught(truth: Truth) -> None:
    class Stateless(faulty.FaultySession):
        def logits(self, tokens: Sequence[int], state: Any) -> np.ndarray:
            return forward(WEIGHTS, tokens, all_logits=True)[0]

    assert "scoring" in str(gate(Stateless(WEIGHTS, "clean"), truth).first_bad)


def test_a_state_wrong_after_prefill_only_is_caught_without_seeing_it(truth: Truth) -> None:
    class Blind:
        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            logits, new = forward(WEIGHTS, tokens, state)
            if len(tokens) > 40:
                new[1, 2] *= 1.01
            return logits, new

    assert "step" in str(gate(Blind(), truth).first_bad)


@pytest.mark.parametrize("hidden", [{"pp": 1e30, "aa": 0.0, "bb": 0.0}, {"pp": 50.0}])
def test_a_wrong_state_cannot_hide_behind_its_exponent(hidden: dict[str, float], truth: Truth) -> None:
    class Hiding(faulty.FaultySession):
        def export_state(self, state: Any) -> np.ndarray:
            out = super().export_state(state)
            for name, value in hidden.items():
                out[1, STATE_ROWS.index(name), :20] = value
            return out

    assert not gate(Hiding(WEIGHTS, "clean"), truth).passed


class Greedy(faulty.FaultySession):
    """A greedy loop that feeds the second most likely token."""

    rank = -2

    def greedy(self, token: int, state: Any, n: int) -> tuple[np.ndarray, Any]:
        ids = []
        for _ in range(n):
            logits, state = self.forward([token], state)
            token = int(np.argsort(logits)[self.rank])
            ids.append(token)
        return np.array(ids), state


def test_a_greedy_loop_that_chooses_otherwise_is_caught(truth: Truth) -> None:
    assert "greedy" in str(gate(Greedy(WEIGHTS, "clean"), truth).first_bad)
    right = Greedy(WEIGHTS, "clean")
    right.rank = -1
    assert gate(right, truth).passed


# The bound itself.


def test_the_bound_is_k_times_the_error_of_the_arithmetic(truth: Truth) -> None:
    """fp32 weights in fp32: e is some units of 2^-24, grown over three layers, nothing like 1e-3."""
    assert 2.0**-24 < truth.e_rms < 1e-5
    ratios = truth.logits_ratios(logits_error(truth.logits, truth.logits))
    assert all(error == 0 for error, _ in ratios.values())
    assert ratios["rms"][1] == K * truth.e_rms


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (Arithmetic("fp16", "fp32", "fp16"), Arithmetic()),
        (Arithmetic("bf16", "fp32", "bf16"), Arithmetic("fp16", "fp32", "fp16")),
        (Arithmetic("int8x32"), Arithmetic()),
    ],
)
def test_a_backend_must_be_as_good_as_it_declares(narrow: Arithmetic, wide: Arithmetic) -> None:
    """What computes in the narrow arithmetic passes as that, and fails where it claims the wide one."""

    class Emulating:
        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            logits, new = forward(WEIGHTS, tokens, state, arithmetic=narrow, seed=99)
            return logits.astype(np.float32), new

    assert gate(Emulating(), derive(WEIGHTS, "fp32", narrow, TOKENS)).passed
    assert not gate(Emulating(), derive(WEIGHTS, "fp32", wide, TOKENS)).passed


def test_a_declaration_much_looser_than_the_error_is_noticed() -> None:
    found = judged("clean", derive(WEIGHTS, "fp32", Arithmetic("bf16", "fp32", "bf16"), TOKENS))
    assert found.passed
    assert found.loose


def test_judging_other_weights_than_were_loaded_fails(truth: Truth) -> None:
    def one_off(name: str, tensor: Tensor) -> Tensor:
        array = tensor.array().copy()
        if name == "blocks.2.att.time_first":
            array[5] += 0.01
        return Tensor.of(array)

    assert not gate(faulty.load(WEIGHTS.map(one_off), "fp32", "clean", None), truth).passed


def test_truth_is_cached_by_content_and_a_damaged_cache_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    fresh = derive(WEIGHTS, "fp32", Arithmetic(), TOKENS, "key")
    (file,) = (tmp_path / "truth").iterdir()
    again = derive(
        Weights.of(CONFIG, {n: t.array() * 0 for n, t in WEIGHTS.items()}), "fp32", Arithmetic(), TOKENS, "key"
    )
    np.testing.assert_array_equal(again.logits, fresh.logits)  # read, not computed from those zeros
    for damage in (b"", b"PK\x03\x04 not a zip", file.read_bytes()[:1000]):
        file.write_bytes(damage)
        redone = derive(WEIGHTS, "fp32", Arithmetic(), TOKENS, "key")
        np.testing.assert_array_equal(redone.logits, fresh.logits)
    assert derive(WEIGHTS, "fp32", Arithmetic("bf16"), TOKENS, "key").e_rms > 10 * fresh.e_rms


class Traced(faulty.FaultySession):
    """Wrong from one trace point on: the square of the squared ReLU is forgotten in layer 1."""

    def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
        spoiled = {"blocks.1.ffn.k2": np.sqrt, "blocks.1.ffn.v": np.sqrt}

        def look(name: str, x: np.ndarray) -> None:
            with np.errstate(invalid="ignore"):
                tap(name, spoiled.get(name, np.asarray)(x))

        return forward(WEIGHTS, tokens, None, tap=look)


def test_the_first_bad_trace_point_is_named() -> None:
    tokens = [int(t) for t in TOKENS]
    point = first_bad_point(Traced(WEIGHTS, "clean"), WEIGHTS, Arithmetic(), tokens)
    assert point is not None
    assert point.name == "blocks.1.ffn.k2"
    assert point.error is not None
    assert point.bound is not None
    assert point.error > point.bound
    assert first_bad_point(faulty.FaultySession(WEIGHTS, "clean"), WEIGHTS, Arithmetic(), tokens) is None
    assert first_bad_point(NumpySession(WEIGHTS, None), WEIGHTS, Arithmetic(), tokens) is None


def test_an_overflow_is_named_where_it_happens() -> None:
    """fp16 that overflows in ffn.k2 of layer 1 is found there, not at the NaN it becomes later."""
    fp16 = Arithmetic("fp16", "fp32", "fp16")
    name = "blocks.1.ffn.key.weight"
    loud = WEIGHTS.map(lambda n, t: Tensor.of(t.array() * np.float32(300)) if n == name else t)

    class Emulating:
        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            logits, new = forward(loud, tokens, state, arithmetic=fp16, seed=9)
            return logits.astype(np.float32), new

        def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
            return forward(loud, tokens, state, arithmetic=fp16, seed=9, tap=tap)

    found = gate(Emulating(), derive(loud, "fp32", fp16, TOKENS))
    assert "NaN at position" in str(found.first_bad)
    assert "blocks.1.ffn.k2: Inf at token" in str(first_bad_point(Emulating(), loud, fp16, TOKENS))
