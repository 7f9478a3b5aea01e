"""bigdl-llm and ipex-llm in their environments: gates, their kernels layer by layer, and the bytes they keep.

The gate holds whole models against bounds that int8 activations make wide. Here every layer is also held
against numpy with the same int8 activations, where only float32 roundings are left: a wrong scale, offset or
code of one layer cannot hide there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from backends import bigdl_llm, ipex_llm_rwkv
from backends.api import StateAccess, Traceable, Unavailable, Unsupported
from backends.shared.bigdl_session import SCHEMES
from harness import open_session
from harness.isolation import start
from harness.parity import gate
from harness.session import Opened
from harness.tolerance import derive
from reference import schemes
from reference.codecs_bigdl import ASYM_INT4, BLOCK, SYM_INT4, SYM_INT5, SYM_INT8
from reference.config import Config
from reference.converted import content_key, derived
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

BACKENDS: dict[str, ModuleType] = {"bigdl-llm": bigdl_llm, "ipex-llm": ipex_llm_rwkv}
LOW_BIT = {"sym_int4": SYM_INT4, "asym_int4": ASYM_INT4, "sym_int5": SYM_INT5, "sym_int8": SYM_INT8}
SHAPES = {
    "one layer": Config(n_layer=1, n_embd=64, n_ffn=256, n_vocab=54),
    "wide": Config(n_layer=2, n_embd=192, n_ffn=320, n_vocab=301),
    # ipex-llm takes a layer with as many outputs as the vocabulary has ids for the head.
    "vocabulary of n_embd": Config(n_layer=2, n_embd=128, n_ffn=256, n_vocab=128),
}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 50, 40)]

#: Trace points: what a quantized layer takes, what it gives. The two receptances are seen behind their sigmoid only.
LAYERS = {
    "att.key": ("att.xk", "att.k"),
    "att.value": ("att.xv", "att.v"),
    "att.output": ("att.rwkv", "att.out"),
    "ffn.key": ("ffn.xk", "ffn.k"),
    "ffn.value": ("ffn.k2", "ffn.v"),
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend whose environment is built."""
    name: str = request.param
    try:
        start.environment(name, BACKENDS[name])
    except Unavailable as missing:
        pytest.skip(str(missing))
    return name


def opened(backend: str, weights: Weights, scheme: str) -> AbstractContextManager[Opened]:
    return open_session(backend, weights, scheme, threads=1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(backend: str, shape: str, scheme: str) -> None:
    weights = synthetic(SHAPES[shape], 1, 1.5)
    with opened(backend, weights, scheme) as there:
        assert isinstance(there.session, StateAccess)
        found = gate(there.session, derive(weights, scheme, there.arithmetic, TOKENS))
    assert found.state
    assert found.passed, str(found.first_bad)
    assert not found.loose  # a float type that was silently another would be


@pytest.mark.parametrize("scheme", LOW_BIT)
def test_every_layer_computes_what_is_declared(backend: str, scheme: str) -> None:
    """Products at 1, 3 and 64 rows, the decode and the prefill kernels, beside numpy on the codec's weights."""
    config = Config(n_layer=2, n_embd=128, n_ffn=448, n_vocab=301)
    weights = synthetic(config, 2, 1.5)
    stored = schemes.apply(weights, scheme)
    with opened(backend, weights, scheme) as there:
        session = there.session
        assert isinstance(session, Traceable)
        for rows in (1, 3, 64):
            seen: dict[str, np.ndarray] = {}
            session.trace([int(i) for i in np.random.default_rng(rows).integers(0, 301, rows)], None, seen.__setitem__)
            check_product("head", seen["ln_out"], seen["logits"], stored["head.weight"])
            for i in range(config.n_layer):
                at = f"blocks.{i}."
                for layer, (before, after) in LAYERS.items():
                    check_product(at + layer, seen[at + before], seen[at + after], stored[f"{at}{layer}.weight"])


def check_product(name: str, x: np.ndarray, y: np.ndarray, weight: Tensor) -> None:
    """``y (T, N)`` is ``x (T, K)``, rounded to int8, times ``weight (N, K)``, but for float32 roundings."""
    (taken, doubt), w = as_kernels_take(x), weight.array(np.float64)
    # Integer sums of a block are exact; scales, block sums and their sum round, in any order.
    roundings = x.shape[1] / BLOCK + 4
    bound = roundings * 2.0**-23 * (np.abs(taken) @ np.abs(w).T) + doubt @ np.abs(w).T
    off = np.abs(y - taken @ w.T)
    assert np.all(off <= bound), f"{name}: {len(x)} rows, {np.max(off / bound):.1f} times the bound"


def as_kernels_take(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``x (T, K)`` rounded to int8 per block of 64, and the steps by which that is in doubt; both float64.

    Half way between two codes the AVX kernels round away from zero, after multiplying with 1 / (max / 127), the
    later ones to even, after multiplying with 127 / max: near a half, a code may be the next one.
    """
    blocks = x.astype(np.float64).reshape(len(x), -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    exact = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    codes = np.rint(exact)
    halves = np.abs(np.abs(exact - codes) - 0.5) <= 127 * 2.0**-22
    return (codes * scale).reshape(x.shape), (halves * scale).reshape(x.shape)


@pytest.mark.parametrize("scheme", LOW_BIT)
def test_the_codec_s_bytes_are_those_it_keeps(backend: str, scheme: str) -> None:
    """Every block of every layer in the file that it writes and loads: ordinary, huge, tiny, tied, zero."""
    weights = with_head(adversarial_blocks(1024))
    kept = kept_tensors(backend, weights, scheme)
    for name, layer in (("head", "head"), ("blocks.0.att.key", "rwkv.blocks.0.attention.key")):
        expected = LOW_BIT[scheme].quantize(weights[f"{name}.weight"].array()).reshape(-1, LOW_BIT[scheme].block_bytes)
        found = kept[f"{layer}.weight"].reshape(expected.shape)
        wrong = np.flatnonzero((found != expected).any(axis=1))
        assert not wrong.size, f"{name}: {wrong.size} of {len(expected)} blocks differ, first {wrong[0]}"
    for name, vector in (
        ("blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight"),
        ("emb.weight", "rwkv.embeddings.weight"),
    ):
        assert np.array_equal(kept[vector], weights[name].array())


def test_the_library_gives_a_weight_that_is_nan_some_code(backend: str) -> None:
    """Why the codec marks such a block and the gate fails it. When this fails, say so in reference/codecs_bigdl.py."""
    blocks = adversarial_blocks(64)
    blocks[0] = 1.0
    blocks[0, 5] = np.nan
    kept = kept_tensors(backend, with_head(blocks), "sym_int4")["head.weight"].reshape(64, -1)
    assert np.all(np.isfinite(SYM_INT4.dequantize(kept[0])))
    assert np.all(np.isnan(SYM_INT4.dequantize(SYM_INT4.quantize(blocks[0]))))


def with_head(blocks: np.ndarray) -> Weights:
    """A small model with ``blocks (n_vocab, 64)`` as its head."""
    plain = synthetic(Config(n_layer=1, n_embd=BLOCK, n_ffn=128, n_vocab=len(blocks)), 3)
    made = plain.map(lambda name, tensor: Tensor.of(blocks) if name == "head.weight" else tensor)
    return replace(made, key=content_key(made))


def kept_tensors(backend: str, weights: Weights, scheme: str) -> dict[str, np.ndarray]:
    """The tensors of the package's own file for ``weights``, by its names."""
    torch = pytest.importorskip("torch", reason="reads the package's file; pip install torch")
    with opened(backend, weights, scheme) as there:
        made = f"{backend}-{there.version}-{scheme}"
    folder = derived(weights, made, lambda path: pytest.fail(f"{made} was not written"))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def adversarial_blocks(n: int) -> np.ndarray:
    """Float32 ``(n, 64)``: random blocks from 1e-36 to 1e36, halves between codes, float16 values, zeros."""
    random = np.random.default_rng(5)
    chosen = [np.zeros(BLOCK), np.full(BLOCK, 1.0), np.full(BLOCK, -3.0)]
    for top in (7, 8, -8, 15, 16, -16, 127, -127):
        ties = (np.arange(BLOCK) - 32) / 2 % 8 - 4
        ties[:3] = top, np.nextafter(np.float32(0.5), np.float32(0)), np.nextafter(np.float32(0.5), np.float32(1))
        chosen += [ties, ties * 0.125]
    chosen += [random.integers(-8, 9, BLOCK) * 0.125 for _ in range(16)]
    chosen += [random.standard_t(2, BLOCK).astype(np.float16) for _ in range(16)]
    rest = max(0, n - len(chosen))
    scales = 10.0 ** np.linspace(-36, 36, rest)
    chosen += [random.standard_normal(BLOCK) * scale for scale in scales]
    return np.stack(chosen)[:n].astype(np.float32)


def test_rows_that_blocks_do_not_divide_are_refused(backend: str) -> None:
    weights = synthetic(Config(n_layer=1, n_embd=96, n_ffn=384, n_vocab=50), 4)
    told = "blocks of 64 weights, which do not divide rows of 96 and 384; it takes this model as fp32 or bf16"
    with pytest.raises(Unsupported, match=told), opened(backend, weights, "sym_int4"):
        pass
    with opened(backend, weights, "fp32") as there:
        assert gate(there.session, derive(weights, "fp32", there.arithmetic, TOKENS)).passed


@pytest.mark.parametrize("name", BACKENDS)
def test_without_its_package_it_is_unavailable(name: str) -> None:
    if BACKENDS[name].version():
        pytest.skip(f"{name} is installed beside this project")
    with pytest.raises(Unavailable, match=f"{name} is not installed; run: rwkv-bench setup {name}"):
        BACKENDS[name].check()
