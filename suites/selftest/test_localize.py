"""Where a backend goes wrong: planted faults in backends that show everything, their state, or only logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.api import Session, Unsupported
from harness.localize import localize
from harness.localize.evidence import Opener
from harness.localize.finding import (
    BAD_WEIGHTS,
    CLEAN,
    DIVERGED,
    LOGITS,
    NON_FINITE,
    STATE,
    TRACE,
    TRUNCATION,
    Finding,
)
from harness.localize.report import as_json, as_text
from reference.config import Config
from reference.errors import TokenError
from reference.forward import PP
from reference.numerics import Arithmetic, Emulated, Exact, Op
from reference.operations import Here, recurrence, run
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights
from suites.selftest.conftest import Done

CONFIG = Config(n_layer=4, n_embd=64, n_ffn=128, n_vocab=96)
WEIGHTS = synthetic(CONFIG, 5).in_memory(np.float32)
TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 40)]
FP32, FP16 = Arithmetic(), Arithmetic("fp16", "fp32", "fp16")

Faults = Mapping[str, Callable[[Here], Any]]


def log_decay(h: Here) -> Any:
    """The stored logarithm taken for the decay itself: layers decay at another speed."""
    weights = h.weights.map(
        lambda name, t: Tensor.of(t.array() + np.float32(0.1)) if name.endswith("time_decay") else t
    )
    return recurrence(h._replace(weights=weights))


def no_square(h: Here) -> np.ndarray:
    return np.asarray(np.maximum(h.read("ffn.k"), 0))


def unshifted(h: Here) -> np.ndarray:
    """The present token where the one before belongs."""
    return h.read("ln1")


def scaled(name: str, weight: str) -> Callable[[Here], np.ndarray]:
    """A product with a scale that is 3 % off."""
    return lambda h: h.op.linear(h.read(name), h.weights[h.at + weight]) * np.float32(1.03)


class Faulty:
    """The reference with some operations replaced; shows logits only."""

    def __init__(self, weights: Weights, faults: Faults, arithmetic: Arithmetic = FP32) -> None:
        self.weights, self.arithmetic, self.calls = weights, arithmetic, 0
        points = {f"blocks.{i}." for i in range(weights.config.n_layer)}
        self.faults = {p: f for p, f in faults.items() if not p.startswith("blocks.") or p[:9] in points}

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        op: Op = Exact() if self.arithmetic == FP32 else Emulated(self.arithmetic)
        return run(self.weights, tokens, state, op, tap, self.faults)

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = self._run(tokens, state)
        return logits[-1].astype(np.float32), after


class Stateful(Faulty):
    """Shows its state as well."""

    def export_state(self, state: Any) -> np.ndarray:
        return np.array(state, dtype=np.float32)

    def import_state(self, canonical: np.ndarray) -> Any:
        return np.array(canonical, dtype=np.float32)


class Traced(Stateful):
    """Shows everything, or the trace points that end in ``shown``."""

    shown: tuple[str, ...] = ("",)

    def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
        def look(name: str, x: np.ndarray) -> None:
            if name.endswith(self.shown):
                tap(name, x.astype(np.float32))

        logits, after = self._run(tokens, state, look)
        return logits[-1].astype(np.float32), after


def opener(make: Callable[[Weights], Session]) -> Opener:
    @contextmanager
    def opened(weights: Weights) -> Iterator[Session]:
        yield make(weights)

    return opened


def found(
    make: Callable[[Weights], Any], arithmetic: Arithmetic = FP32, weights: Weights = WEIGHTS, **options: Any
) -> Finding:
    options = {"fix": False, **options}
    return localize(opener(make), weights, "fp32", arithmetic, options.pop("tokens", TOKENS), **options)


KINDS: dict[str, type[Faulty]] = {TRACE: Traced, STATE: Stateful, TRUNCATION: Faulty}
FAULTS: dict[str, Faults] = {
    "blocks.2.att.wkv": {"blocks.2.att.wkv": log_decay},
    "blocks.1.ffn.k2": {"blocks.1.ffn.k2": no_square},
    "blocks.3.att.xk": {"blocks.3.att.xk": unshifted},
    "blocks.0.ffn.v": {"blocks.0.ffn.v": scaled("ffn.k2", "ffn.value.weight")},
    "logits": {"logits": scaled("ln_out", "head.weight")},
}


#: In half precision without trace points, one fault is tried on every run, and all with ``--slow``.
FOUND = [
    pytest.param(
        point,
        arithmetic,
        method,
        id=f"{point}-{arithmetic}-{method}",
        marks=pytest.mark.slow if arithmetic is FP16 and method != TRACE and point != "blocks.2.att.wkv" else (),
    )
    for point in FAULTS
    for arithmetic in (FP32, FP16)
    for method in KINDS
]


@pytest.mark.parametrize(("point", "arithmetic", "method"), FOUND)
def test_a_wrong_operation_is_found(point: str, arithmetic: Arithmetic, method: str) -> None:
    """By name where it is shown, by its layer and half where it is not; and it does not overflow."""
    made = KINDS[method]
    finding = found(lambda weights: made(weights, FAULTS[point], arithmetic), arithmetic)
    assert (finding.verdict, finding.method) == (DIVERGED, method)
    assert finding.layer == (None if point == "logits" else int(point.split(".")[1]))
    assert finding.point == point or point in finding.span
    if method == TRACE:
        assert (finding.point, finding.span, finding.watched) == (point, (), "same")
    assert finding.error is not None
    assert finding.bound is not None
    assert finding.error > finding.bound
    assert finding.prompt
    assert len(finding.prompt) < len(TOKENS)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("arithmetic", [FP32, FP16], ids=str)
def test_a_right_backend_is_clean(arithmetic: Arithmetic, method: str) -> None:
    finding = found(lambda weights: KINDS[method](weights, {}, arithmetic), arithmetic)
    assert finding.verdict == CLEAN
    assert finding.prompt == ()
    assert not any(seen.bad for seen in finding.history)


LOUD = WEIGHTS.map(lambda n, t: Tensor.of(t.array() * np.float32(600)) if n == "blocks.1.ffn.key.weight" else t)


@pytest.mark.parametrize("method", KINDS)
def test_an_overflow_is_followed_back(method: str) -> None:
    """Inf in ffn.k2, which state and logits show as NaN much later."""
    finding = found(lambda weights: KINDS[method](weights, {}, FP16), FP16, LOUD)
    assert (finding.verdict, finding.method) == (NON_FINITE, method)
    assert (finding.layer, finding.point) == (1, "blocks.1.ffn.k2")
    assert len(finding.prompt) == 1


def _negative(name: str, tensor: Tensor) -> Tensor:
    """Keys of one channel of layer 1 are far below -65504."""
    x = np.array(tensor.array())
    if name == "blocks.1.ln2.bias":
        x[3] = 16
    elif name == "blocks.1.ffn.key.weight":
        x[:, 3], x[5] = 0, 0
        x[5, 3] = -8000
    elif name == "blocks.1.ffn.receptance.weight":
        x[:, 3] = 0
    else:
        return tensor
    return Tensor.of(x)


NEGATIVE = WEIGHTS.map(_negative)


def test_a_negative_key_beyond_the_format_is_no_fault() -> None:
    """It is -Inf in fp16, of which ReLU makes the right 0; parity passes, and so does this."""
    finding = found(lambda weights: Traced(weights, {}, FP16), FP16, NEGATIVE)
    assert finding.verdict == CLEAN, finding
    assert not any(seen.bad for seen in finding.history)


@pytest.mark.parametrize("point", ["blocks.1.ffn.k", "blocks.1.ffn.k2"])
def test_beside_a_negative_key_beyond_the_format_faults_are_seen(point: str) -> None:
    faults = {"blocks.1.ffn.k": scaled("ffn.xk", "ffn.key.weight"), "blocks.1.ffn.k2": no_square}
    finding = found(lambda weights: Traced(weights, {point: faults[point]}, FP16), FP16, NEGATIVE)
    assert (finding.verdict, finding.point) == (DIVERGED, point)
    hidden = found(lambda weights: Sparse(weights, {point: faults[point]}, FP16), FP16, NEGATIVE)
    assert (hidden.verdict, hidden.point) == (DIVERGED, "blocks.1.ffn.residual")
    assert point in hidden.span


def test_minus_infinity_where_the_right_key_fits_is_a_fault() -> None:
    def broken(h: Here) -> np.ndarray:
        k = h.op.linear(h.read("ffn.xk"), h.weights[h.at + "ffn.key.weight"])
        return np.where(k < 0, -np.inf, k)

    finding = found(lambda weights: Traced(weights, {"blocks.1.ffn.k": broken}, FP16), FP16, NEGATIVE)
    assert (finding.verdict, finding.point) == (NON_FINITE, "blocks.1.ffn.k")


def test_an_overflow_after_a_negative_key_beyond_the_format_is_not_laid_to_the_key() -> None:
    """The backend shows neither; of what is not shown, ffn.k2 is the first that does harm."""
    loud = NEGATIVE.map(lambda n, t: Tensor.of(t.array() * np.float32(600)) if n == "blocks.1.ffn.key.weight" else t)
    for made in (Sparse, Faulty):
        finding = found(partial(made, faults={}, arithmetic=FP16), FP16, loud)
        assert (finding.verdict, finding.point) == (NON_FINITE, "blocks.1.ffn.k2")


class Sparse(Traced):
    shown = ("residual",)


def test_an_overflow_in_a_fused_kernel_is_followed_back() -> None:
    finding = found(lambda weights: Sparse(weights, {}, FP16), FP16, LOUD)
    assert finding.point == "blocks.1.ffn.k2"
    assert any("not shown" in note for note in finding.notes)


def test_a_fused_kernel_is_blamed_with_what_it_hides() -> None:
    finding = found(lambda weights: Sparse(weights, FAULTS["blocks.1.ffn.k2"]))
    assert finding.point == "blocks.1.ffn.residual"
    assert "blocks.1.ffn.k2" in finding.span
    assert all(point.startswith("blocks.1.") for point in finding.span)


def test_a_wrong_operation_comes_before_what_overflows_because_of_it() -> None:
    """Layer 1 hands on a stream that is far too large; ffn.k2 of layer 2 overflows with it."""
    faults: Faults = {"blocks.1.ffn.out": lambda h: h.read("ffn.r") * h.read("ffn.v") * np.float32(3e4)}
    finding = found(lambda weights: Traced(weights, faults, FP16), FP16)
    assert finding.point == "blocks.1.ffn.out"


class ForgetsShift(Traced):
    """Token shift is not carried from one call to the next."""

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        if state is not None:
            state = np.array(state)
            state[2, 1] = 0
        return super()._run(tokens, state, tap)


def test_what_only_a_second_call_gets_wrong() -> None:
    finding = found(lambda weights: ForgetsShift(weights, {}))
    assert finding.method == TRACE
    assert finding.layer == 2
    assert finding.point in ("blocks.2.att.xk", "blocks.2.state.att_x")
    assert any("one call is right" in note for note in finding.notes)


class Lengths(Traced):
    """Wrong in calls of some lengths."""

    wrong: frozenset[int] = frozenset(range(9, 16))

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        faults, self.faults = self.faults, self.faults if len(tokens) in self.wrong else {}
        try:
            return super()._run(tokens, state, tap)
        finally:
            self.faults = faults


class Length12(Lengths):
    """Only where the row of calls that has it ends, on the state that the others have left."""

    wrong = frozenset([12])


@pytest.mark.parametrize(
    ("made", "words"),
    [(Lengths, "the first 9 tokens in one call"), (Length12, "in calls of 1, 2, 3, 4, 5, 6, 7, 8 tokens")],
)
def test_what_only_calls_of_some_lengths_get_wrong(made: type[Lengths], words: str) -> None:
    tokens = [int(i) for i in np.random.default_rng(0).integers(0, 96, 48)]
    finding = found(lambda weights: made(weights, FAULTS["blocks.0.ffn.v"]), tokens=tokens)
    assert (finding.verdict, finding.method, finding.point) == (DIVERGED, TRACE, "blocks.0.ffn.v")
    assert any(words in note for note in finding.notes)
    if made is Lengths:
        assert "1.03" in finding.cause


class ScoresBadly(Lengths):
    """Logits of many positions in calls of 20 tokens, as no row of the gate's has them."""

    wrong = frozenset([20])

    def logits(self, tokens: Sequence[int], state: Any) -> np.ndarray:
        return np.asarray(self._run(tokens, state)[0].astype(np.float32))


def test_what_only_scoring_gets_wrong() -> None:
    finding = found(lambda weights: ScoresBadly(weights, FAULTS["blocks.0.ffn.v"]))
    assert (finding.method, finding.point) == (TRACE, "blocks.0.ffn.v")


class LosesExponent(Traced):
    """Hands on a state without its exponent, wrong only for the next call."""

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        logits, after = super()._run(tokens, state, tap)
        after = np.array(after)
        after[1, PP] = 0
        return logits, after


def test_a_wrong_state_is_seen_before_it_does_harm() -> None:
    finding = found(lambda weights: LosesExponent(weights, {}))
    assert finding.layer == 1
    assert finding.point in ("blocks.1.state.bb", "blocks.1.state.aa")


class WritesBack(Stateful):
    """The state that is passed in is overwritten."""

    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = self._run(tokens, state)
        if state is not None:
            state[...] = after
        return logits[-1].astype(np.float32), after


def test_a_state_that_is_written_to_is_named() -> None:
    finding = found(lambda weights: WritesBack(weights, {}))
    assert finding.method == STATE
    assert "later call has written to it" in finding.cause


class HidesWhenWatched(Traced):
    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = self._run(tokens, state)
        return logits[-1].astype(np.float32) * np.float32(1.5), after


class BreaksWhenWatched(Stateful):
    def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
        tap("emb", np.zeros((len(tokens), CONFIG.n_embd), np.float32))
        raise RuntimeError("no such kernel")


def test_a_fault_that_hides_when_watched_is_told_as_such() -> None:
    finding = found(lambda weights: HidesWhenWatched(weights, {}))
    assert finding.watched == "hidden"
    assert finding.verdict == DIVERGED
    assert finding.method in (STATE, TRUNCATION)
    assert finding.point == "logits" or "logits" in finding.span


def test_a_backend_that_breaks_while_watched_is_looked_at_otherwise() -> None:
    finding = found(lambda weights: BreaksWhenWatched(weights, FAULTS["blocks.1.ffn.k2"]))
    assert (finding.method, finding.layer) == (STATE, 1)
    assert any("broke while watched: RuntimeError: no such kernel" in note for note in finding.notes)
    with pytest.raises(RuntimeError, match="no such kernel"):
        found(lambda weights: BreaksWhenWatched(weights, {}), method=TRACE)


def test_a_backend_that_refuses_to_be_traced_is_looked_at_otherwise() -> None:
    class Refuses(Stateful):
        def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
            raise Unsupported("not on this device")

    finding = found(lambda weights: Refuses(weights, FAULTS["blocks.1.ffn.k2"]))
    assert (finding.method, finding.layer, finding.broke) == (STATE, 1, False)
    assert "trace: not on this device" in finding.notes
    with pytest.raises(Unsupported, match="not on this device"):
        found(lambda weights: Refuses(weights, {}), method=TRACE)


class DiesLater(Traced):
    """Dies in a call of 20 tokens: no method makes one, the search for a short prompt does."""

    error: type[Exception] = KeyError

    def _run(self, tokens: Sequence[int], state: Any, tap: Any = None) -> tuple[np.ndarray, np.ndarray]:
        if len(tokens) == 20 and state is None:
            raise self.error("boom")
        return super()._run(tokens, state, tap)


class DiesOfMemory(DiesLater):
    error = MemoryError


@pytest.mark.parametrize("made", [DiesLater, DiesOfMemory])
def test_a_backend_that_dies_once_it_is_located_loses_nothing(made: type[DiesLater]) -> None:
    faults: Faults = {"blocks.1.ffn.k2": lambda h: no_square(h) ** (1 if len(h.read("ffn.k")) > 19 else 2)}
    finding = found(lambda weights: made(weights, faults))
    assert (finding.verdict, finding.method, finding.point) == (DIVERGED, TRACE, "blocks.1.ffn.k2")
    assert finding.cause
    assert (finding.prompt, finding.prompt_stopped) == (tuple(TOKENS), "a call that broke")
    assert any(f"it broke on 20 tokens: {made.error.__name__}: " in note for note in finding.notes)
    assert finding.broke


def test_a_backend_that_dies_when_it_is_not_watched_any_more_loses_nothing() -> None:
    """Twice: in the run beside the trace, and when it is closed."""

    class Dies(Traced):
        traced = False

        def trace(self, tokens: Sequence[int], state: Any, tap: Any) -> tuple[np.ndarray, Any]:
            self.traced = True
            return super().trace(tokens, state, tap)

        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            if self.traced:
                raise RuntimeError("gone")
            return super().forward(tokens, state)

    @contextmanager
    def closes_badly(weights: Weights) -> Iterator[Session]:
        yield Dies(weights, FAULTS["blocks.1.ffn.k2"])
        raise RuntimeError("not closed")

    finding = localize(closes_badly, WEIGHTS, "fp32", FP32, TOKENS, fix=False)
    assert (finding.method, finding.point) == (TRACE, "blocks.1.ffn.k2")
    assert any("run unwatched again: RuntimeError: gone" in note for note in finding.notes)
    assert any("it broke while it was closed: RuntimeError: not closed" in note for note in finding.notes)


class Uncut(Faulty):
    """A compiled library: one model and no other."""

    def __init__(self, weights: Weights, faults: Faults) -> None:
        if weights is not WEIGHTS:
            raise Unsupported("this library was compiled for 4 layers")
        super().__init__(weights, faults)


def test_a_backend_of_which_only_logits_can_be_had() -> None:
    finding = found(lambda weights: Uncut(weights, FAULTS["blocks.2.att.wkv"]))
    assert (finding.verdict, finding.method, finding.layer) == (DIVERGED, LOGITS, None)
    assert any("compiled for 4 layers" in note for note in finding.notes)
    with pytest.raises(Unsupported, match="--method state: it shows no state"):
        found(lambda weights: Uncut(weights, {}), method=STATE)


class Float64(Faulty):
    def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
        logits, after = super().forward(tokens, state)
        return logits.astype(np.float64), after


def test_what_breaks_the_contract_has_no_layer() -> None:
    finding = found(lambda weights: Float64(weights, {}))
    assert (finding.verdict, finding.layer) == (DIVERGED, None)
    assert "returned float64" in finding.cause


def test_a_bad_weight_is_the_weight_s_fault() -> None:
    """No backend is opened for it."""
    name = "blocks.2.att.value.weight"

    def spoil(value: float) -> Weights:
        spoiled = np.array(WEIGHTS[name].array())
        spoiled[3, 5] = value
        return WEIGHTS.map(lambda n, t: Tensor.of(spoiled) if n == name else t)

    finding = found(lambda weights: pytest.fail("opened"), weights=spoil(np.nan))
    assert (finding.verdict, finding.layer, finding.point) == (BAD_WEIGHTS, 2, "blocks.2.att.v")
    assert name in finding.cause
    stored = localize(opener(lambda weights: pytest.fail("opened")), spoil(1e5), "fp16", FP16, TOKENS)
    assert (stored.verdict, stored.point) == (BAD_WEIGHTS, "blocks.2.att.v")
    assert "stored as fp16" in stored.cause


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(TokenError):
        found(lambda weights: Faulty(weights, {}), tokens=[])


def test_the_shortest_prompt_has_the_token_that_matters() -> None:
    """Only after token 7 has been seen with 9 before it."""

    class Picky(Faulty):
        def forward(self, tokens: Sequence[int], state: Any) -> tuple[np.ndarray, Any]:
            seen, past = ([], None) if state is None else state
            seen = [*seen, *tokens]
            logits, after = self._run(tokens, past)
            last = logits[-1].astype(np.float32)
            if 7 in seen and 9 in seen[: seen.index(7)]:
                last = last * np.float32(np.nan)
            return last, (seen, after)

    tokens = [int(t) for t in TOKENS if t not in (7, 9)]
    tokens[10], tokens[20] = 9, 7
    finding = found(lambda weights: Picky(weights, {}), tokens=tokens)
    assert finding.prompt == (9, 7)


ABOUT = {"backend": "x", "scheme": "fp16", "device": "cpu", "model": "m", "prompt_tokens": 40}


def test_the_report_fits_a_terminal_and_the_json_is_the_design_s() -> None:
    finding = found(lambda weights: Traced(weights, {}, FP16), FP16, LOUD)
    text = as_text(finding, ABOUT, "a" * 300)
    assert max(len(line) for line in text.splitlines() if "aaaa" not in line) <= 80
    assert "blocks.1.ffn.k2" in text
    assert "NON-FINITE" in text
    document = json.loads(as_json(finding, ABOUT))
    wanted = [
        "schema",
        "verdict",
        "method",
        "layer",
        "point",
        "token_index",
        "cause",
        "error",
        "bound",
        "history",
        "fix",
    ]
    assert [name for name in document if name in wanted] == wanted
    assert document["history"][0]["point"] == "emb"
    assert document["error"] is None  # an Inf has no error


def test_ratios_of_the_heat_map_are_those_of_the_history() -> None:
    from harness.localize.heatmap import grid, text

    finding = found(lambda weights: Traced(weights, FAULTS["blocks.1.ffn.k2"]))
    drawn = grid(finding.history)
    assert drawn is not None
    column = drawn.columns.index("k2")
    assert [row[column] is not None and row[column] > 1 for row in drawn.cells[:2]] == [False, True]  # type: ignore[operator]
    assert max(len(line) for line in text(drawn).splitlines()) <= 80
    assert grid(replace(finding, history=()).history) is None


def test_the_command(bench: Callable[..., Done], small: str) -> None:
    base = ("localize", "--model", small, "--in-process", "--threads", "1")
    clean = bench(*base, "--backend", "numpy")
    assert clean.code == 0
    assert "CLEAN" in clean.out
    bad = bench(*base, "--backend", "faulty", "--device", "inf", "--no-fix", "--format", "json")
    assert bad.code == 1
    assert json.loads(bad.out)["verdict"] == "non-finite"
    for argv, words, code in (
        (("--backend", "numpy", "--tokens", ""), "the prompt is empty", 2),
        (("--backend", "numpy", "--tokens", "1,x"), "token ids such as", 2),
        (("--backend", "numpy", "--tokens", "99999"), "outside the vocabulary", 2),
        (("--backend", "numpy", "--tokens", "9" * 20), "outside the vocabulary", 2),
        (("--backend", "numpy", "--tokens", "1," + "9" * 5000), "outside the vocabulary", 2),
        (("--backend", "faulty", "--device", "clean", "--method", "trace"), "it shows no trace points", 3),
        (("--backend", "faulty", "--device", "exception"), "kernel launch failed", 4),
        (("--prompt", "x"), "--backend", 2),
        (("--backend", "numpy", "--heat-map", "x.txt"), "ends in .png, .svg, .pdf", 2),
        (("--backend", "numpy", "--heat-map", "none/x.png"), "does not exist", 2),
        (("--backend", "numpy", "--output", "none/x.txt"), "does not exist", 2),
        (("--backend", "numpy", "--drift", "9", "--heat-map", "x.png"), "leave out --heat-map", 2),
        (("--backend", "numpy", "--drift", "9", "--method", "state"), "leave out --method", 2),
        (("--backend", "numpy", "--drift", "9", "--no-fix"), "leave out --no-fix", 2),
        (("--backend", "numpy", "--drift", "9", "--prompt-tokens", "9"), "leave out --prompt-tokens", 2),
    ):
        done = bench(*base, *argv)
        assert (done.code, done.out) == (code, ""), done
        assert words in done.err


def test_no_picture_of_what_shows_no_operations(bench: Callable[..., Done], small: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="not installed: pip install matplotlib")
    picture = tmp_path / "where.png"
    argv = ("--backend", "faulty", "--device", "inf", "--no-fix", "--heat-map", str(picture))
    done = bench("localize", "--model", small, "--in-process", "--threads", "1", "--method", "truncation", *argv)
    assert "no picture: logits shows no operations" in done.err
    assert not picture.exists()


DIES = """
import os
from backends import numpy_reference
from backends.api import BackendInfo
from reference.numerics import Arithmetic
from reference.forward import forward

INFO = BackendInfo("dies", "dies while traced", "a test", ("cpu",), {"fp32": Arithmetic()})

class Dies(numpy_reference.NumpySession):
    def forward(self, tokens, state):
        logits, state = super().forward(tokens, state)
        return logits * 1.5, state
    def trace(self, tokens, state, tap):
        os._exit(7)
    logits = None

def load(checkpoint, scheme, device, threads):
    return Dies(checkpoint, None)
"""


def test_a_backend_that_dies_while_traced_loses_nothing(bench: Callable[..., Done], small: str, tmp_path: Path) -> None:
    """It runs in a process of its own without being asked to, and is started again for the next method."""
    file = tmp_path / "dies.py"
    file.write_text(DIES)
    done = bench("localize", "--model", small, "--backend", str(file), "--no-fix", "--format", "json")
    assert done.code == 1, done.err
    found = json.loads(done.out)
    assert (found["verdict"], found["method"], found["layer"]) == ("diverged", "state", None)
    assert any("broke while watched: ChildDied: exited with status 7" in note for note in found["notes"])


RIGHT = DIES.replace("logits * 1.5", "logits")


def test_a_right_backend_that_dies_while_traced_is_not_clean_to_a_script(
    bench: Callable[..., Done], small: str, tmp_path: Path
) -> None:
    file = tmp_path / "right.py"
    file.write_text(RIGHT)
    done = bench("localize", "--model", small, "--backend", str(file), "--format", "json")
    found = json.loads(done.out)
    assert (done.code, found["verdict"], found["broke"]) == (4, "clean", True)
    assert any("broke while watched: ChildDied" in note for note in found["notes"])


@pytest.mark.parametrize(("n", "told"), [(5, True), (32, False)])
def test_a_prompt_too_short_for_bounds_is_told(n: int, told: bool) -> None:
    for faults in ({}, FAULTS["blocks.0.ffn.v"]):
        finding = found(partial(Traced, faults=faults), tokens=TOKENS[:n])
        assert (finding.verdict == CLEAN) == (not faults)
        assert any(f"the prompt has {n} tokens; bounds are meant for 32" in note for note in finding.notes) == told


DIES_LATER = """
import os
from backends import numpy_reference
from backends.api import BackendInfo
from reference.numerics import Arithmetic

INFO = BackendInfo("dies_later", "wrong from 20 tokens on, dies at 24", "a test", ("cpu",), {"fp32": Arithmetic()})

class Dies(numpy_reference.NumpySession):
    def forward(self, tokens, state):
        if len(tokens) == 24 and state is None:
            os._exit(7)
        logits, state = super().forward(tokens, state)
        return logits * (1.5 if len(tokens) >= 20 else 1), state
    logits = None

def load(checkpoint, scheme, device, threads):
    return Dies(checkpoint, None)
"""


def test_a_backend_that_dies_while_a_prompt_is_searched_for_loses_nothing(
    bench: Callable[..., Done], small: str, tmp_path: Path
) -> None:
    file = tmp_path / "dies_later.py"
    file.write_text(DIES_LATER)
    done = bench("localize", "--model", small, "--backend", str(file), "--no-fix", "--format", "json")
    assert done.code == 1, done.err
    found = json.loads(done.out)
    assert (found["verdict"], found["method"], found["point"]) == ("diverged", "truncation", "logits")
    assert "one token at a time all logits are right" in found["cause"]
    assert len(found["prompt"]) == 48
    words = "the shortest failing prompt: it broke on 24 tokens: ChildDied: exited with status 7"
    assert any(words in note for note in found["notes"])


#: A runner of libraries it did not build: INFO says float32, the library computes in bfloat16 and says so (or not).
RUNS_ANY = """
from backends.api import BackendInfo
from reference.forward import forward
from reference.numerics import Arithmetic

INFO = BackendInfo("runs_any", "runs what it is given", "a test", ("cpu",), {"fp32": Arithmetic()})
OWN = Arithmetic("bf16", residual="bf16")

class Silent:
    def __init__(self, weights):
        self.weights = weights
    def forward(self, tokens, state):
        return forward(self.weights, tokens, state, arithmetic=OWN, seed=5)

class Says(Silent):
    def declared_arithmetic(self):
        return OWN

def load(checkpoint, scheme, device, threads):
    return KIND(checkpoint)
"""


@pytest.mark.parametrize("how", ["--in-process", "--isolate"])
def test_a_session_is_judged_by_the_arithmetic_it_declares(
    bench: Callable[..., Done], small: str, tmp_path: Path, how: str
) -> None:
    codes = {}
    for kind in ("Says", "Silent"):
        file = tmp_path / f"{kind.lower()}.py"
        file.write_text(RUNS_ANY.replace("KIND", kind))
        done = bench("localize", "--model", small, "--backend", str(file), how, "--no-fix", "--threads", "1")
        codes[kind] = done.code
        drift = bench("localize", "--model", small, "--backend", str(file), how, "--drift", "60", "--threads", "1")
        assert (drift.code == 0) == (kind == "Says"), drift
    assert codes == {"Says": 0, "Silent": 1}
