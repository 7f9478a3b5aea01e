"""The reference against two implementations it shares no line with, on the same small weights.

Both are float32 programs, so each must be as close to the reference in float64 as float32 arithmetic
lets it be: the bound that every backend has. The gate covers step by step, whole prompts, chunks,
every position at once, and the state, read and taken over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backends.api import Session, StateAccess, Unavailable
from harness.compare import logits_error, state_error
from harness.parity import gate
from harness.tolerance import derive
from reference.config import Config
from reference.forward import LN_EPS, forward, initial_state
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights
from suites.oracles import open_oracle, open_rescaling

torch = pytest.importorskip("torch", reason="the oracles run on torch: pip install 'rwkv-bench[test]'")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # how ``rwkv`` is written

SHAPES = {
    "plain": Config(n_layer=3, n_embd=64, n_ffn=256, n_vocab=300),
    "odd": Config(n_layer=2, n_embd=50, n_ffn=111, n_vocab=77),
    "deep": Config(n_layer=13, n_embd=32, n_ffn=128, n_vocab=101),
}
TOKENS = 32


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the packages read is written for one test; they leave one thread behind, as small products want it."""
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(shape: str, seed: int, scale: float = 1.0) -> tuple[Weights, list[int]]:
    config = SHAPES[shape]
    weights = apply(synthetic(config, seed, scale), "fp32").in_memory()
    return weights, [int(t) for t in np.random.default_rng(seed).integers(0, config.n_vocab, TOKENS)]


def oracle_or_skip(name: str, weights: Weights) -> Session:
    try:
        return open_oracle(name, weights)
    except Unavailable as error:
        pytest.skip(f"oracle {name}: {error}")


@pytest.mark.parametrize("oracle", ["rwkv", "transformers"])
@pytest.mark.parametrize(
    ("shape", "seed", "scale"), [("plain", 0, 1.0), ("odd", 1, 1.0), ("odd", 2, 4.0), ("deep", 3, 1.0)]
)
def test_agrees_with_the_reference(oracle: str, shape: str, seed: int, scale: float) -> None:
    weights, tokens = case(shape, seed, scale)
    found = gate(oracle_or_skip(oracle, weights), derive(weights, "fp32", Arithmetic(), tokens))
    assert found.state
    assert found.passed, str(found.first_bad)


@pytest.mark.parametrize("oracle", ["rwkv", "transformers"])
def test_agrees_with_the_reference_in_float32(oracle: str) -> None:
    """What people run is the float32 reference: a step of it and a step of the oracle, side by side."""
    weights, tokens = case("plain", 4)
    session = oracle_or_skip(oracle, weights)
    ours, theirs = initial_state(weights.config), None
    for token in tokens:
        want, ours = forward(weights, [token], ours)
        got, theirs = session.forward([token], theirs)
        # Seen: 2e-6 for the largest of 300 logits; two float32 programs differ by a few roundings of 6e-8.
        assert logits_error(got[None], want[None]).peak < 1e-5
    assert isinstance(session, StateAccess)
    assert state_error(session.export_state(theirs), ours).worst < 1e-5


def test_the_oracle_sees_a_wrong_reference() -> None:
    """A bonus that is off by one part in a thousand is caught: the agreement above is not vacuous."""
    weights, tokens = case("plain", 5)
    name = "blocks.1.att.time_first"
    arrays = {n: t.array() * np.float32(1.001 if n == name else 1) for n, t in weights.items()}
    wrong = Weights.of(weights.config, arrays)
    assert not gate(oracle_or_skip("rwkv", weights), derive(wrong, "fp32", Arithmetic(), tokens)).passed


def test_rescaling_is_the_same_function(tmp_path: Path) -> None:
    """``rescale_every=6``: x is halved after layers 6 and 12, which LayerNorm undoes but for its epsilon.

    LN(x / s) with epsilon e is LN(x) with epsilon s²e: a change of (s² - 1) e / (2 var x), taken here at
    the smallest variance of any token, summed over the norms that see a smaller x.
    """
    pytest.importorskip("transformers", reason="oracle not installed: pip install 'transformers<5'")
    every = 6
    weights, tokens = case("deep", 6)
    change = 0.0

    def tap(name: str, x: np.ndarray) -> None:
        nonlocal change
        if name.endswith(".residual"):  # each feeds one norm, the next
            layer, after_ffn = int(name.split(".")[1]), ".ffn." in name
            halvings = (layer + after_ffn) // every
            change += (4.0**halvings - 1) * LN_EPS / (2 * float(x.var(axis=-1).min()))

    want, state = forward(weights, tokens, tap=tap)
    session = open_rescaling(weights, every, tmp_path / "hf")
    got, theirs = session.forward(tokens, None)
    assert 0 < logits_error(got[None], want[None]).rms <= change < 1e-3
    assert state_error(session.export_state(theirs), state).worst <= change
