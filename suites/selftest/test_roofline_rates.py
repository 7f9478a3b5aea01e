"""Which measured rates a row is held against: the type of its factors, the card, the run."""

from __future__ import annotations

import pytest

from backends.index import BUILT_IN, load_backend
from harness.machine.work import TYPES
from harness.roofline_rows import _factors
from reference.numerics import INPUTS, ROUND


@pytest.mark.parametrize("activations", [*ROUND, *INPUTS])
def test_every_type_of_factors_has_a_rate_that_is_probed(activations: str) -> None:
    assert _factors(activations) in TYPES


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_scheme_of_every_backend_has_one(name: str) -> None:
    schemes = load_backend(name).INFO.schemes
    assert {_factors(arithmetic.activations) for arithmetic in schemes.values()} <= set(TYPES)


def test_half_floats_are_held_against_half_floats_wherever_they_are_rounded() -> None:
    assert {_factors(kind) for kind in ("fp16", "fp16in", "fp16rows")} == {"fp16"}
    assert {_factors(kind) for kind in ("int8x32", "int8x128", "int4x32", "uint4x32")} == {"int8"}
