"""ChatRWKV's int8, a whole matrix at a time: its error, its bytes, and what is not finite or has no spread.

The package itself is the oracle in suites/parity/test_rwkv_pip.py. Requantizing is not idempotent: offsets and
scales come from the minima and maxima of what is left, and the half that is added to every code moves those.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.codecs_rwkv_int8 import RwkvInt8
from reference.weights import Tensor

UNIT: dict[type, float] = {np.float32: 2.0**-24, np.float16: 2.0**-11}
TYPES = [pytest.param(kept, id=np.dtype(kept).name) for kept in UNIT]


def drawn(seed: int, shape: tuple[int, int], size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


@pytest.mark.parametrize("kept", TYPES)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(6, 40), k=st.integers(6, 40), size=st.sampled_from([1, 0.01, 50]))
def test_error_is_within_half_a_step_and_the_roundings_of_its_type(
    kept: type, seed: int, n: int, k: int, size: float
) -> None:
    codec, w = RwkvInt8(kept), drawn(seed, (n, k), size)
    packed = codec.quantize(w)
    assume(np.all(packed.rx > 0) and np.all(packed.ry > 0))  # else without spread: NaN, see below
    scale = (packed.ry.astype(np.float64) * packed.rx.astype(np.float64)).T  # (N, K); a code is 1 of it
    error = np.abs(codec.dequantize(packed).astype(np.float64) - w)
    # Every offset, scale, product and sum is rounded once: at most 16 of them, of at most the range of the matrix.
    assert np.all(error <= 0.5 * scale * (1 + 2.0**-7) + 16 * UNIT[kept] * 4 * np.abs(w).max() + 16 * 2.0**-24 * size)


@pytest.mark.parametrize("kept", TYPES)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(6, 40), k=st.integers(6, 40))
def test_bytes_are_as_said_and_codes_use_their_range(kept: type, seed: int, n: int, k: int) -> None:
    codec = RwkvInt8(kept)
    packed = codec.quantize(drawn(seed, (n, k)))
    assert sum(part.nbytes for part in packed) == codec.nbytes("blocks.0.att.key.weight", (n, k), "f32")
    assert packed.codes.max() == 255
    assert packed.codes.min() == 0


@pytest.mark.parametrize("kept", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(kept: type, value: float) -> None:
    w = drawn(0, (12, 8))
    w[3, 5] = value
    found = RwkvInt8(kept).keep("head.weight", Tensor.of(w, "f32")).array()
    assert not np.isfinite(found[3, 5])


@pytest.mark.parametrize("kept", TYPES)
def test_a_matrix_without_spread_is_nan_as_in_the_package(kept: type) -> None:
    assert np.isnan(RwkvInt8(kept).keep("head.weight", Tensor.of(np.zeros((4, 4), np.float32), "f32")).array()).all()
