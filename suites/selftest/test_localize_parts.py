"""The parts of localization: distances, the shortest prompt, the reference in lockstep, pictures, where calls fail."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from backends.api import Session
from harness.checks import Check
from harness.localize import truncation
from harness.localize.by_layers import layered
from harness.localize.case import Case
from harness.localize.finding import DIVERGED, LOGITS, Finding, Seen
from harness.localize.heatmap import grid
from harness.localize.lockstep import Stream, layers
from harness.localize.off import allowed, first_place, off, rounding, size
from harness.localize.prompt import MOST_SECONDS, MOST_TRIES, shortest
from harness.localize.report import as_json, as_text
from harness.localize.truncation import SILENT, first_layers, silenced
from harness.parity import Gate
from harness.tolerance import K, derive
from reference.config import Config
from reference.forward import forward
from reference.numerics import Arithmetic, Exact
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights

CONFIG = Config(n_layer=3, n_embd=32, n_ffn=64, n_vocab=50)
WEIGHTS = synthetic(CONFIG, 1)
TOKENS = np.arange(7)


def test_each_distance_sees_what_the_mean_over_all_hides() -> None:
    right = np.random.default_rng(0).normal(size=(50, 200))
    still = off(right, right)
    assert (still.rms, still.row, still.column, still.peak, still.small, still.factor) == pytest.approx(
        (0,) * 6, abs=1e-15
    )
    row, column, one = right.copy(), right.copy(), right.copy()
    row[3] *= 1.1
    column[:, 7] *= 1.1
    one[3, 7] += 1
    assert off(row, right).row == pytest.approx(0.1, rel=0.2)
    assert off(row, right).rms < 0.02
    assert off(column, right).column == pytest.approx(0.1, rel=0.3)
    assert off(one, right).peak == pytest.approx(1, rel=0.1)
    zeros = np.where(right > 0, right, 0)
    few = np.where(right > -0.1, zeros, 0.02)
    assert off(few, zeros).small > 5 * off(few, zeros).rms
    assert off(1.01 * right, right).factor == pytest.approx(0.01)


def test_a_nan_is_farther_than_any_bound() -> None:
    right = np.ones((3, 4))
    wrong = right.copy()
    wrong[1, 2] = np.nan
    error, bound = off(wrong, right).worst(allowed([], size(right), 1.0), alone=False)
    assert not error <= bound


def test_a_run_that_overflows_gives_no_bound() -> None:
    right = np.ones((3, 4))
    broken = off(np.full((3, 4), np.inf), right)
    assert allowed([broken], size(right), 1e-3) == allowed([], size(right), 1e-3)
    assert allowed([broken], size(right), 1e-3).rms == pytest.approx(K * 1e-3)


def test_all_zero_where_zero_is_right_and_where_it_is_not() -> None:
    zero = np.zeros((2, 3))
    assert off(zero, zero).rms == 0
    assert off(zero + 1, zero).rms == np.inf


def test_int8_inputs_round_products_only() -> None:
    int8, fp16 = Arithmetic("int8x32"), Arithmetic("fp16", residual="fp32")
    assert rounding(int8, "blocks.0.att.xk") == rounding(Arithmetic(), "blocks.0.att.xk")
    assert rounding(fp16, "blocks.0.att.xk") > 100 * rounding(int8, "blocks.0.att.xk")


def test_the_first_token_beyond_the_bound_is_told() -> None:
    right = np.random.default_rng(0).normal(size=(9, 20))
    wrong = right.copy()
    wrong[4, 6] += 1
    wrong[8] += 5
    assert first_place(wrong, right, allowed([], size(right), 1e-3)) == (4, 6)


def test_in_lockstep_it_is_the_reference() -> None:
    seen: dict[str, np.ndarray] = {}
    forward(WEIGHTS, TOKENS, dtype=np.float64, tap=seen.__setitem__)
    stream = Stream(WEIGHTS, TOKENS, Exact(np.float64))
    points: list[str] = []
    for group in layers(CONFIG):
        results = stream.layer(group)
        assert len(results) <= len(group) + 1  # one layer, and what enters it
        for step in group:
            points.append(step.point)
            np.testing.assert_array_equal(results[step.point], seen[step.point])
    assert points == list(seen)


def test_a_model_is_cut_to_its_first_layers() -> None:
    cut = first_layers(WEIGHTS, 2)
    assert cut.config.n_layer == 2
    assert not any(name.startswith("blocks.2.") for name in cut)
    seen: dict[str, np.ndarray] = {}
    forward(WEIGHTS, TOKENS, tap=seen.__setitem__)
    own: dict[str, np.ndarray] = {}
    forward(cut, TOKENS, tap=own.__setitem__)
    np.testing.assert_array_equal(own["blocks.1.ffn.residual"], seen["blocks.1.ffn.residual"])


@pytest.mark.parametrize(("half", "before", "after"), [("att", "ln0", "att"), ("ffn", "att", "ffn")])
def test_half_a_block_is_silenced(half: str, before: str, after: str) -> None:
    one = first_layers(WEIGHTS, 1)
    seen: dict[str, np.ndarray] = {}
    forward(silenced(one, half), TOKENS, tap=seen.__setitem__)
    entering = seen["blocks.0.ln0" if before == "ln0" else "blocks.0.att.residual"]
    left = seen[f"blocks.0.{after}.residual"]
    assert np.abs(left - entering).max() < 100 * SILENT * np.abs(entering).max()


@pytest.mark.parametrize(
    ("failing", "problem", "smallest"),
    [
        ({4, 5, 6}, "", 4),
        ({1, 2, 4, 5, 6}, "", 1),
        ({1, 5, 6}, "", 1),
        ({2, 3, 5, 6}, "", 2),
        ({6}, "", 6),
        ({4, 5, 6}, "NaN", 4),
        ({3, 5, 6}, "NaN", 3),
    ],
)
def test_layers_are_counted_up_where_a_pass_lies_above_a_fail(
    failing: set[int], problem: str, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tried twice; of NaN, what bisection finds is confirmed as before."""
    weights = synthetic(Config(n_layer=6, n_embd=32, n_ffn=64, n_vocab=50), 1).in_memory()
    tried: list[int] = []

    def judged(n: int) -> Gate:
        bad = f"{problem} at position 0" if problem and n in failing else None
        return Gate((Check("decode", "rms", 2.0 if n in failing else 0.5, 1.0, "position 0", bad),), ())

    def fake(case: Case, cut: Weights) -> Gate:
        tried.append(cut.config.n_layer)
        return judged(cut.config.n_layer)

    def no_half(case: Case, cut: Weights, broken: bool) -> tuple[str, list[str]]:
        return "", []

    monkeypatch.setattr(truncation, "_judged", fake)
    monkeypatch.setattr(truncation, "_half", no_half)
    truth = derive(weights, "fp32", Arithmetic(), TOKENS)
    case = Case(_unopened, weights, weights, "fp32", Arithmetic(), TOKENS, truth, lambda text: None)
    cut = truncation.smallest(case, judged(6))
    assert cut.layers == smallest
    assert len(tried) == len(set(tried))
    assert [one.layer for one in cut.seen] == sorted({*(n - 1 for n in tried), 5})


def _unopened(weights: Weights) -> AbstractContextManager[Session]:
    raise AssertionError("opened")


def test_the_shortest_prompt() -> None:
    def fails(tokens: Sequence[int]) -> bool:
        return 3 in tokens and 8 in tokens and list(tokens).index(3) < list(tokens).index(8)

    assert shortest(fails, range(20)) == ((3, 8), "")
    assert shortest(fails, range(20), near=8) == ((3, 8), "")
    assert shortest(lambda tokens: 11 in tokens, range(20), near=11) == ((11,), "")
    assert shortest(lambda tokens: len(tokens) >= 5, range(20))[0] == (0, 1, 2, 3, 4)


def test_the_search_for_it_ends() -> None:
    ticks = count(step=MOST_SECONDS / 4)
    best, stopped = shortest(lambda tokens: sum(tokens) > 100, range(40), clock=lambda: float(next(ticks)))
    assert stopped == f"{MOST_SECONDS:.0f} s"
    assert sum(best) > 100
    assert shortest(lambda tokens: len(tokens) > 300, range(600), clock=lambda: 0.0)[1] == f"{MOST_TRIES} tries"


def test_a_token_that_fails_alone_comes_before_others_that_fail_together() -> None:
    """3 and 8 fail together and are met first; 9 fails alone."""

    def fails(tokens: Sequence[int]) -> bool:
        return 9 in tokens or {3, 8} <= set(tokens)

    for near in (None, 1, 3):
        assert shortest(fails, [3, 8, 0, 9], near=near) == ((9,), "")


def test_the_prompt_is_told_as_what_it_is() -> None:
    about = {"backend": "x", "scheme": "fp16", "device": "cpu", "model": "m", "prompt_tokens": 40}
    finding = Finding(DIVERGED, LOGITS, prompt=(3, 8))
    assert "prompt   2 tokens, none of which can be left out: 3,8" in as_text(finding, about)
    assert "prompt   1 token: 3 'a'" in as_text(replace(finding, prompt=(3,)), about, "a")
    late = replace(finding, prompt_stopped="12 s")
    assert "prompt   2 tokens; the search stopped after 12 s: 3,8" in as_text(late, about)
    assert json.loads(as_json(late, about))["prompt_stopped"] == "12 s"
    assert json.loads(as_json(finding, about))["prompt_stopped"] is None


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="not installed: pip install matplotlib")
    from reports.heatmap import draw

    seen = [
        Seen("blocks.0.ffn.k", 0, 1, 1, 0.1, 1.0),
        Seen("blocks.0.ffn.k2", 0, 1, 1, 5.0, 1.0),
        Seen("blocks.1.ffn.k2", 1, 1, None, None, None, "NaN"),
    ]
    drawn = grid(seen)
    assert drawn is not None
    draw(str(tmp_path / "map.png"), "title", drawn)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_large_model_one_layer_is_upcast_and_the_ends_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = apply(WEIGHTS, "fp16")
    assert layered(stored)["head.weight"].stored == "f32"
    monkeypatch.setattr("harness.localize.by_layers._SMALL", 0)
    found = layered(stored)
    assert found["head.weight"].stored == "f16"
    name = "blocks.{}.ffn.key.weight"
    first = found[name.format(0)].read()
    assert found[name.format(0)].read() is first
    np.testing.assert_array_equal(first, stored[name.format(0)].array(np.float32))
    found[name.format(1)].read()
    assert found[name.format(0)].read() is not first
    held, own = (forward(w, TOKENS, dtype=np.float64)[0] for w in (stored, found))
    np.testing.assert_allclose(own, held, rtol=1e-12)
    assert layered(apply(WEIGHTS, "Q8_0"))["blocks.0.ffn.key.weight"].stored == "f32"
