"""Packings against their source's rule, their own error bound, and an outside oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.codecs_ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from reference.codecs_mlc import MlcGroups
from reference.errors import ConfigError

MLC = {
    "q4f16_1": MlcGroups(4, np.float16),
    "q4f32_1": MlcGroups(4, np.float32),
    "q8f16_1": MlcGroups(8, np.float16),
}
GGML = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0, "Q5_1": Q5_1, "Q8_0": Q8_0}

#: With a minimum beside the scale: codes 0..top above it.
ABOVE_MINIMUM = {"Q4_1": 15, "Q5_1": 31}
#: The largest weight becomes -top of -top..top - 1; Q8_0: of -top..top.
SYMMETRIC = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127}
PACKINGS: dict[str, Any] = {**MLC, **GGML}
NON_FINITE = (np.nan, np.inf, -np.inf)

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


# --- MLC ---------------------------------------------------------------------------------------------------------


def mlc_bound(packing: MlcGroups, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Largest error that the format allows, from the rule ``code = clip(rint(w / s + z), 0, 2z)``, ``s = m / z``.

    Every operation rounds by u (relative) or eta (denormal). The weight itself: u |w| + eta. The
    code: half a step, and u of the quotient (at most m / s) and of the sum (at most m / s + z). The
    clip: m exceeds z s by at most u m + z eta. The product, in float32: 2^-24 of it.
    """
    u, eta = ROUNDING[packing.model_type]
    z = packing.zero
    groups = np.abs(w.astype(np.float64)).reshape(*scale.shape, packing.group)
    m = groups.max(axis=-1, keepdims=True) * (1 + u) + eta
    s = scale.astype(np.float64)[..., None]
    code = s * (0.5 + eta) + u * (1 + u) * (2 * m + s * z)
    clip = u * m + z * eta
    product = 2.0**-24 * z * s + 2.0**-150
    return np.asarray(code + clip + product + u * groups + eta).reshape(w.shape)


@pytest.mark.parametrize("name", MLC)
@given(w=matrices())
def test_mlc_error_is_within_half_a_step_and_the_rounding_of_its_type(name: str, w: np.ndarray) -> None:
    packed = MLC[name].quantize(w)
    error = np.abs(MLC[name].dequantize(packed).astype(np.float64) - w)
    assert np.all(error <= mlc_bound(MLC[name], w, packed.q_scale))


@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1"])
@given(w=matrices())
def test_mlc_quantizes_in_float16_as_numpys_float16_does(name: str, w: np.ndarray) -> None:
    z = np.float16(MLC[name].zero)
    groups = w.astype(np.float16).reshape(2, 2, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / z
    safe = np.where(scale > 0, scale, np.float16(1))
    codes = np.where(scale > 0, np.clip(np.rint(groups / safe + z), 0, 2 * z), z)
    packed = MLC[name].quantize(w)
    assert packed.q_scale.dtype == np.float16
    assert np.array_equal(packed.q_scale, scale[..., 0])
    assert np.array_equal(MLC[name].unpack(packed.q_weight).reshape(codes.shape), codes)


@pytest.mark.parametrize("name", MLC)
@given(w=matrices(smallest=1e-2))
def test_mlc_requantizing_keeps_the_codes_and_moves_a_scale_by_one_ulp_at_most(name: str, w: np.ndarray) -> None:
    once = MLC[name].quantize(w)
    twice = MLC[name].quantize(MLC[name].dequantize(once))
    assert np.array_equal(once.q_weight, twice.q_weight)
    bits = np.uint16 if MLC[name].model_type is np.float16 else np.uint32
    assert np.all(np.abs(once.q_scale.view(bits).astype(np.int64) - twice.q_scale.view(bits)) <= 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@given(seed=st.integers(0, 2**32 - 1))
def test_mlc_packing_is_a_bijection_between_codes_and_words(bits: int, seed: int) -> None:
    packing = MlcGroups(bits, np.float16, group=40 if bits == 3 else 32)
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 4 * packing.group), dtype=np.uint32)
    words = packing.pack(codes)
    assert words.dtype == np.uint32
    assert words.shape == (3, codes.shape[1] // packing.per_word)
    assert np.array_equal(packing.unpack(words).reshape(codes.shape), codes)
    assert np.array_equal(packing.pack(packing.unpack(words).reshape(codes.shape)), words)


def test_mlc_words_hold_the_first_code_in_the_lowest_bits() -> None:
    w = np.zeros((1, 32), dtype=np.float32)
    w[0, :8] = [-7, -6, -1, 0, 1, 2, 6, 7]
    packed = MlcGroups(4, np.float16).quantize(w)
    assert packed.q_weight.tolist() == [[0xED987610, 0x77777777, 0x77777777, 0x77777777]]
    assert packed.q_scale.tolist() == [[1.0]]
    packed = MlcGroups(8, np.float32).quantize(w * np.float32(127 / 7))
    assert packed.q_weight[0, 0] == 127 - 127 | 127 - 109 << 8 | 127 - 18 << 16 | 127 << 24


# --- ggml --------------------------------------------------------------------------------------------------------


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


# --- every codec -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKINGS)
def test_a_group_of_zeros_or_of_denormals_stays_finite_and_close(name: str) -> None:
    for value in (0.0, -0.0, 1e-45, -1e-40, 3e-8):
        w = np.full((1, 64), value, dtype=np.float32)
        w[0, 32:] = 0.5
        out = roundtrip(PACKINGS[name], w)
        assert np.all(np.abs(out[0, :32]) <= 2 * abs(value) + 2.0**-24)
        assert np.all(np.abs(out[0, 32:] - 0.5) < 1e-3)
    assert np.all(roundtrip(PACKINGS[name], np.zeros((1, 32), dtype=np.float32)) == 0)


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("name", PACKINGS)
def test_a_group_with_nan_or_inf_is_nan_and_no_other_changes(name: str, value: float) -> None:
    w = np.random.default_rng(0).standard_normal((2, 96)).astype(np.float32)
    clean = roundtrip(PACKINGS[name], w)
    for column in (32, 50, 63):
        bad = w.copy()
        bad[1, column] = value
        out = roundtrip(PACKINGS[name], bad)
        assert np.all(np.isnan(out[1, 32:64]))
        out[1, 32:64] = clean[1, 32:64]
        assert np.array_equal(out, clean)


@pytest.mark.parametrize("name", PACKINGS)
def test_packing_a_row_that_groups_do_not_divide_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="rows of 48 weights do not divide into groups of 32"):
        PACKINGS[name].quantize(np.zeros((2, 48), dtype=np.float32))
