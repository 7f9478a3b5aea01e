"""Every backend × scheme against the fp32 weights on a text: is the kernel right, and is the scheme good enough.

``pytest suites/quality --backend torch --quant fp16 --model RWKV-4-169M.pth`` judges exactly those cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from backends.api import Scoring, Session
from harness.budget import hold
from harness.compare import log_softmax
from harness.models import Model, gate_tokens, open_model
from harness.plan import Cell
from harness.quality.intervals import Mean, edges, exponential, fraction, mean, positive
from harness.quality.passage import Passage, passage_of
from harness.quality.scores import Scores, divergence, score
from harness.session import Opened, open_session
from harness.tolerance import DRAWS, K
from harness.without_codec import has_codec
from reference.forward import forward
from reference.schemes import apply
from reference.weights import Tensor
from suites.oracles import open_oracle

#: Positions of a cell's passage, in segments.
TOKENS, CONTEXT = 2048, 64

#: Positions over which the divergence that a declared arithmetic must make is taken.
DECLARED = 48

#: The matrix that a planted fault scales.
SCALED = "blocks.0.ffn.value.weight"

#: A divergence that rounding of the baseline and of float32 logits alone can make.
NOTHING = 1e-11


@pytest.fixture(scope="module")
def passage(model: Model) -> Passage:
    """Text of the model's own kind, or random ids for synthetic weights."""
    return passage_of(model, None, TOKENS, CONTEXT)


@pytest.fixture(scope="module")
def scores(cell: Cell, opened: Opened, model: Model, passage: Passage) -> Scores:
    """The cell's session beside the reference."""
    return score(opened.session, model, cell.scheme, passage)


def test_every_position_has_a_figure(scores: Scores, passage: Passage) -> None:
    for name, values in vars(scores).items():
        if values is not None:
            assert values.shape == (len(passage),), name
            assert np.isfinite(values).all(), name
    assert (scores.kl >= 0).all()
    assert (scores.nll >= 0).all()


def declared(opened: Opened, model: Model, scheme: str, ids: np.ndarray) -> float:
    """The largest mean divergence that draws of the declared arithmetic have from the stored weights on ``ids``."""
    stored = hold(apply(model.weights, scheme))
    exact = log_softmax(forward(stored, ids, all_logits=True, dtype=np.float64)[0])
    drawn = [forward(stored, ids, all_logits=True, arithmetic=opened.arithmetic, seed=seed)[0] for seed in range(DRAWS)]
    return max(float(divergence(exact, log_softmax(logits)).mean()) for logits in drawn)


def test_the_kernel_is_as_far_from_the_stored_weights_as_its_arithmetic(
    cell: Cell, opened: Opened, model: Model
) -> None:
    """On the gate's prompt: a divergence grows with the square of an error, so the bound does with that of K."""
    if not has_codec(cell.scheme):
        pytest.skip(f"the weights that {cell.scheme} stores are not known here")
    tokens = gate_tokens(model, DECLARED + 1)
    prompt = Passage("the gate's prompt", np.array(tokens[:-1]), np.array(tokens[1:]), None, 0)
    found = score(opened.session, model, cell.scheme, prompt).kl_kernel
    assert found is not None
    assert found.mean() <= max(K**2 * declared(opened, model, cell.scheme, prompt.ids), NOTHING)


def test_the_scheme_is_no_worse_than_its_stored_weights(
    cell: Cell, opened: Opened, scores: Scores, passage: Passage, model: Model
) -> None:
    """The kernel's part in the passage's first, middle and last segments is what its arithmetic may make there."""
    if scores.kl_kernel is None:
        pytest.skip(f"the weights that {cell.scheme} stores are not known here")
    for start in (0, len(passage) // 2 // CONTEXT * CONTEXT, len(passage) - CONTEXT):
        segment = slice(start, start + CONTEXT)
        may = K**2 * declared(opened, model, cell.scheme, passage.ids[segment])
        assert scores.kl_kernel[segment].mean() <= max(may, NOTHING), start


def interval(found: Mean) -> tuple[float, float]:
    """The interval of a mean that has one."""
    assert found.interval is not None
    return found.interval


#: Classes in the order of what they cost, with a scheme of each that leaves the same tensors alone.
LADDERS = {
    "MLC": ("q0f32", "q8f16_1", "q4f16_1", "q3f16_1"),
    "ggml": ("fp32", "Q8_0", "Q5_1", "Q4_0"),
    "BigDL": ("fp32", "sym_int8", "sym_int5", "sym_int4"),
}


@pytest.fixture(scope="module")
def ladder_scores(model: Model, passage: Passage) -> dict[str, Scores]:
    """Of every scheme of the ladders, by the reference."""
    found: dict[str, Scores] = {}
    for scheme in dict.fromkeys(scheme for ladder in LADDERS.values() for scheme in ladder):
        with open_session("numpy", model, scheme, threads=1, isolate=False) as opened:
            found[scheme] = score(opened.session, model, scheme, passage)
    return found


@pytest.mark.parametrize("system", LADDERS)
def test_fewer_bits_cost_more(system: str, ladder_scores: dict[str, Scores], passage: Passage) -> None:
    """fp32 ≤ 8 bit ≤ 5 and 4 bit ≤ 3 bit: divergences apart by their intervals, agreement by its."""
    blocks = edges(len(passage), passage.context, passage.spacing)
    rungs = [ladder_scores[scheme] for scheme in LADDERS[system]]
    divergences = [positive(rung.kl, blocks) for rung in rungs]
    agreements = [fraction(rung.top1, blocks) for rung in rungs]
    assert divergences[0].value < NOTHING
    for better, worse in pairwise(divergences):
        assert interval(better)[1] < interval(worse)[0], LADDERS[system]
    for better, worse in pairwise(agreements):
        assert better.value >= worse.value, LADDERS[system]


class WrongScale:
    """Q4_0 with the scales of one matrix 2 % too large."""

    def __init__(self, model: Model) -> None:
        stored = apply(model.weights, "Q4_0").in_memory(np.float32)
        self.weights = stored.map(lambda name, tensor: _scaled(tensor) if name == SCALED else tensor)

    def forward(self, tokens: Sequence[int], state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return forward(self.weights, tokens, state)

    def logits(self, tokens: Sequence[int], state: np.ndarray | None) -> np.ndarray:
        return forward(self.weights, tokens, state, all_logits=True)[0]


def _scaled(tensor: Tensor) -> Tensor:
    return Tensor.of(tensor.array() * np.float32(1.02))


def test_a_wrong_scale_is_seen_where_it_is(model: Model, passage: Passage) -> None:
    """Weights that are scaled wrongly after they were read: the kernel's part grows, that of the weights does not."""

    session: Session = WrongScale(model)
    blocks = edges(len(passage), passage.context, passage.spacing)
    with open_session("numpy", model, "Q4_0", threads=1, isolate=False) as opened:
        right = score(opened.session, model, "Q4_0", passage)
    wrong = score(session, model, "Q4_0", passage)
    assert right.kl_kernel is not None
    assert wrong.kl_kernel is not None
    assert np.array_equal(right.kl_weights, wrong.kl_weights)  # type: ignore[arg-type]
    assert interval(positive(right.kl_kernel, blocks))[1] < NOTHING
    assert interval(positive(wrong.kl_kernel, blocks))[0] > 1e-6


def test_perplexity_is_torchs_cross_entropy(model: Model, passage: Passage) -> None:
    """The whole way of the command against one that shares nothing with it: transformers and torch."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    session = open_oracle("transformers", model.weights)
    assert isinstance(session, Scoring)
    losses = []
    for start in range(0, len(passage), CONTEXT):
        logits = session.logits([int(i) for i in passage.ids[start : start + CONTEXT]], None)
        following = torch.from_numpy(passage.following[start : start + CONTEXT])
        losses.append(functional.cross_entropy(torch.from_numpy(logits).double(), following, reduction="none"))
    expected = float(torch.cat(losses).mean())
    blocks = edges(len(passage), passage.context, passage.spacing)
    found = score(session, model, "fp32", passage)
    assert mean(found.nll, blocks).value == pytest.approx(expected, rel=1e-12)
    assert mean(found.nll_fp32, blocks).value == pytest.approx(expected, rel=1e-5)
    assert exponential(mean(found.nll, blocks)).value == pytest.approx(np.exp(expected), rel=1e-12)
    assert found.kl_kernel is not None
    assert found.kl_kernel.mean() < NOTHING


def test_divergence_is_torchs(model: Model, passage: Passage) -> None:
    """KL(p||q) of q8f16_1 and of q3f16_1 against torch's kl_div on the same logits in float64."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    ids = [int(i) for i in passage.ids[:CONTEXT]]
    p = torch.from_numpy(forward(model.weights, ids, all_logits=True, dtype=np.float64)[0]).log_softmax(-1)
    for scheme in ("q8f16_1", "q3f16_1"):
        q = torch.from_numpy(forward(apply(model.weights, scheme), ids, all_logits=True)[0]).double().log_softmax(-1)
        expected = functional.kl_div(q, p, reduction="batchmean", log_target=True)
        with open_session("numpy", model, scheme, threads=1, isolate=False) as opened:
            found = score(opened.session, model, scheme, passage)
        assert found.kl[:CONTEXT].mean() == pytest.approx(float(expected), rel=1e-5)


def test_bits_per_byte_of_the_embedded_model() -> None:
    """1.3251 over the first 24,000 predictions with the state carried through, as reference/embedded/README.md has."""
    model = open_model("tiny")
    whole = passage_of(model, None, 24_000, 0)
    with open_session("numpy", model, "fp32", threads=1, isolate=False) as opened:
        found = score(opened.session, model, "fp32", whole)
    assert whole.n_bytes is not None
    assert found.nll.sum() / np.log(2) / whole.n_bytes.sum() == pytest.approx(1.3251, abs=5e-5)
