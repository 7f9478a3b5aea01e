"""Block formats of rwkv.cpp files of version 100: against the rule written out for one block, and their error."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.codecs_ggml import GgmlBlocks
from reference.codecs_ggml_v100 import Q4_0_V100, Q4_1_O, Q4_1_V100
from reference.errors import ConfigError
from reference.schemes import SCHEMES, Packed

FORMATS = {"Q4_0_v100": Q4_0_V100, "Q4_1_v100": Q4_1_V100, "Q4_1_O": Q4_1_O}
ONE = np.float32(1)


def roundf(x: np.float32) -> int:
    """C's: half away from zero. A float32 and its half are exact in double."""
    return int(math.copysign(math.floor(abs(float(x)) + 0.5), float(x)))


def nibbles(codes: list[int]) -> bytes:
    return bytes(low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True))


def q4_0(x: np.ndarray) -> bytes:
    d = np.abs(x).max() / np.float32(7)
    inverse = ONE / d if d else np.float32(0)
    return struct.pack("<f", d) + nibbles([roundf(v * inverse) + 8 for v in x])


def q4_1(x: np.ndarray) -> bytes:
    low = x.min()
    d = (x.max() - low) / np.float32(15)
    inverse = ONE / d if d else np.float32(0)
    return struct.pack("<2f", d, low) + nibbles([roundf((v - low) * inverse) for v in x])


def q4_1_o(x: np.ndarray) -> bytes:
    index, outlier = 65535, np.float32(0)
    for i, v in enumerate(x):
        if abs(v) > abs(outlier):
            index, outlier = i, v
    rest = np.array([v for i, v in enumerate(x) if i != index])
    low = rest.min()
    d = (rest.max() - low) / np.float32(15)
    inverse = ONE / d if d else np.float32(0)
    codes = [0 if i == index else roundf((v - low) * inverse) for i, v in enumerate(x)]
    return struct.pack("<2eHe", d, low, index, outlier) + nibbles(codes)


RULES: dict[str, Callable[[np.ndarray], bytes]] = {"Q4_0_v100": q4_0, "Q4_1_v100": q4_1, "Q4_1_O": q4_1_o}


def blocks() -> st.SearchStrategy[np.ndarray]:
    """One block: of any size that fp16 scales hold, with repeated values and zeros."""
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.25]) | st.floats(-1, 1, width=32)
    sizes = st.sampled_from([1.0, 1e-3, 3e4])
    drawn = st.tuples(arrays(np.float32, 32, elements=values), sizes)
    # Differences this small are far below any weight, and their reciprocal is not finite.
    return drawn.map(lambda d: np.where(np.abs(d[0]) < 1e-20, 0, d[0] * np.float32(d[1])).astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
@given(x=blocks())
def test_a_block_is_that_of_the_rule_byte_by_byte(name: str, x: np.ndarray) -> None:
    assert FORMATS[name].quantize(x + np.float32(0)).tobytes() == RULES[name](x + np.float32(0))


@pytest.mark.parametrize("name", FORMATS)
@given(x=blocks())
def test_error_is_within_half_a_step(name: str, x: np.ndarray) -> None:
    y = FORMATS[name].dequantize(FORMATS[name].quantize(x)).astype(np.float64)
    largest = float(np.abs(x).max())
    if name == "Q4_0_v100":
        step, rounding = largest / 7, 2.0**-22 * largest
    elif name == "Q4_1_v100":
        step, rounding = float(x.max() - x.min()) / 15, 2.0**-21 * largest
    else:
        rest = np.delete(x, np.abs(x).argmax())
        # Minimum, outlier and 15 times the scale are each half a unit of fp16 off, denormal where tiny.
        step, rounding = float(rest.max() - rest.min()) / 15, 2.0**-10 * 2 * largest + 16 * 2.0**-25
    assert np.all(np.abs(y - x) <= 0.5 * step + rounding)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_exactly_comes_back(name: str) -> None:
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 2)).astype(np.float32)
    x = np.clip(codes - 8, -7, 7) / 4 if name == "Q4_0_v100" else codes / 4 - 2
    if name == "Q4_1_O":
        x[5] = 1000
    packing = FORMATS[name]
    assert np.array_equal(packing.dequantize(packing.quantize(x[None])), x[None])


def test_the_outlier_is_kept_and_does_not_cost_the_others_precision() -> None:
    x = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    x[17] = -300
    y = Q4_1_O.dequantize(Q4_1_O.quantize(x))
    assert y[17] == -300
    rest = np.delete(x, 17)
    assert np.abs(np.delete(y - x, 17)).max() <= (rest.max() - rest.min()) / 30 + 0.01
    assert np.abs(Q4_1_V100.dequantize(Q4_1_V100.quantize(x)) - x).max() > 2


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_of_zeros_is_zeros(name: str) -> None:
    packed = FORMATS[name].quantize(np.zeros(32, np.float32))
    assert not FORMATS[name].dequantize(packed).any()
    if name == "Q4_1_O":
        assert struct.unpack("<4H", packed[:8].tobytes()) == (0, 0, 65535, 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 2])
def test_a_block_with_nan_or_inf_is_nan_and_its_neighbours_are_not(name: str, bad: float, count: int) -> None:
    w = np.random.default_rng(2).standard_normal((2, 96)).astype(np.float32)
    w[1, 40 : 40 + count] = bad
    y = FORMATS[name].dequantize(FORMATS[name].quantize(w))
    assert np.isnan(y[1, 32:64]).all()
    assert np.isfinite(np.delete(y.reshape(6, 32), 4, axis=0)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_packed_each_by_itself_and_sizes_are_as_said(name: str) -> None:
    packing: GgmlBlocks = FORMATS[name]
    w = np.random.default_rng(3).standard_normal((3, 5, 64)).astype(np.float32)
    packed = packing.quantize(w)
    assert packed.shape == (3, 5, 2 * packing.block_bytes)
    assert packed.nbytes == packing.packed_bytes(w.shape)
    assert np.array_equal(packed[1, 2], packing.quantize(w[1, 2]))
    with pytest.raises(ConfigError, match="groups of 32"):
        packing.quantize(w[..., :33])


@pytest.mark.parametrize("name", FORMATS)
def test_the_scheme_says_its_bits(name: str) -> None:
    codec = SCHEMES[name].codec
    assert codec is not None
    assert isinstance(codec.matrices, Packed)
    assert codec.matrices.packing is FORMATS[name]
    assert SCHEMES[name].bits == FORMATS[name].block_bytes * 8 / 32
