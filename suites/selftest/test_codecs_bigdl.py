"""BigDL's block formats against bytes that the library wrote, their error bound, and the rules of every codec.

The library itself is the oracle in suites/parity/test_bigdl.py, where its environment is built.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.codecs_bigdl import ASYM_INT4, BLOCK, SYM_INT4, SYM_INT5, SYM_INT8
from reference.codecs_ggml import GgmlBlocks
from reference.config import preset
from reference.errors import ConfigError
from reference.schemes import SCHEMES, Packed, stored_bytes

PACKINGS = {"sym_int4": SYM_INT4, "asym_int4": ASYM_INT4, "sym_int5": SYM_INT5, "sym_int8": SYM_INT8}

_I = np.arange(BLOCK)
#: Blocks with all codes, with halves that fall between two codes, and with a subnormal float16 scale.
GOLDEN_BLOCKS = {
    "spread": ((_I * 37 % 64) - 31.5) / 16,
    "ties": np.where(_I == 3, -16.0, (_I - 32) / 4.0),
    "tiny": ((_I * 29 % 64) - 20) * 2.0**-26,
}
#: What ``ggml_convert_qtype`` of bigdl-llm 2.4.0 makes of them; ipex-llm 2.2.0 makes the same.
GOLDEN = {
    ("sym_int4", "spread"): "e0338019b34cd56ef8912ab35de67f08a23bc45df78f19a24cd56ef7912ab34ce67f",
    ("sym_int4", "ties"): "0040848484809595959595959595a6a6a6a6a6a6a6a6b7b7b7b7b7b7b7b7c8c8c8c8",
    ("sym_int4", "tiny"): "01806c0671178239934aa45bb5601771288239934aa45bc6601771288239944ab55b",
    ("asym_int4", "spread"): "3334e0bf8019a24bc56ef7812ab34cd57e08913ab45de67f19a23bc56df78029a34cd56e",
    ("asym_int4", "ties"): "553e00cca5a5a5b0b6b6b6b6b6c6c7c7c7c7c7c7d8d8d8d8d8d8e9e9e9e9e9e9f9fafafa",
    ("asym_int4", "tiny"): "0100058080f76ed55cc43ba32a91087fe76ed55cb43ba22991087fe66dd54cb43aa21981",
    ("sym_int5", "spread"): "e02f2ab55aa9d54aad5600335588aaddff22447799ccee11336688bbdd0f225577aaccff11446699bbee",
    ("sym_int5", "ties"): "003c000000c0ffffffff0808191019192a2a2a2a3b3b3b3b4c4c4c4c5d5d5d5d6e6e6e6e7f7f7f7f8080",
    ("sym_int5", "tiny"): "0180a10215aa50852a54c71de23f0451267349a67bc01de23f0461378459a67bc01df3401562378459a6",
    ("sym_int8", "spread"): "f8fb7d3c8116a93ed267fa8d22b54bde7306992ec257ea7f12a53ace63f6891e"
    "b147da6f02952abd53e67b0ea136ca5ff2851aad43d66bfe9126b94fe2770a9d32c65bee",
    ("sym_int8", "ties"): "0402013ec0c2c481c8caccced0d2d4d6d8dadcdee0e2e4e6e8eaeceef0f2f4f6"
    "f8fafcfe00020406080a0c0e10121416181a1c1e20222426282a2c2e30323436383a3c3e",
    ("sym_int8", "tiny"): "b55aad31c51b70095ff74de53bd4297f186d065cf44ae238d1267c156a0359f1"
    "47e035ce237912670056ee44dd32cb20760f64fd53eb41da2fc81e730c61fa50e83ed72c",
}


def rows(largest: float = 1e4) -> st.SearchStrategy[np.ndarray]:
    """Float32 ``(2, 128)``: four blocks, each of its own magnitude, of repeated or of normal values."""
    values = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5])
    repeated = arrays(np.float32, (4, BLOCK), elements=values, fill=st.just(np.float32(0.25)))
    normal = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).standard_normal((4, BLOCK)) / 8)
    exponents = st.lists(st.floats(-45, np.log10(largest)), min_size=4, max_size=4)

    def scale(drawn: tuple[np.ndarray, list[float]]) -> np.ndarray:
        with np.errstate(under="ignore"):
            return np.asarray((drawn[0] * (10.0 ** np.array(drawn[1]))[:, None]).astype(np.float32).reshape(2, -1))

    return st.tuples(repeated | normal, exponents).map(scale)


def roundtrip(packing: GgmlBlocks, w: np.ndarray) -> np.ndarray:
    return packing.dequantize(packing.quantize(w))


@pytest.mark.parametrize(("name", "block"), GOLDEN)
def test_bytes_are_the_library_s(name: str, block: str) -> None:
    w = GOLDEN_BLOCKS[block].astype(np.float32)
    assert PACKINGS[name].quantize(w).tobytes().hex() == GOLDEN[name, block]


def test_values_of_the_golden_bytes() -> None:
    """Layout and offsets, read off by hand: the first weight is the low nibble, weight 32 the high one."""
    packed = np.frombuffer(bytes.fromhex(GOLDEN["sym_int4", "ties"]), np.uint8)
    values = SYM_INT4.dequantize(packed)
    assert values[[0, 3, 32, 63]].tolist() == [-8.0, -16.0, 0.0, 8.0]  # scale 2: codes 4, 0, 8, 12
    packed = np.frombuffer(bytes.fromhex(GOLDEN["sym_int5", "ties"]), np.uint8)
    assert SYM_INT5.dequantize(packed)[[0, 3, 32, 63]].tolist() == [-8.0, -16.0, 0.0, 8.0]  # scale 1


def bound(packing: GgmlBlocks, w: np.ndarray) -> np.ndarray:
    """Half a step, the float16 roundings of scale and minimum, and the code that a symmetric format lacks.

    sym_int4 and sym_int5 give the largest weight -8 of -8..7, or -16 of -16..15: a weight of the other sign
    may lie up to a step beyond the last code.
    """
    blocks = w.astype(np.float64).reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    u, eta = 2.0**-11, 2.0**-25  # of float16, relative and subnormal
    if packing is ASYM_INT4:
        low = blocks.min(axis=1, keepdims=True)
        top, d = 15, (blocks.max(axis=1, keepdims=True) - low) / 15
        beyond, minimum = 0 * blocks, u * np.abs(low) + eta
    else:
        top = {SYM_INT4: 8, SYM_INT5: 16, SYM_INT8: 127}[packing]
        d, minimum = np.abs(largest) / top, 0 * largest
        beyond = np.maximum(-blocks * np.sign(largest) - (top - 0.5) * d, 0) if top < 127 else 0 * blocks
    if packing is SYM_INT8:
        u, eta = 2.0**-24, 2.0**-150
    float32 = 2.0**-21 * (top * d + np.abs(largest))
    return np.asarray(d / 2 + beyond + minimum + top * (u * d + eta) + float32 + 2.0**-120).reshape(w.shape)


@pytest.mark.parametrize("name", PACKINGS)
@given(w=rows())
@settings(max_examples=200)
def test_error_is_within_half_a_step_and_the_roundings_of_scale_and_minimum(name: str, w: np.ndarray) -> None:
    error = np.abs(roundtrip(PACKINGS[name], w).astype(np.float64) - w)
    assert np.all(error <= bound(PACKINGS[name], w))


@pytest.mark.parametrize("name", ["sym_int4", "sym_int5", "sym_int8"])
@given(w=rows())
def test_requantizing_keeps_every_value(name: str, w: np.ndarray) -> None:
    once = roundtrip(PACKINGS[name], w)
    again = roundtrip(PACKINGS[name], once)
    # A float16 scale comes back exactly from the largest value, -8 or -16 times it; 127 times a float32 one rounds.
    ulp = 2.0**-22 if name == "sym_int8" else 0.0
    assert np.all(np.abs(again.astype(np.float64) - once) <= ulp * np.abs(once) + (2.0**-126 if ulp else 0))


@given(w=rows())
def test_requantizing_from_a_minimum_stays_within_its_bound(w: np.ndarray) -> None:
    """The minimum is rounded to float16, so codes may move; never by more than the format's error."""
    once = roundtrip(ASYM_INT4, w)
    error = np.abs(roundtrip(ASYM_INT4, once).astype(np.float64) - once)
    assert np.all(error <= bound(ASYM_INT4, once))


@pytest.mark.parametrize(("name", "top"), [("sym_int4", 8), ("sym_int5", 16)])
@given(seed=st.integers(0, 2**32 - 1))
def test_packing_is_a_bijection_between_codes_and_bytes(name: str, top: int, seed: int) -> None:
    """Every pattern of codes that has the one of the largest weight comes back as it was packed."""
    codes = np.random.default_rng(seed).integers(0, 2 * top, (3, BLOCK))
    codes[:, seed % BLOCK] = 0
    w = (codes - top).astype(np.float32) * np.float32(0.375)
    packed = PACKINGS[name].quantize(w)
    assert packed.shape == (3, PACKINGS[name].block_bytes)
    assert np.array_equal(PACKINGS[name].dequantize(packed), w)
    assert np.array_equal(PACKINGS[name].quantize(PACKINGS[name].dequantize(packed)), packed)


@given(seed=st.integers(0, 2**32 - 1))
def test_packing_int8_and_int4_with_a_minimum_is_a_bijection(seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, (3, BLOCK))
    codes[:, seed % BLOCK] = 127
    w = codes.astype(np.float32) * np.float32(0.25)
    assert np.array_equal(SYM_INT8.quantize(w)[:, 4:].view(np.int8), codes)
    assert np.array_equal(roundtrip(SYM_INT8, w), w)
    codes = random.integers(0, 16, (3, BLOCK))
    codes[:, [seed % BLOCK, (seed + 1) % BLOCK]] = 0, 15
    w = codes.astype(np.float32) * np.float32(0.5) - np.float32(3)
    assert np.array_equal(roundtrip(ASYM_INT4, w), w)


@pytest.mark.parametrize("name", PACKINGS)
def test_a_block_of_zeros_or_of_denormals_stays_finite_and_close(name: str) -> None:
    for value in (0.0, -0.0, 1e-45, -1e-40, 3e-8):
        w = np.full((1, 2 * BLOCK), value, dtype=np.float32)
        w[0, BLOCK:] = 0.5
        out = roundtrip(PACKINGS[name], w)
        assert np.all(np.abs(out[0, :BLOCK]) <= 2 * abs(value) + 2.0**-24)
        assert np.all(np.abs(out[0, BLOCK:] - 0.5) < 1e-3)
    assert np.all(roundtrip(PACKINGS[name], np.zeros((1, BLOCK), dtype=np.float32)) == 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", PACKINGS)
def test_a_block_with_nan_or_inf_is_nan_and_no_other_changes(name: str, value: float) -> None:
    w = np.random.default_rng(0).standard_normal((2, 3 * BLOCK)).astype(np.float32)
    clean = roundtrip(PACKINGS[name], w)
    for column in (BLOCK, BLOCK + 31, 2 * BLOCK - 1):
        bad = w.copy()
        bad[1, column] = value
        out = roundtrip(PACKINGS[name], bad)
        assert np.all(np.isnan(out[1, BLOCK : 2 * BLOCK]))
        out[1, BLOCK : 2 * BLOCK] = clean[1, BLOCK : 2 * BLOCK]
        assert np.array_equal(out, clean)


@pytest.mark.parametrize("name", PACKINGS)
def test_a_row_that_blocks_do_not_divide_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="rows of 96 weights do not divide into groups of 64"):
        PACKINGS[name].quantize(np.zeros((2, 96), dtype=np.float32))


@pytest.mark.parametrize("name", PACKINGS)
def test_the_scheme_packs_matrices_and_head_and_keeps_the_rest_in_float32(name: str) -> None:
    codec, packing = SCHEMES[name].codec, PACKINGS[name]
    assert codec is not None
    for tensor in ("blocks.0.att.key.weight", "blocks.0.ffn.value.weight", "head.weight"):
        kept = codec.format(tensor)
        assert isinstance(kept, Packed)
        assert kept.packing is packing
    assert SCHEMES[name].bits == 8 * packing.block_bytes / BLOCK
    config = preset("169m")
    matrices = config.n_layer * (5 * config.n_embd**2 + 2 * config.n_embd * config.n_ffn)
    packed = (matrices + config.n_vocab * config.n_embd) // BLOCK * packing.block_bytes
    vectors = 4 * (config.n_layer * 11 * config.n_embd + 4 * config.n_embd)
    assert stored_bytes(config, name) == packed + 4 * config.n_vocab * config.n_embd + vectors
