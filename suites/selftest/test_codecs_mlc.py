"""MLC's group quantization: golden arrays, its rule in numpy's float16, its error bound, layouts and padding.

The golden arrays were made by the rule of MLC-LLM's ``group_quantization.py``, written as a tensor expression
and run by Apache TVM 0.27 on its LLVM target; MLC-LLM itself is not needed, and not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.codecs_mlc import MlcGroups
from reference.config import Config, tensor_shapes
from reference.errors import ConfigError
from reference.mlc_params import mlc_arrays
from reference.schemes import SCHEMES, Floats, Packed, apply
from reference.weights import Tensor, Weights, f32_to_bf16
from suites.selftest.test_codecs import ROUNDING, matrices

FORMATS = {
    "3 f16": MlcGroups(3, np.float16, 40),
    "4 f16": MlcGroups(4, np.float16),
    "4 f32": MlcGroups(4, np.float32),
    "8 f16": MlcGroups(8, np.float16),
}
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.system == "MLC" and scheme.group]

#: Two rows of 48 weights in groups of 40, or of 40 in groups of 32: the words of each group, then the scales.
GOLDEN = {
    "3 f16": (
        "10b36616849a353422d6ac2216b36616 849a3500000000000000000000000000"
        "b488352ba145ac1916a1660db308352b a145ac00000000000000000000000000",
        "8f35553571355535",
    ),
    "4 f16": (
        "501ac7834d09b6723ce8a5612bd7945e 0bc6824e000000000000000000000000"
        "09b5723ce8a4612bd7935e1ac6824d09 b5712ce8000000000000000000000000",
        "c3301930aa304930",
    ),
    "4 f32": (
        "501ac7834d09b6723ce8a5612bd7945e 0bc6824e000000000000000000000000"
        "09b5723ce8a4612bd7935e1ac6824d09 b5712ce8000000000000000000000000",
        "8661183e310c033e5655153e9224093e",
    ),
    "8 f16": (
        "005ebc1977d53391ef4caa0866c4217fdd3a98f654b20f6dcb2987e542a0fe5b"
        "c30673e02391fe41000000000000000000000000000000000000000000000000"
        "a80262c21c7cdc3696f650b00a6aca2484e43e9efe58b81272d22c8cec46a600"
        "5dc61179e22d96fe000000000000000000000000000000000000000000000000",
        "3320391f1d208f1f",
    ),
}


def mlc_bound(packing: MlcGroups, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Largest error that the format allows, from the rule ``code = clip(rint(w / s + z), 0, 2z)``, ``s = m / z``.

    Every operation rounds by u (relative) or eta (denormal). The weight itself: u |w| + eta. The
    code: half a step, and u of the quotient (at most m / s) and of the sum (at most m / s + z). The
    clip: m exceeds z s by at most u m + z eta. The product, in float32: 2^-24 of it.
    """
    u, eta = ROUNDING[packing.model_type]
    z = packing.zero
    padding = scale.shape[-1] * packing.group - w.shape[-1]
    groups = np.pad(np.abs(w.astype(np.float64)), [(0, 0), (0, padding)]).reshape(*scale.shape, packing.group)
    m = groups.max(axis=-1, keepdims=True) * (1 + u) + eta
    s = scale.astype(np.float64)[..., None]
    code = s * (0.5 + eta) + u * (1 + u) * (2 * m + s * z)
    clip = u * m + z * eta
    product = 2.0**-24 * z * s + 2.0**-150
    bound = np.asarray(code + clip + product + u * groups + eta)
    return bound.reshape(len(w), -1)[:, : w.shape[-1]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_arrays_are_those_of_mlcs_rule_run_by_tvm(name: str, layout: str) -> None:
    plain = FORMATS[name]
    packing = MlcGroups(plain.bits, plain.model_type, plain.group, layout)
    columns = packing.group + 8
    w = (np.arange(2 * columns) * 37 % 101 - 50).reshape(2, columns).astype(np.float32) / np.float32(48)
    arrays = packing.arrays(packing.quantize(w))
    words, scales = (bytes.fromhex(part) for part in GOLDEN[name])
    expected = np.frombuffer(words, "<u4").reshape(2, -1), np.frombuffer(scales, packing.model_type).reshape(2, 2)
    for array, golden in zip(arrays.values(), expected, strict=True):
        assert array.flags.c_contiguous
        assert array.dtype == golden.dtype
        assert np.array_equal(array, golden.T if layout == "KN" else golden)


def test_words_hold_the_first_code_in_the_lowest_bits() -> None:
    w = np.zeros((1, 40), dtype=np.float32)
    w[0, :8] = [-7, -6, -1, 0, 1, 2, 6, 7]
    packed = FORMATS["4 f16"].quantize(w[:, :32])
    assert packed.q_weight.tolist() == [[0xED987610, 0x77777777, 0x77777777, 0x77777777]]
    assert packed.q_scale.tolist() == [[1.0]]
    packed = MlcGroups(8, np.float32).quantize(w[:, :32] * np.float32(127 / 7))
    assert packed.q_weight[0, 0] == 127 - 127 | 127 - 109 << 8 | 127 - 18 << 16 | 127 << 24
    w[0, :10] = [-3, -2, -1, 0, 1, 2, 3, 3, 0, -3]
    octal = FORMATS["3 f16"].quantize(w).q_weight  # ten codes, one octal digit each; two bits are left over
    assert octal.tolist() == [[0o0366543210, 0o3333333333, 0o3333333333, 0o3333333333]]


@pytest.mark.parametrize("name", FORMATS)
@given(w=matrices(), columns=st.integers(1, 64))
def test_error_is_within_half_a_step_and_the_rounding_of_its_type(name: str, w: np.ndarray, columns: int) -> None:
    w = w[:, :columns]
    packed = FORMATS[name].quantize(w)
    error = np.abs(FORMATS[name].dequantize(packed).astype(np.float64) - w)
    assert np.all(error <= mlc_bound(FORMATS[name], w, packed.q_scale))


@pytest.mark.parametrize("name", ["3 f16", "4 f16", "8 f16"])
@given(w=matrices())
def test_it_quantizes_in_float16_as_numpys_float16_does(name: str, w: np.ndarray) -> None:
    packing = FORMATS[name]
    z = np.float16(packing.zero)
    groups = w[:, : packing.group].astype(np.float16)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / z
    safe = np.where(scale > 0, scale, np.float16(1))
    codes = np.where(scale > 0, np.clip(np.rint(groups / safe + z), 0, 2 * z), z)
    packed = packing.quantize(w[:, : packing.group])
    assert packed.q_scale.dtype == np.float16
    assert np.array_equal(packed.q_scale, scale)
    assert np.array_equal(packing.unpack(packed.q_weight).reshape(codes.shape), codes)


@pytest.mark.parametrize("name", FORMATS)
@given(w=matrices(smallest=1e-2), columns=st.integers(1, 64))
def test_requantizing_keeps_the_codes_and_moves_a_scale_by_one_ulp_at_most(
    name: str, w: np.ndarray, columns: int
) -> None:
    # A scale times z, over z again, may round: the values are the same to that ulp only.
    once = FORMATS[name].quantize(w[:, :columns])
    twice = FORMATS[name].quantize(FORMATS[name].dequantize(once))
    assert np.array_equal(once.q_weight, twice.q_weight)
    bits = np.uint16 if FORMATS[name].model_type is np.float16 else np.uint32
    assert np.all(np.abs(once.q_scale.view(bits).astype(np.int64) - twice.q_scale.view(bits)) <= 1)


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 2**32 - 1))
def test_packing_is_a_bijection_between_codes_and_words(name: str, seed: int) -> None:
    packing = FORMATS[name]
    codes = np.random.default_rng(seed).integers(0, 2**packing.bits, (3, 4 * packing.group), dtype=np.uint32)
    words = packing.pack(codes)
    assert words.dtype == np.uint32
    assert words.shape == (3, codes.shape[1] // packing.per_word)
    assert np.array_equal(packing.unpack(words).reshape(codes.shape), codes)
    assert np.array_equal(packing.pack(packing.unpack(words).reshape(codes.shape)), words)


@pytest.mark.parametrize("name", FORMATS)
@given(w=matrices(), columns=st.integers(1, 64))
def test_a_short_last_group_is_quantized_by_itself_and_filled_up_with_zero_bits(
    name: str, w: np.ndarray, columns: int
) -> None:
    packing = FORMATS[name]
    whole = columns // packing.group * packing.group
    assume(whole < columns)
    packed, last = packing.quantize(w[:, :columns]), packing.quantize(w[:, whole:columns])
    words = packing.group // packing.per_word
    assert np.array_equal(packed.q_weight[:, -words:], last.q_weight)
    assert np.array_equal(packed.q_scale[:, -1:], last.q_scale)
    assert not packing.unpack(last.q_weight).reshape(2, -1)[:, columns - whole :].any()
    assert packing.dequantize(packed).shape == (2, columns)
    assert packed.q_weight.nbytes + packed.q_scale.nbytes == packing.packed_bytes((2, columns))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["NK", "KN"])
@given(w=matrices(), columns=st.integers(1, 64))
def test_stored_arrays_read_back_are_the_matrix(name: str, layout: str, w: np.ndarray, columns: int) -> None:
    plain = FORMATS[name]
    packing = MlcGroups(plain.bits, plain.model_type, plain.group, layout)
    packed = packing.quantize(w[:, :columns])
    again = packing.from_arrays(**packing.arrays(packed), columns=columns)
    assert np.array_equal(packing.dequantize(again), plain.dequantize(plain.quantize(w[:, :columns])))


def test_arrays_of_another_matrix_layout_or_format_are_refused() -> None:
    packing = MlcGroups(4, np.float16, 32, "KN")
    arrays = packing.arrays(packing.quantize(np.ones((3, 64), np.float32)))
    others: list[tuple[MlcGroups, int]] = [(packing, 65), (packing, 32), (FORMATS["4 f16"], 64), (FORMATS["8 f16"], 64)]
    for other, columns in others:
        with pytest.raises(ValueError, match=rf"are not a matrix of {columns} inputs"):
            other.from_arrays(**arrays, columns=columns)


@pytest.mark.parametrize(("bits", "group", "layout"), [(3, 32, "NK"), (4, 12, "NK"), (1, 32, "NK"), (4, 32, "NKC")])
def test_a_format_that_cannot_be_is_refused(bits: int, group: int, layout: str) -> None:
    with pytest.raises(ValueError, match=r"layouts: NK, KN|do not fill whole words"):
        MlcGroups(bits, np.float16, group, layout)


# --- the arrays of a model ---------------------------------------------------------------------------------------

CONFIG = Config(n_layer=1, n_embd=48, n_ffn=96, n_vocab=33)


def model(stored: str = "f32") -> Weights:
    rng = np.random.default_rng(0)
    drawn = {n: rng.standard_normal(s).astype(np.float32) for n, s in tensor_shapes(CONFIG).items()}
    if stored == "bf16":
        return Weights(CONFIG, {name: Tensor.of(f32_to_bf16(value), "bf16") for name, value in drawn.items()})
    return Weights.of(CONFIG, drawn)


def packing_of(scheme: str, tensor: str) -> Any:
    codec = SCHEMES[scheme].codec
    assert codec is not None
    kept = codec.format(tensor)
    return kept.packing if isinstance(kept, Packed) else None


def test_the_list_is_complete() -> None:
    names = "q3f16_0 q3f16_1 q4f32_0 q4f32_1 q4f16_0 q4f16_1 q4f16_2 q8f16_0 q8f16_1"
    assert names.split() == QUANTIZED


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("stored", ["f32", "bf16"])
def test_a_models_arrays_have_mlcs_names_types_and_shapes_and_the_schemes_values(
    scheme: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reference.mlc_params._BLOCK_ELEMENTS", 500)  # several blocks of rows
    weights, applied = model(stored), apply(model(stored), scheme)
    bits, float_type = int(scheme[1]), np.float32 if "f32" in scheme else np.float16
    group, per_word = (40, 10) if bits == 3 else (32, 32 // bits)
    for name, tensor in weights.items():
        found = mlc_arrays(name, tensor, scheme)
        ends = name in ("emb.weight", "head.weight")
        if len(tensor.shape) == 1 or (ends and scheme == "q4f16_2"):
            wide = name.endswith(("time_decay", "time_first"))
            assert {k: v.dtype for k, v in found.items()} == {name: np.float32 if wide else float_type}
            assert np.array_equal(found[name], applied[name].array())
            continue
        stem, (rows, columns) = name.removesuffix("weight"), tensor.shape
        groups = -(-columns // group)
        shapes = {stem + "q_weight": (rows, groups * group // per_word), stem + "q_scale": (rows, groups)}
        if scheme.endswith("_0") and name != "emb.weight":
            shapes = {part: shape[::-1] for part, shape in shapes.items()}
        assert {part: array.shape for part, array in found.items()} == shapes
        assert [array.dtype for array in found.values()] == [np.uint32, float_type]
        packing = packing_of(scheme, name)
        assert np.array_equal(packing.dequantize(packing.from_arrays(*found.values(), columns)), applied[name].array())


def test_layouts_do_not_change_values() -> None:
    weights = model()
    for kn, nk in (("q3f16_0", "q3f16_1"), ("q4f16_0", "q4f16_1"), ("q4f32_0", "q4f32_1"), ("q8f16_0", "q8f16_1")):
        left, right = apply(weights, kn), apply(weights, nk)
        assert all(np.array_equal(left[name].array(), right[name].array()) for name in weights)


def test_q4f16_2_differs_from_q4f16_1_in_embedding_and_head_alone() -> None:
    one, two = SCHEMES["q4f16_1"].codec, SCHEMES["q4f16_2"].codec
    assert one is not None
    assert two is not None
    assert {n for n in tensor_shapes(CONFIG) if one.format(n) != two.format(n)} == {"emb.weight", "head.weight"}
    assert two.embedding == two.head == Floats("f16")


def test_a_scheme_of_another_system_has_no_such_arrays() -> None:
    with pytest.raises(ConfigError, match="scheme Q4_0 is not one of MLC-LLM's"):
        mlc_arrays("head.weight", model()["head.weight"], "Q4_0")
