"""Schemes: names, classes, stored sizes, and what apply makes of a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

import reference.stored_formats
from reference.codecs_rwkv_int8 import RwkvInt8
from reference.config import Config, tensor_shapes
from reference.errors import ConfigError
from reference.schemes import (
    SCHEME_CLASSES,
    SCHEMES,
    Floats,
    Packed,
    Scheme,
    apply,
    bytes_read_per_token,
    get_scheme,
    scheme_names,
    stored_bytes,
)
from reference.weights import STORED_TYPES, Tensor, Weights, bf16_to_f32

#: The others, such as Q4_K, have quality rows only.
WITH_CODEC = [name for name, scheme in SCHEMES.items() if scheme.codec is not None]

#: Rows that every scheme's groups divide, or the scheme pads.
CONFIG = Config(n_layer=2, n_embd=128, n_ffn=256, n_vocab=96)


def random_weights(stored: str = "f32", config: Config = CONFIG) -> Weights:
    rng = np.random.default_rng(1)
    arrays = {n: (rng.standard_normal(s) * 0.1).astype(np.float32) for n, s in tensor_shapes(config).items()}
    return apply(Weights.of(config, arrays), {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}[stored])


def test_every_scheme_belongs_to_a_class_and_states_its_bits() -> None:
    for name, scheme in SCHEMES.items():
        assert scheme.name == name
        assert scheme.scheme_class in SCHEME_CLASSES
        assert scheme.bits is not None
        assert 1 < scheme.bits <= 32
        if scheme.codec is None:
            assert scheme.bits == scheme.stated
            continue
        assert scheme.stated is None


#: Rows of the layers' matrices of the 169M shape, by the weights in a row.
ROWS_169M = {"att.key": (768, 12 * 4 * 768), "ffn.key": (768, 12 * (768 + 3072)), "ffn.value": (3072, 12 * 768)}


@pytest.mark.parametrize("name", WITH_CODEC)
def test_bits_are_those_that_quantizing_takes_at_the_169m_shape(name: str) -> None:
    codec = SCHEMES[name].codec
    assert codec is not None
    bits = 0
    for part, (columns, rows) in ROWS_169M.items():
        kept = codec.format(f"blocks.0.{part}.weight")
        if isinstance(kept, Packed):
            packed = kept.packing.quantize(np.ones((1, columns), np.float32))
            parts = packed if isinstance(packed, tuple) else (packed,)
            bits += 8 * rows * sum(part.nbytes for part in parts if isinstance(part, np.ndarray))
        elif isinstance(kept, Floats):
            bits += 8 * rows * kept.keep("x", Tensor.of(np.ones((1, columns), np.float32), "f32")).read().nbytes
    if isinstance(kept, RwkvInt8):  # scales and offsets of rows and columns, which no row has for itself
        beside = 60 * 2 * (768 + 768) + 24 * 2 * (768 + 3072)
        bits = 8 * (sum(c * r for c, r in ROWS_169M.values()) + beside * np.dtype(kept.kept).itemsize)
    assert SCHEMES[name].bits == bits / sum(columns * rows for columns, rows in ROWS_169M.values())


def test_bits_count_the_padding_of_groups_of_40() -> None:
    assert SCHEMES["q3f16_1"].bits == pytest.approx(3.75 * 3 / 4 + 77 * 18 * 8 / 3072 / 4, abs=0.02)
    assert SCHEMES["q4f16_1"].bits == 4.5


def test_every_quantized_scheme_says_its_group_scales_and_what_stays() -> None:
    for name in WITH_CODEC:
        scheme = SCHEMES[name]
        floats = scheme.scheme_class in ("f32", "f16", "bf16")
        assert (scheme.group is None) == (scheme.scales == "") == floats
        assert (scheme.unquantized == ("everything",)) == floats
    stays = {
        name: SCHEMES[name].unquantized
        for name in ("q4f16_1", "q4f16_2", "Q4_0", "sym_int4", "ort_int4_g32", "Q4_K", "FP16")
    }
    assert stays == {
        "q4f16_1": ("vectors",),
        "q4f16_2": ("embedding", "head", "vectors"),
        "Q4_0": ("embedding", "head", "vectors"),
        "sym_int4": ("embedding", "vectors"),
        "ort_int4_g32": ("embedding", "vectors"),
        "Q4_K": None,
        "FP16": ("everything",),
    }
    assert [SCHEMES[name].group for name in ("q3f16_0", "Q4_2", "sym_int4", "fp32i8")] == [40, 16, 64, "axis"]


def test_get_scheme_offers_the_nearest_name() -> None:
    assert get_scheme("q4f16_1") is SCHEMES["q4f16_1"]
    for typo, meant in (("q4_0", "Q4_0"), ("q4f16-1", "q4f16_1"), ("f16", "fp16"), ("BF16", "bf16"), ("Fp16", "fp16")):
        with pytest.raises(ConfigError, match=f"no scheme '{typo}'; did you mean '{meant}'\\? schemes: fp32, fp16"):
            get_scheme(typo)
    with pytest.raises(ConfigError, match="no scheme 'zzz'; schemes: fp32"):
        get_scheme("zzz")


def test_scheme_names_by_class() -> None:
    assert scheme_names() == list(SCHEMES)
    assert scheme_names("int4")[:6] == ["q4f32_0", "q4f32_1", "q4f16_0", "q4f16_1", "q4f16_2", "Q4_0"]
    assert scheme_names("f16") == ["fp16", "q0f16", "FP16"]
    for scheme_class in SCHEME_CLASSES:
        assert {SCHEMES[name].scheme_class for name in scheme_names(scheme_class)} <= {scheme_class}
    assert scheme_names("int3") == ["q3f16_0", "q3f16_1"]
    with pytest.raises(ConfigError, match="no scheme class 'int2'; classes: f32"):
        scheme_names("int2")


@pytest.mark.parametrize("name", WITH_CODEC)
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_stored_bytes_are_the_bytes_that_packing_gives(name: str, source: str) -> None:
    weights, codec = random_weights(source), SCHEMES[name].codec
    assert codec is not None
    sizes = {}
    for tensor_name, tensor in weights.items():
        kept = codec.format(tensor_name)
        if isinstance(kept, Packed):
            packed = kept.packing.quantize(tensor.array())
            parts = packed if isinstance(packed, tuple) else (packed,)
            sizes[tensor_name] = sum(part.nbytes for part in parts if isinstance(part, np.ndarray))
        elif isinstance(kept, RwkvInt8):
            sizes[tensor_name] = sum(part.nbytes for part in kept.quantize(tensor.array()))
        else:
            sizes[tensor_name] = kept.keep(tensor_name, tensor).read().nbytes
    assert stored_bytes(CONFIG, name, source) == sum(sizes.values())
    read = sum(sizes.values()) - sizes["emb.weight"] + sizes["emb.weight"] // CONFIG.n_vocab
    assert bytes_read_per_token(CONFIG, name, source) == read


def test_stored_bytes_of_a_released_size() -> None:
    config = Config(n_layer=12, n_embd=768, n_ffn=3072, n_vocab=50277)
    matrices = 2 * 50277 * 768 + 12 * (5 * 768 * 768 + 2 * 768 * 3072)
    vectors, decay = 768 * (4 + 12 * (4 + 5)), 768 * 12 * 2
    assert stored_bytes(config, "fp32") == 4 * (matrices + vectors + decay)
    assert stored_bytes(config, "q4f16_1") == matrices // 2 + matrices // 32 * 2 + 2 * vectors + 4 * decay
    quantized = matrices - 2 * 50277 * 768
    assert stored_bytes(config, "Q4_0") == quantized // 32 * 18 + 2 * 50277 * 768 * 2 + 4 * (vectors + decay)


@pytest.mark.parametrize("name", WITH_CODEC)
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_apply_keeps_shapes_and_stays_close(name: str, source: str) -> None:
    weights = random_weights(source)
    applied = apply(weights, name)
    worst = {"f32": 1e-7, "f16": 5e-4, "bf16": 4e-3, "int8": 0.01, "int5": 0.08, "int4": 0.16, "int3": 0.28}[
        SCHEMES[name].scheme_class
    ]
    for tensor_name, tensor in applied.items():
        assert tensor.shape == weights[tensor_name].shape
        assert tensor.read().dtype == STORED_TYPES[tensor.stored]
        before, after = weights[tensor_name].array(), tensor.array()
        assert np.linalg.norm(after - before) <= worst * np.linalg.norm(before)
    assert applied.in_memory()["head.weight"].array().dtype == np.float32


@pytest.mark.parametrize("name", WITH_CODEC)
def test_rows_read_alone_or_in_blocks_are_the_rows_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = apply(random_weights("bf16"), name)
    whole = {n: tensors[n].array(np.float64) for n in ("emb.weight", "ln_out.weight", "blocks.1.ffn.value.weight")}
    monkeypatch.setattr(reference.stored_formats, "_BLOCK_ELEMENTS", 600)
    for tensor_name, expected in whole.items():
        for index in (slice(None), slice(3, 40), slice(50, 2, -7), slice(0, 0), np.array([5, 0, 5]), 7):
            assert np.array_equal(tensors[tensor_name].rows(index, np.float64), expected[index])
        raw = tensors[tensor_name].read()
        values = bf16_to_f32(raw) if tensors[tensor_name].stored == "bf16" else raw
        assert np.array_equal(values, expected)


def test_apply_leaves_alone_what_is_stored_that_way_already() -> None:
    weights = random_weights("f16")
    assert all(apply(weights, "fp16")[name] is tensor for name, tensor in weights.items())
    ggml = apply(weights, "Q4_0")
    assert ggml["head.weight"] is weights["head.weight"]
    assert ggml["ln_out.weight"].stored == "f32"
    mlc = apply(weights, "q4f16_1")
    assert mlc["ln_out.weight"] is weights["ln_out.weight"]
    assert mlc["blocks.0.att.time_decay"].stored == "f32"


def test_rwkv_cpps_fp16_leaves_every_vector_in_float32() -> None:
    kept = apply(random_weights("bf16"), "FP16")
    vectors = {name for name, tensor in kept.items() if tensor.stored == "f32"}
    assert vectors == {name for name, tensor in kept.items() if len(tensor.shape) == 1}
    assert {kept[name].stored for name in kept if name not in vectors} == {"f16"}


def test_float_schemes_show_what_leaves_their_range_as_inf() -> None:
    weights = random_weights("f32").in_memory()
    weights["head.weight"].read()[3, 5] = 1e6
    weights["head.weight"].read()[4, 5] = np.nan
    head = apply(weights, "fp16")["head.weight"].array()
    assert head[3, 5] == np.inf
    assert np.isnan(head[4, 5])
    assert apply(weights, "fp32")["head.weight"].array()[3, 5] == 1e6
    assert np.isnan(apply(weights, "bf16")["head.weight"].array()[4, 5])
    assert np.isnan(apply(weights, "q4f16_1")["head.weight"].array()[3, :32]).all()


def test_apply_reads_nothing_until_a_tensor_is_read() -> None:
    def refuse() -> np.ndarray:
        raise AssertionError("read too early")

    shapes = tensor_shapes(CONFIG)
    weights = Weights(CONFIG, {name: Tensor("f32", shape, refuse) for name, shape in shapes.items()})
    for name in WITH_CODEC:
        assert len(apply(weights, name)) == len(shapes)


def test_a_group_that_does_not_divide_a_row_is_named_unless_the_codec_pads() -> None:
    config = Config(n_layer=1, n_embd=48, n_ffn=96, n_vocab=32)
    message = r"blocks\.0\.att\.key\.weight has rows of 48 weights, which do not divide into groups of 32"
    with pytest.raises(ConfigError, match=message):
        stored_bytes(config, "Q4_0")
    with pytest.raises(ConfigError, match=message):
        apply(random_weights("f32", config), "Q8_0")
    assert stored_bytes(config, "fp16") > 0
    assert stored_bytes(config, "Q4_2") > 0
    padded = apply(random_weights("f32", config), "q4f16_1")
    assert padded["blocks.0.att.key.weight"].array().shape == (48, 48)


def test_a_scheme_without_a_codec_is_refused_by_name() -> None:
    scheme = Scheme("Q3_K", "int3", "ggml", None, stated=3.4)
    for use in (lambda: apply(random_weights(), scheme), lambda: stored_bytes(CONFIG, scheme)):
        with pytest.raises(ConfigError, match="scheme Q3_K has no codec here"):
            use()
