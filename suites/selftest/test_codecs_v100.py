"""Block formats of rwkv.cpp files of version 100: against the rule written out for one block, and their error.

Golden bytes of Q4_2 and Q4_3 were written by ``ggml_quantize_q4_2`` of saharNooby/ggml a0687a3a and
``ggml_quantize_q4_3`` of bfa8d5b5, compiled beside the project.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.codecs_ggml_v100 import Q4_0_V100, Q4_1_O, Q4_1_V100, Q4_2, Q4_3
from reference.schemes import SCHEMES, Packed

FORMATS = {"Q4_0_v100": Q4_0_V100, "Q4_1_v100": Q4_1_V100, "Q4_1_O": Q4_1_O, "Q4_2": Q4_2, "Q4_3": Q4_3}
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


def q4_2(x: np.ndarray) -> bytes:
    largest = np.float32(0)
    for v in x:
        if abs(v) > abs(largest):
            largest = v
    d = largest / np.float32(-8)
    inverse = ONE / d if d else np.float32(0)
    return struct.pack("<e", d) + nibbles([min(15, int(v * inverse + np.float32(8.5))) for v in x])


def q4_3(x: np.ndarray) -> bytes:
    low = x.min()
    d = (x.max() - low) / np.float32(15)
    inverse = ONE / d if d else np.float32(0)
    return struct.pack("<2e", d, low) + nibbles([int((v - low) * inverse + np.float32(0.5)) for v in x])


RULES: dict[str, Callable[[np.ndarray], bytes]] = {
    "Q4_0_v100": q4_0,
    "Q4_1_v100": q4_1,
    "Q4_1_O": q4_1_o,
    "Q4_2": q4_2,
    "Q4_3": q4_3,
}

_I = np.arange(32)
#: Two blocks each: of many codes, of halves between two codes, and with a subnormal float16 scale.
GOLDEN_BLOCKS = {
    "spread": ((_I * 37 % 64) - 31.5) / 16,
    "ties": np.where(_I % 16 == 3, -16.0, (_I - 8) / 2.0),
    "tiny": ((_I * 29 % 64) - 20) * 2.0**-26,
}
GOLDEN = {
    ("Q4_2", "spread"): "e03390c3e5183a6d8fb2 e0b33c09e7b4926f4d1a",
    ("Q4_2", "ties"): "004066077788889999aa 0040aa0bbbccccddddee",
    ("Q4_2", "tiny"): "01806c7192a3b4051728 0180394a6b708192a3b5",
    ("Q4_3", "spread"): "0034e0bf90c3e5183a6d8fb2 113460bfd3f6284b7d90c2e5",
    ("Q4_3", "ties"): "333d00cca90abbccdcddeeff 553f00ccbb0bccddddeeeeff",
    ("Q4_3", "tiny"): "01000580705e4c3b1af8e7c5 01000480b392806f5d3c2a09",
}


def blocks() -> st.SearchStrategy[np.ndarray]:
    """One block: of any size that fp16 scales hold, with repeated values and zeros."""
    values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.25]) | st.floats(-1, 1, width=32)
    sizes = st.sampled_from([1.0, 1e-3, 3e4])
    drawn = st.tuples(arrays(np.float32, 32, elements=values), sizes)
    # Differences this small are far below any weight, and their reciprocal is not finite.
    return drawn.map(lambda d: np.where(np.abs(d[0]) < 1e-20, 0, d[0] * np.float32(d[1])).astype(np.float32))


@pytest.mark.parametrize(("name", "blocks"), GOLDEN)
def test_bytes_are_those_of_the_library(name: str, blocks: str) -> None:
    packed = FORMATS[name].quantize(GOLDEN_BLOCKS[blocks].astype(np.float32))
    assert packed.tobytes() == bytes.fromhex(GOLDEN[name, blocks])


def test_values_of_bytes_made_by_hand() -> None:
    """Half a unit, codes 0, 1, 2 ... 15 in order: neighbours share a byte, the first in the low half."""
    codes = bytes(low | low + 1 << 4 for low in range(0, 16, 2))
    of_q4_2 = np.frombuffer(struct.pack("<e", 0.5) + codes, np.uint8)
    assert Q4_2.dequantize(of_q4_2).tolist() == [(code - 8) / 2 for code in range(16)]
    negative = np.frombuffer(struct.pack("<e", -0.5) + codes, np.uint8)  # what the largest being positive gives
    assert Q4_2.dequantize(negative).tolist() == [(8 - code) / 2 for code in range(16)]
    of_q4_3 = np.frombuffer(struct.pack("<2e", 0.5, -3) + codes, np.uint8)
    assert Q4_3.dequantize(of_q4_3).tolist() == [code / 2 - 3 for code in range(16)]


@pytest.mark.parametrize("name", ["Q4_2", "Q4_3"])
@given(seed=st.integers(0, 2**32 - 1))
def test_packing_is_a_bijection_between_codes_and_bytes(name: str, seed: int) -> None:
    """Any pattern of codes that has those of the extremes comes back as it was packed."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (3, 16))
    first, last = rng.choice(16, 2, replace=False)
    codes[:, first] = 0
    codes[:, last] = 15
    w = codes.astype(np.float32) * np.float32(0.375) - np.float32(3)
    packed = FORMATS[name].quantize(w)
    assert np.array_equal(FORMATS[name].dequantize(packed), w)
    assert np.array_equal(FORMATS[name].quantize(FORMATS[name].dequantize(packed)), packed)


@given(x=blocks())
def test_requantizing_q4_2_changes_nothing(x: np.ndarray) -> None:
    # The largest is -8 times a float16, which comes back exactly. Not so with a rounded minimum, as in Q4_3.
    once = Q4_2.dequantize(Q4_2.quantize(x))
    assert np.array_equal(Q4_2.dequantize(Q4_2.quantize(once)), once)


@pytest.mark.parametrize("name", FORMATS)
@given(x=blocks())
def test_a_block_is_that_of_the_rule_byte_by_byte(name: str, x: np.ndarray) -> None:
    x = x[: FORMATS[name].group]
    assert FORMATS[name].quantize(x + np.float32(0)).tobytes() == RULES[name](x + np.float32(0))


@pytest.mark.parametrize("name", FORMATS)
@given(x=blocks())
def test_error_is_within_half_a_step(name: str, x: np.ndarray) -> None:
    x = x[: FORMATS[name].group]
    y = FORMATS[name].dequantize(FORMATS[name].quantize(x)).astype(np.float64)
    largest = float(np.abs(x).max())
    if name == "Q4_0_v100":
        step, rounding = largest / 7, 2.0**-22 * largest
    elif name == "Q4_1_v100":
        step, rounding = float(x.max() - x.min()) / 15, 2.0**-21 * largest
    elif name == "Q4_2":
        # A weight of the other sign than the largest lies up to a step beyond the last code.
        beyond = np.maximum(-x * np.sign(x[np.abs(x).argmax()]) - 7.5 * largest / 8, 0)
        step, rounding = largest / 8, 2.0**-10 * largest + 8 * 2.0**-25 + beyond
    elif name == "Q4_3":
        step, rounding = float(x.max() - x.min()) / 15, 2.0**-10 * 2 * largest + 16 * 2.0**-25
    else:
        rest = np.delete(x, np.abs(x).argmax())
        # Minimum, outlier and 15 times the scale are each half a unit of fp16 off, denormal where tiny.
        step, rounding = float(rest.max() - rest.min()) / 15, 2.0**-10 * 2 * largest + 16 * 2.0**-25
    assert np.all(np.abs(y - x) <= 0.5 * step + rounding)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_exactly_comes_back(name: str) -> None:
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 2)).astype(np.float32)
    codes = codes[: FORMATS[name].group]
    codes[:2] = 0, 15
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
    packed = FORMATS[name].quantize(np.zeros(FORMATS[name].group, np.float32))
    assert not FORMATS[name].dequantize(packed).any()
    if name == "Q4_1_O":
        assert struct.unpack("<4H", packed[:8].tobytes()) == (0, 0, 65535, 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 2])
def test_a_block_with_nan_or_inf_is_nan_and_its_neighbours_are_not(name: str, bad: float, count: int) -> None:
    group = FORMATS[name].group
    w = np.random.default_rng(2).standard_normal((2, 3 * group)).astype(np.float32)
    w[1, group + 8 : group + 8 + count] = bad
    y = FORMATS[name].dequantize(FORMATS[name].quantize(w))
    assert np.isnan(y[1, group : 2 * group]).all()
    assert np.isfinite(np.delete(y.reshape(6, group), 4, axis=0)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_scheme_says_its_bits(name: str) -> None:
    codec = SCHEMES[name].codec
    assert codec is not None
    assert isinstance(codec.matrices, Packed)
    assert codec.matrices.packing is FORMATS[name]
    assert SCHEMES[name].bits == FORMATS[name].block_bytes * 8 / FORMATS[name].group
