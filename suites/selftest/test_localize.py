"""Where a backend goes wrong: planted faults in backends that show everything, their state, or only logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from backends.api import Unsupported
from harness.localize import localize
from harness.localize.finding import (
    BAD_WEIGHTS,
    CLEAN,
    DIVERGED,
    LOGITS,
    NON_FINITE,
    STATE,
    TRACE,
)
from reference.errors import TokenError
from reference.numerics import Arithmetic
from reference.operations import Here
from reference.weights import Tensor, Weights
from suites.selftest.wrong_backends import (
    FAULTS,
    FP16,
    FP32,
    KINDS,
    LOUD,
    TOKENS,
    WEIGHTS,
    Faults,
    Faulty,
    Traced,
    found,
    no_square,
    opener,
    scaled,
)

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
