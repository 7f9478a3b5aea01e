"""Rules that every group codec of the list keeps: zeros, denormals, what is not finite, sizes, rows by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.errors import ConfigError
from reference.schemes import SCHEMES, Packed

#: Scheme -> how it keeps a layer's matrix.
KEPT: dict[str, Packed] = {
    name: scheme.codec.matrices
    for name, scheme in SCHEMES.items()
    if scheme.codec is not None and isinstance(scheme.codec.matrices, Packed)
}
NON_FINITE = (np.nan, np.inf, -np.inf)


def roundtrip(name: str, w: np.ndarray) -> np.ndarray:
    packing = KEPT[name].packing
    return np.asarray(packing.dequantize(packing.quantize(w)))


def nbytes(packed: Any) -> int:
    parts = packed if isinstance(packed, tuple) else (packed,)
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def test_every_quantized_scheme_is_here_or_has_tests_of_its_own() -> None:
    quantized = {n for n, s in SCHEMES.items() if s.codec is not None and s.scheme_class.startswith("int")}
    assert quantized - set(KEPT) == {"fp32i8", "fp16i8"}  # packed as whole matrices: test_codecs_rwkv_int8


@pytest.mark.parametrize("name", KEPT)
def test_a_group_of_zeros_or_of_denormals_stays_finite_and_close(name: str) -> None:
    group = KEPT[name].packing.group
    for value in (0.0, -0.0, 1e-45, -1e-40, 3e-8):
        w = np.full((1, 2 * group), value, dtype=np.float32)
        w[0, group:] = 0.5
        out = roundtrip(name, w)
        assert np.all(np.abs(out[0, :group]) <= 2 * abs(value) + 2.0**-24)
        assert np.all(np.abs(out[0, group:] - 0.5) < 1e-3)
    assert np.all(roundtrip(name, np.zeros((1, group), dtype=np.float32)) == 0)


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("name", KEPT)
def test_a_group_with_nan_or_inf_is_nan_and_no_other_changes(name: str, value: float) -> None:
    group = KEPT[name].packing.group
    w = np.random.default_rng(0).standard_normal((2, 3 * group)).astype(np.float32)
    clean = roundtrip(name, w)
    for column in (group, group + 7, 2 * group - 1):
        bad = w.copy()
        bad[1, column] = value
        out = roundtrip(name, bad)
        assert np.all(np.isnan(out[1, group : 2 * group]))
        out[1, group : 2 * group] = clean[1, group : 2 * group]
        assert np.array_equal(out, clean)


@pytest.mark.parametrize("name", KEPT)
def test_a_row_that_groups_do_not_divide_is_padded_or_refused(name: str) -> None:
    kept, group = KEPT[name], KEPT[name].packing.group
    w = np.random.default_rng(1).standard_normal((2, group + 8)).astype(np.float32)
    if kept.pads:
        assert roundtrip(name, w).shape == w.shape
        assert kept.nbytes("head.weight", w.shape, "f32") == nbytes(kept.packing.quantize(w))
        return
    with pytest.raises(ConfigError, match=f"rows of {group + 8} weights do not divide into groups of {group}"):
        kept.packing.quantize(w)
    with pytest.raises(ConfigError, match=f"head.weight has rows of {group + 8} weights"):
        kept.nbytes("head.weight", w.shape, "f32")


@pytest.mark.parametrize("name", KEPT)
@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 5), rows=st.integers(1, 4))
@settings(max_examples=20)
def test_rows_are_packed_each_by_itself_and_sizes_are_as_said(name: str, seed: int, groups: int, rows: int) -> None:
    packing = KEPT[name].packing
    w = np.random.default_rng(seed).standard_normal((rows, groups * packing.group)).astype(np.float32)
    before = w.copy()
    whole = roundtrip(name, w)
    assert np.array_equal(w, before)
    assert whole.dtype == np.float32
    assert whole.shape == w.shape
    assert nbytes(packing.quantize(w)) == packing.packed_bytes(w.shape)
    for row in range(rows):
        assert np.array_equal(roundtrip(name, w[row]), whole[row])


@pytest.mark.parametrize("name", KEPT)
def test_types_named_as_scales_account_for_the_bits_of_a_group(name: str) -> None:
    scheme, group = SCHEMES[name], KEPT[name].packing.group
    beside = sum({"f16": 16, "f32": 32, "min": 0, "zero": 0}[part] for part in scheme.scales.split("+"))
    beside *= 2 if scheme.scales.endswith("+min") else 1
    if name == "Q4_1_O":
        beside += 32  # index and value of the outlier
    code_bits = int(scheme.scheme_class.removeprefix("int"))
    word_waste = 0.2 if code_bits == 3 else 0.0  # ten codes in 32 bits
    for groups in (1, 2, 3):
        zeros = 8 * -(-groups * code_bits // 8) if scheme.scales.endswith("+zero") else 0  # packed, in whole bytes
        stored = KEPT[name].packing.packed_bytes((1, groups * group)) * 8 / (groups * group)
        assert stored == pytest.approx(code_bits + word_waste + beside / group + zeros / (groups * group))
