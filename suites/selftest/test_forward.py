"""The reference against the paper's formulas, and against itself however a prompt is run."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.config import Config, tensor_shapes
from reference.errors import TokenError
from reference.forward import PP, WkvState, forward, initial_state, wkv
from reference.numerics import Arithmetic, Exact
from reference.synthetic import synthetic
from reference.weights import Weights

CONFIG = Config(n_layer=3, n_embd=32, n_ffn=128, n_vocab=50)
WEIGHTS = synthetic(CONFIG, 1).in_memory()
TOKENS = np.random.default_rng(1).integers(0, CONFIG.n_vocab, 40)

TRACE = [
    "emb",
    "blocks.0.ln0",
    *(
        f"blocks.{i}.{point}"
        for i in range(CONFIG.n_layer)
        for point in (
            *("ln1", "att.xk", "att.xv", "att.xr", "att.k", "att.v", "att.r", "att.wkv", "att.rwkv", "att.out"),
            *("att.residual", "ln2", "ffn.xk", "ffn.xr", "ffn.k", "ffn.k2", "ffn.v", "ffn.r", "ffn.out"),
            "ffn.residual",
        )
    ),
    "ln_out",
    "logits",
]


def wkv_by_definition(k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The paper's definition of WKV as it stands: two explicit sums per token, each weight as its own power of e."""
    out = np.empty_like(v)
    for t in range(len(k)):
        past = np.arange(t)[:, None]
        exponents = np.concatenate([-(t - 1 - past) * w + k[:t], (u + k[t])[None]])
        weights = np.exp(exponents - exponents.max(axis=0))
        out[t] = (weights * v[: t + 1]).sum(axis=0) / weights.sum(axis=0)
    return out


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), size=st.sampled_from([0.1, 3.0, 40.0, 800.0]))
def test_wkv_is_the_papers_sum(seed: int, n: int, size: float) -> None:
    """Also with keys whose exponentials overflow float64 when taken alone."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, n, 5)) * [[[size]], [[1.0]]]
    w, u = np.exp(rng.uniform(-8, 3, 5)), rng.standard_normal(5)
    start = WkvState(*np.split(np.array([0.0] * 10 + [-1e30] * 5), 3))
    got, _ = wkv(k, v, w, u, start, Exact(np.float64))
    # The exponents are sums of terms as large as n*w and k: their rounding is what may differ.
    bound = 2.0**-52 * (n * w.max() + np.abs(k).max() + 10) * 8
    assert np.abs(got - wkv_by_definition(k, v, w, u)).max() <= bound * max(1.0, np.abs(v).max())


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, len(TOKENS) - 1), max_size=6))
def test_any_chunking_gives_the_same(cuts: list[int]) -> None:
    whole, end = forward(WEIGHTS, TOKENS, all_logits=True, dtype=np.float64)
    edges = sorted({0, len(TOKENS), *cuts})
    parts, state = [], None
    for a, b in pairwise(edges):
        logits, state = forward(WEIGHTS, TOKENS[a:b], state, all_logits=True, dtype=np.float64)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-12 * np.abs(whole).max())
    assert state is not None
    np.testing.assert_allclose(state, end, rtol=1e-11, atol=1e-12)


def test_trace_points_have_the_documented_names_and_order() -> None:
    seen: list[str] = []
    widths: dict[str, tuple[int, ...]] = {}

    def tap(name: str, array: np.ndarray) -> None:
        seen.append(name)
        widths[name] = array.shape

    traced, _ = forward(WEIGHTS, TOKENS, tap=tap)
    plain, _ = forward(WEIGHTS, TOKENS)
    assert seen == TRACE
    assert all(shape[0] == len(TOKENS) for shape in widths.values())
    assert widths["blocks.1.ffn.k2"][1] == CONFIG.n_ffn
    assert widths["logits"][1] == CONFIG.n_vocab
    np.testing.assert_allclose(traced, plain, rtol=1e-5, atol=1e-5)


def test_the_state_given_is_not_changed() -> None:
    _, state = forward(WEIGHTS, TOKENS[:5])
    before = state.copy()
    forward(WEIGHTS, TOKENS[5:], state)
    np.testing.assert_array_equal(state, before)


def test_the_initial_exponent_keeps_very_negative_keys() -> None:
    """The first output is v itself, whatever its key; with pp = 0 a key of -200 would give 0 / 0."""
    start = initial_state(CONFIG)
    assert (start[:, PP] == np.float32(-1e30)).all()
    k, v, w, u = (np.full((1, 4), x, np.float32) for x in (-200, 7, 0.1, 0))
    zeros, low = np.zeros(4, np.float32), np.full(4, -1e30, np.float32)
    np.testing.assert_array_equal(wkv(k, v, w[0], u[0], WkvState(zeros, zeros, low), Exact())[0], v)
    with np.errstate(invalid="ignore"):
        assert np.isnan(wkv(k, v, w[0], u[0], WkvState(zeros, zeros, zeros), Exact())[0]).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([3, 50], "token 50 at position 1 is outside the vocabulary of 50"),
        ([-1], "token -1 at position 0"),
        ([3, 2**70], "token 1180591620717411303424 at position 1 is outside"),
        ([-1, 2**63], "token -1 at position 0"),
        ([3, 2**63], "token 9223372036854775808 at position 1 is outside"),
        ([True, 2**63], "token 9223372036854775808 at position 1 is outside"),
        ([-(2**70)], "token -1180591620717411303424 at position 0"),
        ([1.5], "must be integers"),
        ([[1]], "no tokens"),
    ],
)
def test_bad_tokens(tokens: list, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        forward(WEIGHTS, tokens)


def test_storage_does_not_change_the_result() -> None:
    """Weights kept as fp16 and upcast at use give bit for bit what upcast weights give."""
    stored = synthetic(CONFIG, 1)
    np.testing.assert_array_equal(forward(stored, TOKENS)[0], forward(WEIGHTS, TOKENS)[0])


def test_fp16_overflows_where_fp32_does_not() -> None:
    """The story this project exists for: a squared ReLU beyond 65504 becomes Inf and then NaN."""
    name = "blocks.1.ffn.key.weight"
    arrays = {n: t.array() * (300 if n == name else 1) for n, t in WEIGHTS.items()}
    loud = Weights.of(CONFIG, arrays)
    fp16 = Arithmetic("fp16", "fp32", "fp16", "fp32")
    assert np.isfinite(forward(loud, TOKENS)[0]).all()
    points: dict[str, bool] = {}
    forward(loud, TOKENS, arithmetic=fp16, tap=lambda n, x: points.__setitem__(n, bool(np.isfinite(x).all())))
    assert next(n for n, finite in points.items() if not finite) == "blocks.1.ffn.k2"
    assert not points["logits"]


def test_every_weight_matters() -> None:
    """No tensor is read and then dropped: changing any one changes the logits."""
    base, _ = forward(WEIGHTS, TOKENS, dtype=np.float64)
    for name in tensor_shapes(CONFIG):
        arrays = {n: t.array() for n, t in WEIGHTS.items()}
        arrays[name] = arrays[name] + np.float32(0.05) * np.cos(np.arange(arrays[name].size)).reshape(
            arrays[name].shape
        )
        changed, _ = forward(Weights.of(CONFIG, arrays), TOKENS, dtype=np.float64)
        assert np.abs(changed - base).max() > 1e-6, name
