"""A trace held against the reference's, for a token and for many, from the start and from a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backends.api import Traceable
from harness.compare import nrms
from harness.tolerance import FLOOR, K
from reference.forward import forward
from reference.numerics import UNIT_ROUNDOFF, Arithmetic
from reference.weights import Weights

#: Draws of the emulated arithmetic per point.
DRAWS = 3


def shown_as_the_reference(session: Any, weights: Weights, arithmetic: Arithmetic, tokens: Sequence[int]) -> list[str]:
    """Judge every point that is shown against truth, by K times what the arithmetic errs there.

    Returns their names, of the run over all ``tokens``.
    ``weights`` are the scheme's. Logits and state of a trace are also held to be those of ``forward``, bit by bit.
    """
    assert isinstance(session, Traceable)
    found: Any = session
    names: list[str] = []
    for before, ids in (([], tokens), (tokens[:3], tokens[3:]), (tokens[:3], tokens[3:4]), ([], tokens[:1])):
        state = found.forward(before, None)[1] if before else None
        truth, bounds = _truth(weights, arithmetic, before, ids)
        shown: dict[str, np.ndarray] = {}
        logits, after = found.trace(ids, state, shown.__setitem__)
        plain, plain_after = found.forward(ids, state)
        np.testing.assert_array_equal(logits, plain)
        np.testing.assert_array_equal(found.export_state(after), found.export_state(plain_after))
        assert list(shown) == [name for name in truth if name in shown]
        for name, array in shown.items():
            assert array.shape == truth[name].shape, name
            assert array.dtype == np.float32
            error = nrms(array, truth[name])
            assert error <= bounds[name], (name, len(ids), error, bounds[name])
        if ids is tokens:
            names = list(shown)
    return names


def _truth(
    weights: Weights, arithmetic: Arithmetic, before: Sequence[int], ids: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Point -> truth and bound; the error of the state before is part of the bound."""
    truth: dict[str, np.ndarray] = {}
    state = forward(weights, before, dtype=np.float64)[1] if before else None
    forward(weights, ids, state, dtype=np.float64, tap=truth.__setitem__)
    floor = FLOOR * UNIT_ROUNDOFF[arithmetic.activations]
    bounds = dict.fromkeys(truth, K * floor)
    for seed in range(DRAWS):
        drawn: dict[str, np.ndarray] = {}
        state = forward(weights, before, arithmetic=arithmetic, seed=seed)[1] if before else None
        forward(weights, ids, state, arithmetic=arithmetic, seed=seed, tap=drawn.__setitem__)
        for name, array in drawn.items():
            bounds[name] = max(bounds[name], K * nrms(array, truth[name]))
    return truth, bounds
