"""A fix is chosen by emulation, applied to the backend and judged again; what it cannot verify it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.api import Session, Unavailable, Unsupported
from harness.compare import logits_error
from harness.localize.bench import Bench
from harness.localize.cost import cost
from harness.localize.evidence import Evidence
from harness.localize.finding import CLEAN, DIVERGED, LOGITS, NON_FINITE, TRACE, Finding
from harness.localize.fix import Search, _other_schemes, find_fix, named
from harness.localize.magnitudes import measure
from harness.localize.report import as_text
from harness.localize.rescaled import rescaling
from harness.localize.whatif import excess, layer_ranges, patterns
from harness.session import open_session
from reference.config import Config
from reference.forward import forward
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights
from suites.nan import emulated
from suites.nan.planted import LEVERS, STREAM, plant

CONFIG = Config(n_layer=3, n_embd=64, n_ffn=256, n_vocab=256)
WEIGHTS = synthetic(CONFIG, 5)
TOKENS = [int(i) for i in np.random.default_rng(1).integers(0, CONFIG.n_vocab, 40)]
FP16 = Arithmetic("fp16", "fp32", "fp16", "fp32")
EMULATED = str(Path(emulated.__file__))


def evidence(weights: Weights, scheme: str = "fp16", arithmetic: Arithmetic = FP16, **more: Any) -> Evidence:
    stored = apply(weights, scheme).in_memory()
    return Evidence(weights, stored, scheme, arithmetic, np.array(TOKENS), **more)


def finding(point: str | None, verdict: str = NON_FINITE) -> Finding:
    return Finding(verdict, TRACE if point else LOGITS, point=point)


class LogitsOnly:
    """Emulated fp16 that shows nothing but logits."""

    def __init__(self, weights: Weights) -> None:
        self._weights = apply(weights, "fp16").in_memory()

    def forward(self, tokens: Any, state: Any) -> tuple[np.ndarray, Any]:
        return forward(self._weights, tokens, state, arithmetic=FP16)


@contextmanager
def opener(weights: Weights) -> Iterator[Session]:
    yield LogitsOnly(weights)


@pytest.mark.parametrize("name", ["att.v", "ffn.k2", "ffn.v", "att.residual", "ln2"])
def test_a_rescaled_checkpoint_helps_what_shows_only_logits(name: str) -> None:
    planted, point = plant(WEIGHTS, TOKENS, name, 1)
    fix = find_fix(finding(point), evidence(planted), opener).fix
    assert fix is not None
    assert fix.verified, fix
    assert fix.what.startswith("the checkpoint rescaled: ")
    assert fix.cost is None


def test_what_weights_cannot_cure_is_only_emulated() -> None:
    """A key of 1e5 stays one, however weights are moved: told as emulated, never as verified."""
    planted, point = plant(WEIGHTS, TOKENS, "att.k", 1)
    fix = find_fix(finding(point), evidence(planted), opener).fix
    assert fix is not None
    assert not fix.verified
    assert "att.k of layer 1 in fp32" in fix.what
    assert "only emulated" in fix.note


def test_a_scheme_with_room_is_tried() -> None:
    """``adjust`` refuses: the next thing that the backend offers is taken, and why not the first is told."""

    class Stubborn(Bench):
        def open(self, weights: Weights, scheme: Any = None, change: Any = None) -> Any:
            if change:
                raise Unavailable("not today")
            return super().open(weights, scheme, change)

    planted, point = plant(WEIGHTS, TOKENS, "logits")
    bench = Stubborn(EMULATED, "fp16", threads=1)
    arithmetic = Arithmetic("fp16", "fp16", "fp16", "fp16")
    fix = find_fix(finding(point), evidence(planted, arithmetic=arithmetic), bench).fix
    assert fix is not None
    assert fix.verified, fix
    assert "not today" in fix.note
    assert fix.what.startswith("scheme bf16")
    assert fix.cost is not None


def test_a_scheme_that_keeps_less_comes_after_those_that_keep_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp16 weights, 4 bits are nearer in size than float32 is, and lose most of what they hold."""
    planted, point = plant(WEIGHTS, TOKENS, "att.k", 1)
    offered = {"q4f32_0": Arithmetic(), "fp16": FP16, "Q8_0": Arithmetic(), "fp32": Arithmetic()}
    monkeypatch.setattr(Bench, "schemes", offered)
    asked = list(_other_schemes(evidence(planted), Bench(EMULATED, "fp16", threads=1), measure(planted, TOKENS)))
    assert [change.scheme for change in asked] == ["fp32", "Q8_0"]
    assert point in excess(measure(planted, TOKENS), FP16, CONFIG)


@pytest.mark.parametrize(("declared", "coarse"), [(FP16, False), (Arithmetic("int4x32"), True)], ids=str)
def test_a_fix_that_passed_a_coarse_bound_says_so(declared: Arithmetic, coarse: bool) -> None:
    """Where products of four-bit inputs are declared, a backend that is right only roughly passes too."""
    planted, point = plant(WEIGHTS, TOKENS, "ffn.k2", 1)
    fix = find_fix(finding(point), evidence(planted, arithmetic=declared), opener).fix
    assert fix is not None
    assert fix.verified
    assert ("verified under a coarse bound" in fix.note) == coarse


def test_nothing_wrong_needs_no_fix() -> None:
    assert find_fix(finding(None, CLEAN), evidence(WEIGHTS), opener) == Search()


def test_a_fault_that_no_change_cures_has_none() -> None:
    """Every logit off by one, whatever the weights."""

    class Wrong(LogitsOnly):
        def forward(self, tokens: Any, state: Any) -> tuple[np.ndarray, Any]:
            logits, after = super().forward(tokens, state)
            return logits[::-1].copy(), after

    @contextmanager
    def wrong(weights: Weights) -> Iterator[Session]:
        yield Wrong(weights)

    none = find_fix(finding(None, DIVERGED), evidence(WEIGHTS), wrong)
    assert (none.fix, none.tries) == (None, ())
    assert none.none.startswith("nothing to try: nothing overflows")
    planted, point = plant(WEIGHTS, TOKENS, "ffn.k2", 1)
    fix = find_fix(finding(point), evidence(planted), wrong).fix
    assert fix is None or not fix.verified


@pytest.mark.parametrize("layer", [1, 2])
def test_a_backend_that_only_halves_its_stream_is_halved_often_enough(layer: int) -> None:
    """6 is never enough in three layers: the largest that is comes first, and nothing before it is tried."""
    changes: list[Any] = []

    class Halves(Bench):
        def open(self, weights: Weights, scheme: Any = None, change: Any = None) -> Any:
            if change:
                changes.append(dict(change))
            if change and set(change) != {"rescale_every"}:
                raise Unsupported("it can change rescale_every")
            return super().open(weights, scheme, change)

    planted, point = plant(WEIGHTS, TOKENS, "att.residual", layer)
    half = Arithmetic("fp16", "fp16", "fp16", "fp16")
    fix = find_fix(finding(point), evidence(planted, arithmetic=half), Halves(EMULATED, "fp16", threads=1)).fix
    assert fix is not None
    assert fix.verified, fix
    peaks = measure(planted, TOKENS, inner=True)
    fits = [n for n in (6, 4, 3, 2, 1) if not excess(peaks, Mixed(half, (), n), CONFIG)]
    assert changes == [{"rescale_every": fits[0]}]
    assert fix.what == f"rescale_every {fits[0]}"


class Alone(Bench):
    """One scheme, and no ``adjust``."""

    @property
    def adjustable(self) -> bool:
        return False

    @property
    def schemes(self) -> dict[str, Arithmetic]:
        return {"fp16": FP16}


def test_what_was_tried_in_vain_is_told() -> None:
    alone = find_fix(finding("blocks.1.att.k", DIVERGED), evidence(WEIGHTS), Alone(EMULATED, "fp16", threads=1))
    assert alone.none == "nothing to try: the backend has one scheme and cannot be adjusted"

    class Refuses(Bench):
        def open(self, weights: Weights, scheme: Any = None, change: Any = None) -> Any:
            raise Unavailable("not today")

    bench = Refuses(EMULATED, "fp16", threads=1)
    refused = find_fix(finding("blocks.1.att.k", DIVERGED), evidence(WEIGHTS), bench)
    assert refused.fix is None
    assert refused.none.startswith("none found; tried: blocks.1.att.k in fp32; scheme bf16")
    assert refused.tries
    assert all(tried.endswith(": not today") for tried in refused.tries)
    told = Finding(DIVERGED, TRACE, point="blocks.1.att.k", no_fix=refused.none)
    about = {"backend": "x", "scheme": "fp16", "device": "cpu", "model": "m", "prompt_tokens": 40}
    assert "\nfix      none found; tried: " in as_text(told, about)


class ShowsNan(LogitsOnly):
    """Parity holds: a NaN that only the trace has, in checkpoints of ``wrong`` and whenever ``always``."""

    def __init__(self, weights: Weights, always: bool) -> None:
        super().__init__(weights)
        self._wrong = always or weights is WEIGHTS

    def trace(self, tokens: Any, state: Any, tap: Any) -> tuple[np.ndarray, Any]:
        def spoil(name: str, x: np.ndarray) -> None:
            tap(name, x * np.float32(np.nan) if self._wrong and name == "blocks.1.ffn.k2" else x)

        return forward(self._weights, tokens, state, arithmetic=FP16, tap=spoil)


@pytest.mark.parametrize("always", [True, False])
def test_what_the_gate_never_saw_is_verified_by_a_trace(always: bool) -> None:
    @contextmanager
    def shows(weights: Weights) -> Iterator[Session]:
        yield ShowsNan(weights, always)

    search = find_fix(finding("blocks.1.ffn.k2"), evidence(WEIGHTS), shows, passed=True)
    assert (search.fix is None) == always
    assert search.fix is None or search.fix.verified
    assert [tried.endswith("the trace is still wrong") for tried in search.tries] == [True] * always


def test_what_neither_gate_nor_trace_can_tell_is_not_verified() -> None:
    fix = find_fix(finding("blocks.1.ffn.k2"), evidence(WEIGHTS), opener, passed=True).fix
    assert fix is not None
    assert not fix.verified
    assert "no trace tells whether it helped" in fix.note


def test_an_operation_in_fp32_is_traced_as_such() -> None:
    """The gate is told to have passed before: what verifies the fix is a trace of mixed arithmetic."""
    planted, point = plant(WEIGHTS, TOKENS, "ffn.k2", 1)
    half = Arithmetic("fp16", "fp16", "fp16", "fp16")
    bench = Bench(EMULATED, "fp16", threads=1, isolate=False)
    fix = find_fix(finding(point), evidence(planted, arithmetic=half), bench, passed=True).fix
    assert fix is not None
    assert fix.verified, fix
    assert fix.what == "ffn.k2 of layer 1 in fp32"


@pytest.mark.parametrize("error", [KeyError, TypeError, MemoryError])
def test_whatever_a_try_ends_with_the_next_one_is_tried(error: type[Exception]) -> None:
    class Dies(Bench):
        def open(self, weights: Weights, scheme: Any = None, change: Any = None) -> Any:
            raise error("boom")

    search = find_fix(finding("blocks.1.att.k", DIVERGED), evidence(WEIGHTS), Dies(EMULATED, "fp16", threads=1))
    assert search.fix is None
    assert len(search.tries) > 1
    assert all(f": {error.__name__}: " in tried for tried in search.tries)


@pytest.mark.parametrize("name", ["att.v", "ffn.k2", "ffn.v", "att.out", "ln1", "ln2", "ffn.residual"])
def test_rescaling_keeps_the_function(name: str) -> None:
    """To float64's own precision but for eps, which the stream's scale makes count; and what overflowed fits."""
    planted, _ = plant(WEIGHTS, TOKENS, name, 1)
    over = excess(measure(planted, TOKENS), FP16, CONFIG)
    found = rescaling(CONFIG, over)
    assert found is not None
    rescaled = found.apply(planted)
    assert not excess(measure(rescaled, TOKENS), FP16, CONFIG)
    before, _ = forward(planted, TOKENS, all_logits=True, dtype=np.float64)
    after, _ = forward(rescaled, TOKENS, all_logits=True, dtype=np.float64)
    assert logits_error(after, before).rms < (1e-3 if name in ("ffn.v", "att.out", *STREAM) else 1e-9)


def test_every_lever_has_its_answer() -> None:
    """All that weights can reach is reached; keys and logits are not to be had."""
    for name in (*LEVERS, *STREAM):
        found = rescaling(CONFIG, {f"blocks.1.{name}": 3.0})
        assert (found is None) == (name == "att.k"), name
    assert rescaling(CONFIG, {"logits": 2.0}) is None
    assert rescaling(CONFIG, {"blocks.0.ffn.k2": float("inf")}) is None


def test_an_excess_counts_types_of_sums_and_of_inputs() -> None:
    planted, point = plant(WEIGHTS, TOKENS, "att.wkv", 1)
    peaks = measure(planted, TOKENS, inner=True)
    assert point not in excess(peaks, FP16, CONFIG)
    assert point in excess(peaks, Arithmetic("fp16", "fp32", "fp16", "fp16"), CONFIG)
    planted, _ = plant(WEIGHTS, TOKENS, "ffn.k2", 1)
    inputs = excess(measure(planted, TOKENS), Arithmetic("fp16in"), CONFIG)
    assert list(inputs) == ["blocks.1.ffn.v"]  # converts its input, which is fp32 itself
    assert not excess(measure(planted, TOKENS), Arithmetic(), CONFIG)


def test_names_for_people() -> None:
    assert patterns(["blocks.0.att.k", "blocks.1.att.k", "blocks.1.ffn.v"], 2) == ("blocks.*.att.k", "blocks.1.ffn.v")
    assert layer_ranges([3, 0, 1, 2, 7]) == "0-3, 7"
    listed = ["blocks.1.ln1", "blocks.1.att.xk", "blocks.*.att.residual", "logits"]
    told = "ln1, att.xk of layer 1; att.residual of every layer; logits in fp32, rescale_every 6"
    assert named(listed, 6) == told


def test_cost_is_a_ratio_of_speeds() -> None:
    """Of a session to itself: about one; both are timed in turn."""
    with open_session("numpy", WEIGHTS, "fp32", threads=1) as one, open_session("numpy", WEIGHTS, "fp32") as other:
        assert 0.2 < cost(one, other, TOKENS) < 5
