"""Metrics: known values, NaN never small, an empty comparison an error, states equal up to their exponent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import compare
from reference.config import Config
from reference.forward import AA, BB, PP, STATE_ROWS, forward, initial_state
from reference.synthetic import synthetic

CONFIG = Config(3, 32, 128, 50)
WEIGHTS = synthetic(CONFIG, 1).in_memory()

METRICS = [
    compare.max_abs,
    compare.nrms,
    compare.cosine,
    compare.kl_divergence,
    compare.top1_agreement,
    compare.logits_error,
]


def test_known_values() -> None:
    a, b = np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])
    assert compare.max_abs(a, b) == 4.0
    assert compare.nrms(a, b) == pytest.approx(5 / 4)
    assert compare.cosine(a, b) == 0.0
    assert compare.cosine(a, 2 * a) == pytest.approx(1.0)
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    assert compare.kl_divergence(np.log(q), np.log(p)) == pytest.approx(float(np.sum(p * np.log(p / q))))
    assert compare.kl_divergence(np.log(q) + 7, np.log(q)) == pytest.approx(0.0, abs=1e-12)
    assert compare.top1_agreement(np.eye(3), np.array([[1.0, 0, 0], [0, 2, 0], [9, 0, 0]])) == pytest.approx(2 / 3)
    assert compare.topk_overlap(np.array([[4.0, 3, 2, 1]]), np.array([[4.0, 1, 3, 2]]), 2) == 0.5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("a", "b"), [(np.empty((0, 4)), np.empty((0, 4))), (np.ones((1, 3)), np.ones((1, 4)))])
def test_nothing_or_different_shapes_cannot_be_compared(metric, a, b) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(compare.NothingToCompare):
        metric(a, b)


@pytest.mark.parametrize("where", [(0, 0), (3, 7), (5, 9)])
def test_one_nan_makes_every_error_nan(where: tuple[int, int]) -> None:
    truth = np.random.default_rng(0).standard_normal((6, 10))
    got = truth.copy()
    got[where] = np.nan
    error = compare.logits_error(got, truth)
    for value in (error.rms, error.worst, error.peak, compare.max_abs(got, truth), compare.nrms(got, truth)):
        assert not value <= 1e30
    assert compare.first_non_finite(got) == ("NaN", where)


def test_nan_is_named_before_inf_and_finite_is_nothing() -> None:
    x = np.zeros((2, 3))
    assert compare.first_non_finite(x) is None
    x[0, 1], x[1, 2] = np.inf, np.nan
    assert compare.first_non_finite(x) == ("NaN", (1, 2))


def test_logits_error_names_the_place_and_ignores_a_common_offset_in_its_unit() -> None:
    truth = np.random.default_rng(0).standard_normal((6, 10))
    got = truth.copy()
    got[4, 3] += 0.5
    error = compare.logits_error(got, truth)
    assert (error.position, error.token) == (4, 3)
    assert error.peak == pytest.approx(0.5 / compare.spread(truth))
    moved = compare.logits_error(got + 1000, truth + 1000)
    assert moved.peak == pytest.approx(error.peak, rel=1e-9)
    # The offset itself is an error where only one side has it.
    assert compare.logits_error(truth + 1, truth).rms == pytest.approx(1 / compare.spread(truth))


@settings(deadline=None, max_examples=50)
@given(shift=st.floats(-30, 30), seed=st.integers(0, 1000))
def test_a_state_is_the_same_at_any_exponent(shift: float, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 50, 10)
    _, state = forward(WEIGHTS, tokens, dtype=np.float64)
    moved = state.copy()
    moved[:, PP] += shift
    moved[:, [AA, BB]] *= np.exp(-shift)
    error = compare.state_error(moved, state)
    assert error.worst < 1e-12
    # ... and continues identically, which is why it may be called the same.
    np.testing.assert_allclose(
        forward(WEIGHTS, tokens, moved, dtype=np.float64)[0],
        forward(WEIGHTS, tokens, state, dtype=np.float64)[0],
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("row", range(5))
def test_a_change_of_any_row_is_seen_and_placed(row: int) -> None:
    _, state = forward(WEIGHTS, [1, 2, 3], dtype=np.float64)
    wrong = state.copy()
    wrong[1, row] += 0.1
    error = compare.state_error(wrong, state)
    assert error.worst > 1e-3
    assert error.layer == 1
    assert error.row in (STATE_ROWS[row], "aa", "bb")


def test_initial_states_agree_however_low_they_start() -> None:
    ours, theirs = initial_state(CONFIG, np.float64), initial_state(CONFIG, np.float64)
    theirs[:, PP] = -1e38  # Hugging Face's
    assert compare.state_error(theirs, ours).worst == 0.0


def test_a_nan_exponent_is_seen() -> None:
    _, state = forward(WEIGHTS, [1, 2, 3])
    wrong = state.copy()
    wrong[2, PP, 5] = np.nan
    assert not compare.state_error(wrong, state).worst <= 1e30


@pytest.mark.parametrize("d", [1e-6, 1e-3, 1.0, 14.0])
def test_an_exponent_that_is_off_counts_as_what_it_is_off_by(d: float) -> None:
    """Of sums of exponentials, in any size; what is no such sum counts as it is."""
    _, state = forward(WEIGHTS, [1, 2, 3], dtype=np.float64)
    for row in (AA, BB):
        wrong = state.copy()
        wrong[1, row] *= np.exp(d)
        found = compare.state_error(wrong, state)
        assert (found.layer, found.row) == (1, STATE_ROWS[row])
        assert found.worst == pytest.approx(d, rel=1e-3)
    wrong = state.copy()
    wrong[1, 0] *= 1 + d
    assert compare.state_error(wrong, state).worst == pytest.approx(d, rel=1e-9)
