"""The cause of a fault is named: every hypothesis when it is true, none when nothing is wrong, all that look alike."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from harness.compare import nrms
from harness.localize.catalogue import of_model, operations
from harness.localize.cause import HYPOTHESIS, PATTERN, PRECISION, UNKNOWN, Cause, explain
from harness.localize.decoder import Decoder
from harness.localize.evidence import Evidence
from harness.localize.hypotheses import Hypothesis
from harness.localize.hypotheses_codes import CHANGES
from harness.localize.hypotheses_products import PRODUCTS
from harness.localize.match import place
from harness.localize.part import ENDS, Part, Unknown
from harness.tolerance import K
from reference.config import Config
from reference.forward import forward, initial_state
from reference.numerics import Arithmetic, Emulated, Exact
from reference.operations import compute, steps
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

CONFIG = Config(n_layer=4, n_embd=64, n_ffn=192, n_vocab=300)
ORIGINAL = synthetic(CONFIG, 2)
TOKENS = np.random.default_rng(1).integers(0, 300, 32)
LAYER = 2
STEPS = {step.point: step for step in steps(CONFIG)}

#: Scheme and declared arithmetic -> hypotheses about codes make sense with the second.
FP32, FP16, INT8 = Arithmetic(), Arithmetic("fp16", "fp32", "fp16", "fp32"), Arithmetic("int8x32")
ARITHMETICS = (("fp32", FP32), ("q4f16_1", FP16), ("Q5_1", INT8))


@cache
def stored(scheme: str) -> Weights:
    return apply(ORIGINAL, scheme).in_memory()


@cache
def shown(scheme: str, arithmetic: Arithmetic) -> dict[str, np.ndarray]:
    """What a right backend shows."""
    seen: dict[str, np.ndarray] = {}
    forward(stored(scheme), TOKENS, tap=seen.__setitem__, arithmetic=arithmetic, seed=5)
    return seen


def evidence(point: str, got: np.ndarray, scheme: str, arithmetic: Arithmetic) -> Evidence:
    """As a traced backend that is right but for one operation would give it."""
    weights, step = stored(scheme), STEPS[point]
    inputs = {name: shown(scheme, arithmetic)[name] for name in step.inputs}
    past = initial_state(CONFIG, np.float64)
    expected = compute(step, inputs.__getitem__, weights, TOKENS, past, Exact(np.float64))
    return Evidence(ORIGINAL, weights, scheme, arithmetic, TOKENS, point, step.layer, inputs, got, expected)


def spoilt(
    point: str, hypothesis: Hypothesis, scheme: str, arithmetic: Arithmetic, actual: Arithmetic | None = None
) -> np.ndarray:
    """What a backend shows of which a hypothesis is true; ``actual``: its arithmetic in this one operation."""
    step, results = STEPS[point], shown(scheme, arithmetic)
    stream = f"blocks.{(CONFIG.n_layer if step.layer is None else step.layer) - 1}.ffn.residual"
    known = {name.removeprefix(step.at): value for name, value in results.items() if name != point}
    past = TOKENS if step.layer is None else initial_state(CONFIG)[step.layer]
    part = Part(
        stored(scheme),
        step.layer,
        past,
        Emulated(actual or arithmetic, 0 if actual else 7),
        {**known, "x": results[stream]},
        hypothesis.computes,
    )
    return part(step.name).astype(np.float32)


def singles(scheme: str) -> list[Hypothesis]:
    """Hypotheses about one operation: all where nothing is quantized, else every change at two of the matrices."""
    matrices = Decoder(ORIGINAL, stored(scheme), scheme).hypotheses(["emb", *PRODUCTS])
    chosen = [h for i, h in enumerate(matrices) if (i // len(CHANGES) + i % len(CHANGES)) % 4 == 0]
    found = [hypothesis for hypothesis in operations() if len(hypothesis.computes) == 1]
    return [*found, *chosen] if scheme == "fp32" else [*found[::12], *chosen]


def full(name: str) -> str:
    return name if name in ENDS else f"blocks.{LAYER}.{name}"


def test_names_are_unique_and_sentences_are_there() -> None:
    catalogue = of_model(Decoder(ORIGINAL, stored("q4f16_1"), "q4f16_1"))
    names = [hypothesis.name for hypothesis in catalogue]
    assert len(names) == len(set(names)) > 500
    assert all(hypothesis.sentence for hypothesis in catalogue)
    assert {name for hypothesis in catalogue for name in hypothesis.computes} == {
        *(step.name for step in STEPS.values())
    }, "every operation has hypotheses"


@pytest.mark.parametrize(
    ("scheme", "arithmetic"),
    [pytest.param(*one, id=one[0], marks=() if one[1] is FP32 else pytest.mark.slow) for one in ARITHMETICS],
)
def test_every_hypothesis_is_named_when_it_is_true(scheme: str, arithmetic: Arithmetic) -> None:
    """As long as it can be seen in that arithmetic at all."""
    missed, seen = [], 0
    for hypothesis in singles(scheme):
        (name,) = hypothesis.computes
        try:
            with np.errstate(all="ignore"):
                got = spoilt(full(name), hypothesis, scheme, arithmetic)
        except Unknown:
            continue
        if not np.isfinite(got).all():
            continue
        case = evidence(full(name), got, scheme, arithmetic)
        assert case.expected is not None
        found = place(case)
        assert found is not None
        if got.shape == case.expected.shape and nrms(got, case.expected) > 2 * K * found.unavoidable(
            None, case.expected
        ):
            seen += 1
            cause = explain(case)
            if hypothesis.name not in cause.names:
                missed.append((hypothesis.name, cause.text))
    assert not missed
    assert seen > (300 if scheme == "fp32" else 80)


@pytest.mark.parametrize(("scheme", "arithmetic"), ARITHMETICS, ids=lambda value: str(value).split("/")[0])
def test_right_results_match_nothing(scheme: str, arithmetic: Arithmetic) -> None:
    """Of another draw of the same arithmetic, at every operation."""
    for point, step in STEPS.items():
        if step.layer not in (None, LAYER):
            continue
        right = Hypothesis("right", "", {})
        cause = explain(evidence(point, spoilt(point, right, scheme, arithmetic), scheme, arithmetic))
        assert cause.kind not in (HYPOTHESIS, PRECISION), cause.text


def test_what_is_equal_is_not_told_apart() -> None:
    """With every time_first 0, leaving it out and adding it twice change nothing; with a sign, both are named."""
    point, zero = f"blocks.{LAYER}.att.wkv", "att.time_first"

    def without(name: str, tensor: Tensor) -> Tensor:
        return Tensor.of(np.zeros(tensor.shape, np.float32)) if name.endswith(zero) else tensor

    case = evidence(point, shown("fp32", FP32)[point], "fp32", FP32)
    weights = case.stored.map(without)
    part = Part(
        weights,
        LAYER,
        initial_state(CONFIG, np.float64)[LAYER],
        Exact(np.float64),
        dict(zip(("att.k", "att.v"), (case.inputs or {}).values(), strict=True)),
    )
    right = replace(case, stored=weights, original=weights, got=part("att.wkv"), expected=part("att.wkv"))
    assert explain(right).kind not in (HYPOTHESIS, PRECISION)
    decayed = Hypothesis(
        "", "", {"att.wkv": next(h for h in operations() if h.name == "att.wkv: no decay").computes["att.wkv"]}
    )
    known = {"att.k": part("att.k"), "att.v": part("att.v")}
    wrong = Part(weights, LAYER, initial_state(CONFIG)[LAYER], Emulated(FP32), known, decayed.computes)("att.wkv")
    cause = explain(replace(right, got=wrong))
    assert cause.names[0] == "att.wkv: no decay"
    assert "u dropped" not in cause.text


def test_matches_that_look_alike_are_all_named() -> None:
    point = f"blocks.{LAYER}.att.wkv"
    hypothesis = next(h for h in operations() if h.name == "att.wkv: v itself")
    cause = explain(evidence(point, spoilt(point, hypothesis, "fp32", FP32), "fp32", FP32))
    assert {"att.wkv: state reset", "att.wkv: pp not carried", "att.wkv: v itself"} <= set(cause.names)
    assert "cannot be told apart" in cause.text


def test_a_match_says_how_well() -> None:
    point = f"blocks.{LAYER}.ffn.k2"
    k = shown("fp32", FP32)[f"blocks.{LAYER}.ffn.k"]
    cause = explain(evidence(point, np.maximum(k, 0), "fp32", FP32))
    assert cause.names == ("ffn.k2: relu without square",)
    assert cause.text.startswith(f"{point}: relu is not squared; that reproduces what the backend shows to ")
    assert "the right computation is off by" in cause.text


def wrong_somewhere(point: str, wrong: np.ndarray, tokens: Any = slice(None), channels: Any = slice(None)) -> Cause:
    """Right but for some tokens or channels."""
    got = shown("fp32", FP32)[point].copy()
    got[tokens, channels] = wrong[tokens, channels]
    return explain(evidence(point, got, "fp32", FP32))


@pytest.mark.parametrize(
    ("tokens", "channels", "words"),
    [
        (slice(20, None), slice(None), "only at tokens 20 to 31 of 32"),
        (slice(1, None, 2), slice(None), "only at every second token from 1 (of 32)"),
        (slice(None), slice(160, None), "only in channels 160 to 191 of 192"),
        (7, slice(None), "only at token 7"),
    ],
)
def test_a_fault_of_some_tokens_or_channels(tokens: Any, channels: Any, words: str) -> None:
    point = f"blocks.{LAYER}.ffn.k2"
    k = shown("fp32", FP32)[f"blocks.{LAYER}.ffn.k"]
    k = np.where(k == 0, 1, k)
    cause = wrong_somewhere(point, np.maximum(k, 0) + 1e-3, tokens, channels)
    assert words in cause.text or cause.kind == PATTERN
    cause = wrong_somewhere(point, np.square(k), tokens, channels)
    assert "ffn.k2: square without relu" in cause.names


def test_hidden_operations_are_tried_too() -> None:
    """A backend that shows the end of its attention only: what is wrong before it is found."""
    weights, results = stored("fp32"), shown("fp32", FP32)
    at, x = f"blocks.{LAYER}.", f"blocks.{LAYER - 1}.ffn.residual"
    wanted = next(h for h in operations() if h.name == "att.wkv: decay sign")
    past = initial_state(CONFIG)[LAYER]
    got = Part(weights, LAYER, past, Emulated(FP32, 3), {"x": results[x]}, wanted.computes)("att.out")
    right = Part(weights, LAYER, past, Exact(np.float64), {"x": results[x]})("att.out")
    case = Evidence(ORIGINAL, weights, "fp32", FP32, TOKENS, at + "att.out", LAYER, {x: results[x]}, got, right)
    assert explain(case).names == (wanted.name,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y * 0.5, "a constant factor of 0.5 (2^-1: rescaling"),
        (lambda y: y * np.float32(1.01), "a constant factor of 1.01"),
        (lambda y: y + np.float32(0.25), "1 times the right result plus 0.25"),
        (lambda y: y * np.linspace(0.5, 2, y.shape[1], dtype=np.float32), "a factor per channel"),
        (lambda y: y[:, np.arange(y.shape[1]) ^ 1], "neighbouring channels are exchanged"),
        (lambda y: np.concatenate([y[:1], y[:-1]]), "results are one token late"),
        (lambda y: y * (np.arange(y.shape[1]) < 48), "only in channels 48 to 63 of 64, all zero there"),
        (lambda y: np.minimum(y, np.float32(0.5)), "values are clipped above 0.5"),
        (lambda y: np.round(y * 16) / 16, "every value is a multiple of 0.0625"),
        (lambda y: y + np.random.default_rng(0).standard_normal(y.shape), "correlation with the right result"),
    ],
)
def test_what_nothing_reproduces_is_described(change: Any, words: str) -> None:
    point = f"blocks.{LAYER}.att.out"
    cause = explain(evidence(point, change(shown("fp32", FP32)[point]), "fp32", FP32))
    assert cause.kind == PATTERN
    assert words in cause.text


def test_columns_that_count_otherwise() -> None:
    point = f"blocks.{LAYER}.ffn.v"
    x = shown("fp32", FP32)[f"blocks.{LAYER}.ffn.k2"].copy()
    x[:, 64:96] *= 3
    weight = stored("fp32")[f"blocks.{LAYER}.ffn.value.weight"].array()
    cause = explain(evidence(point, x @ weight.T, "fp32", FP32))
    assert "input columns 64 to 95 (3)" in cause.text


def test_a_single_weight() -> None:
    """Its row, its column and its value."""
    point, matrix = f"blocks.{LAYER}.att.out", f"blocks.{LAYER}.att.output.weight"
    weight = stored("fp32")[matrix].array().copy()
    weight[17, 40] += np.float32(0.75)
    cause = explain(evidence(point, shown("fp32", FP32)[f"blocks.{LAYER}.att.rwkv"] @ weight.T, "fp32", FP32))
    assert f"row 17, column 40 is {weight[17, 40]:.6g}, not " in cause.text


@pytest.mark.parametrize(
    ("point", "actual", "words"),
    [
        ("ffn.v", Arithmetic(accumulation="fp16"), "sums of products are kept in fp16"),
        ("att.wkv", Arithmetic(wkv="bf16"), "WKV is computed in bf16"),
        ("ffn.residual", Arithmetic(residual="fp16"), "the residual stream is kept in fp16"),
        ("att.rwkv", Arithmetic("bf16"), "results are rounded to bf16"),
        ("att.k", Arithmetic("int8x32"), "inputs of products are rounded to int8"),
    ],
)
def test_an_arithmetic_coarser_than_declared(point: str, actual: Arithmetic, words: str) -> None:
    name = f"blocks.{LAYER}.{point}"
    got = spoilt(name, Hypothesis("right", "", {}), "fp32", FP32, actual)
    cause = explain(evidence(name, got, "fp32", FP32))
    assert cause.kind == PRECISION
    assert words in cause.text


def test_every_change_changes_a_matrix_of_some_scheme() -> None:
    """And leaves its shape."""
    made = set()
    for scheme in ("q4f16_1", "q4f32_1", "q8f16_1", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "fp32"):
        decoder = Decoder(ORIGINAL, stored(scheme), scheme)
        for change in CHANGES:
            try:
                changed = decoder.changed("blocks.1.ffn.key.weight", change)
            except Unknown:
                continue
            assert changed.shape == (192, 64)
            made.add(change.name)
    untouched = {change.name for change in CHANGES} - made
    assert untouched <= {"words of 10 turned", "first blocks of 64"}, "these rows are too short for them"


def test_a_result_of_another_shape() -> None:
    """With a NaN in it too: nothing is computed of it, nothing is raised."""
    for point in ("logits", f"blocks.{LAYER}.att.k"):
        for value in (0.0, np.nan):
            got = np.full((32, 40), value, np.float32)
            cause = explain(evidence(point, got, "fp32", FP32))
            assert cause.kind == PATTERN
            assert "has shape (32, 40) where " in cause.text


@pytest.mark.parametrize("point", ["emb", "blocks.0.ln0", f"blocks.{LAYER}.att.wkv", f"blocks.{LAYER}.ffn.v", "logits"])
def test_a_prompt_of_one_token(point: str) -> None:
    case = evidence(point, shown("fp32", FP32)[point] * np.float32(1.5), "fp32", FP32)
    assert case.inputs is not None
    assert case.got is not None
    assert case.expected is not None
    first = {name: value[:1] for name, value in case.inputs.items()}
    short = replace(case, tokens=TOKENS[:1], inputs=first, got=case.got[:1], expected=case.expected[:1])
    assert "1.5" in explain(short).text


def test_nothing_to_conclude_from() -> None:
    cause = explain(Evidence(ORIGINAL, stored("fp32"), "fp32", FP32, TOKENS))
    assert cause.kind == UNKNOWN
    assert cause.text
