"""ggml's packings of today: against the gguf package, and their own error bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.codecs_ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

GGML = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0, "Q5_1": Q5_1, "Q8_0": Q8_0}

#: With a minimum beside the scale: codes 0..top above it.
ABOVE_MINIMUM = {"Q4_1": 15, "Q5_1": 31}
#: The largest weight becomes -top of -top..top - 1; Q8_0: of -top..top.
SYMMETRIC = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127}

#: Half a step of rounding: relative, and absolute where the type is denormal.
ROUNDING = {np.float16: (2.0**-11, 2.0**-25), np.float32: (2.0**-24, 2.0**-150)}


def matrices(largest: float = 1e4, smallest: float = 0.0) -> st.SearchStrategy[np.ndarray]:
    """Float32 ``(2, 64)``: four groups, each of its own magnitude: normal, or with zeros and repeated values."""
    values = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5])
    repeated = arrays(np.float32, (4, 32), elements=values, fill=st.just(np.float32(0.25)))
    normal = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).standard_normal((4, 32)) / 8)
    exponents = st.lists(st.floats(-45, np.log10(largest)), min_size=4, max_size=4)

    def scale(drawn: tuple[np.ndarray, list[float]]) -> np.ndarray:
        w = (drawn[0] * (10.0 ** np.array(drawn[1]))[:, None]).astype(np.float32)
        w[np.abs(w) < smallest] = 0
        return np.asarray(w.reshape(2, 64))

    return st.tuples(repeated | normal, exponents).map(scale)


def roundtrip(packing: Any, w: np.ndarray) -> np.ndarray:
    return np.asarray(packing.dequantize(packing.quantize(w)))


def gguf_oracle(name: str) -> tuple[Any, Any]:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle of ggml's formats; pip install gguf")
    return gguf.quants, gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("name", GGML)
@given(w=matrices(largest=1e8, smallest=1e-36))
@settings(max_examples=200)
def test_ggml_bytes_and_values_are_those_of_gguf(name: str, w: np.ndarray) -> None:
    # Where the reciprocal of the scale overflows, gguf casts Inf and NaN to codes that then mean nothing.
    quants, kind = gguf_oracle(name)
    packed = GGML[name].quantize(w)
    with np.errstate(all="ignore"):
        theirs = quants.quantize(w, kind)
        assert packed.dtype == np.uint8
        assert packed.shape == theirs.shape
        ours, expected = (x.reshape(4, -1) for x in (packed, theirs))
        blocks = w.reshape(4, 32)
        spread = np.ptp(blocks, axis=1) / ABOVE_MINIMUM[name] if name in ABOVE_MINIMUM else np.ones(4)
        defined = (spread == 0) | np.isfinite(np.float32(1) / spread.astype(np.float32))
        assert np.array_equal(ours[defined], expected[defined])
        assert np.array_equal(ours[:, :2], expected[:, :2])
        assert np.array_equal(GGML[name].dequantize(packed), quants.dequantize(packed, kind), equal_nan=True)


@pytest.mark.parametrize("name", GGML)
@given(blocks=arrays(np.uint8, (3, 2)), seed=st.integers(0, 2**32 - 1))
def test_ggml_any_finite_scale_and_any_codes_dequantize_as_in_gguf(name: str, blocks: np.ndarray, seed: int) -> None:
    quants, kind = gguf_oracle(name)
    codes = np.random.default_rng(seed).integers(0, 256, (3, GGML[name].block_bytes - 2), dtype=np.uint8)  # and minima
    packed = np.concatenate([blocks, codes], axis=1)
    with np.errstate(all="ignore"):
        assert np.array_equal(GGML[name].dequantize(packed), quants.dequantize(packed, kind), equal_nan=True)


def ggml_bound(name: str, w: np.ndarray) -> np.ndarray:
    """Half a step, the float16 rounding of the scale times the largest code and of the minimum, a missing code.

    Q4_0 and Q5_0 map the largest weight to the code -8 of -8..7, or -16 of -16..15, so a weight of the
    other sign may lie up to a whole step beyond the last code.
    """
    blocks = w.astype(np.float64).reshape(-1, 32)
    u, eta = ROUNDING[np.float16]
    if name in ABOVE_MINIMUM:
        top, low = ABOVE_MINIMUM[name], blocks.min(axis=1, keepdims=True)
        d = (blocks.max(axis=1, keepdims=True) - low) / top
        beyond, minimum = 0 * blocks, u * np.abs(low) + eta
    else:
        top = SYMMETRIC[name]
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
        d = np.abs(largest) / top
        beyond, minimum = 0 * blocks, 0 * blocks
        if name != "Q8_0":
            beyond = np.maximum(-blocks * np.sign(largest) - (top - 0.5) * d, 0)
    float32 = 2.0**-21 * (top * d + np.abs(blocks).max(axis=1, keepdims=True))  # reciprocal, product and sums
    return np.asarray(d / 2 + beyond + minimum + top * (u * d + eta) + float32 + 2.0**-140).reshape(w.shape)


@pytest.mark.parametrize("name", GGML)
@given(w=matrices())
def test_ggml_error_is_within_half_a_step_and_the_rounding_of_its_scale(name: str, w: np.ndarray) -> None:
    error = np.abs(roundtrip(GGML[name], w).astype(np.float64) - w)
    assert np.all(error <= ggml_bound(name, w))


@pytest.mark.parametrize("name", SYMMETRIC)
@given(w=matrices())
def test_ggml_requantizing_changes_nothing(name: str, w: np.ndarray) -> None:
    # Not so with a minimum: beside a large one, the rounded sum no longer shows a small scale.
    once = roundtrip(GGML[name], w)
    assert np.array_equal(roundtrip(GGML[name], once), once)


@pytest.mark.parametrize("name", GGML)
@given(seed=st.integers(0, 2**32 - 1))
def test_packing_is_a_bijection_between_codes_and_bytes(name: str, seed: int) -> None:
    """Any pattern of codes that has those of the extremes comes back as it was packed."""
    rng = np.random.default_rng(seed)
    first, last = rng.choice(32, 2, replace=False)
    if name in ABOVE_MINIMUM:
        codes = rng.integers(0, ABOVE_MINIMUM[name] + 1, (3, 32))
        codes[:, first], codes[:, last] = 0, ABOVE_MINIMUM[name]
    else:
        codes = rng.integers(-SYMMETRIC[name] + (name == "Q8_0"), SYMMETRIC[name], (3, 32))
        codes[:, first] = SYMMETRIC[name] if name == "Q8_0" else -SYMMETRIC[name]
    w = codes.astype(np.float32) * np.float32(0.375)
    packed = GGML[name].quantize(w)
    assert np.array_equal(GGML[name].dequantize(packed), w)
    assert np.array_equal(GGML[name].quantize(GGML[name].dequantize(packed)), packed)


def test_the_fifth_bits_are_a_word_with_weight_i_at_bit_i() -> None:
    w = np.zeros((1, 32), dtype=np.float32)
    w[0, [0, 9, 31]] = [-16, 15, 3]
    packed = Q5_0.quantize(w)[0]
    assert packed[:2].view("<f2")[0] == 1
    assert packed[2:6].view("<u4")[0] == 0xFFFFFFFE  # code 16 is zero, so all but the code 0 have it
    assert packed[6:].tolist() == [0, *[0] * 8, 15, *[0] * 5, 3 << 4]


def test_q8_0_rounds_half_away_from_zero_as_roundf_does() -> None:
    w = np.zeros((1, 32), dtype=np.float32)
    w[0, :6] = [127, 0.5, -0.5, 1.5, 2.5, np.nextafter(np.float32(0.5), np.float32(0))]
    assert Q8_0.quantize(w)[0, 2:8].view(np.int8).tolist() == [127, 1, -1, 2, 3, 0]
