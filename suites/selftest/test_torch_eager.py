"""The torch backend beyond the contract: its trace, its two ways to multiply, what it leaves alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from backends import torch_eager
from backends.api import Closing, Generating, Scoring, StateAccess, Traceable, Unavailable, Unsupported
from harness.compare import logits_error, state_error
from harness.parity import gate
from harness.tolerance import K, derive
from reference.config import Config
from reference.errors import TokenError
from reference.forward import forward, initial_state
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")

CONFIG = Config(n_layer=3, n_embd=48, n_ffn=192, n_vocab=160)
#: Large enough for matrices to be packed, with sizes that no vector width divides.
PACKED = Config(n_layer=1, n_embd=515, n_ffn=1030, n_vocab=521)
SCHEMES = tuple(torch_eager.INFO.schemes)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(config: Config = CONFIG, scale: float = 1.0) -> Weights:
    return synthetic(config, 7, scale)


def prompt(n: int, config: Config = CONFIG) -> list[int]:
    return [int(t) for t in np.random.default_rng(n).integers(0, config.n_vocab, n)]


def load(scheme: str, config: Config = CONFIG, scale: float = 1.0) -> Any:
    session = torch_eager.load(weights(config, scale), scheme, "cpu", 1)
    assert all(isinstance(session, kind) for kind in (Scoring, Traceable, StateAccess, Generating, Closing))
    return session


@each_scheme
@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["small", "packed"])
def test_passes_the_gate(scheme: str, config: Config) -> None:
    model = weights(config)
    truth = derive(model, scheme, torch_eager.INFO.arithmetic(scheme, "cpu"), prompt(32, config))
    found = gate(load(scheme, config), truth)
    assert found.passed, str(found.first_bad)


@each_scheme
def test_is_as_exact_as_the_emulated_arithmetic(scheme: str) -> None:
    """Not only within the bound: the emulation predicts the size of the error, from both sides."""
    model, tokens = weights(), prompt(64)
    truth = derive(model, scheme, torch_eager.INFO.arithmetic(scheme, "cpu"), tokens)
    error = logits_error(load(scheme).logits(tokens, None), truth.logits).rms
    assert truth.e_rms / K < error < K * truth.e_rms


@each_scheme
@pytest.mark.parametrize("n", [1, 2, 19])
def test_a_traced_run_is_the_same_run(scheme: str, n: int) -> None:
    session = load(scheme)
    _, past = session.forward(prompt(5), None)
    plain, state = session.forward(prompt(n), past)
    traced, traced_state = session.trace(prompt(n), past, lambda name, x: None)
    np.testing.assert_array_equal(traced, plain)
    np.testing.assert_array_equal(session.export_state(traced_state), session.export_state(state))


def test_the_trace_has_the_reference_s_points_in_its_order() -> None:
    model, tokens = weights(), prompt(11)
    got: dict[str, np.ndarray] = {}
    want: dict[str, np.ndarray] = {}
    logits, _ = load("fp32").trace(tokens, None, got.__setitem__)
    forward(apply(model, "fp32"), tokens, tap=want.__setitem__)
    assert list(got) == list(want)
    for name, x in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(got["logits"][-1], logits)


@each_scheme
def test_chunks_agree(scheme: str) -> None:
    """However a prompt is cut, the result is one of the declared arithmetic."""
    tokens, session = prompt(40), load(scheme)
    truth = derive(weights(), scheme, torch_eager.INFO.arithmetic(scheme, "cpu"), tokens)
    for cuts in ([0, 40], [0, 1, 2, 40], [0, 39, 40], [0, 7, 16, 33, 40]):
        state = None
        for a, b in pairwise(cuts):
            logits, state = session.forward(tokens[a:b], state)
        assert logits_error(logits[None], truth.logits[-1:]).worst <= K * truth.e_worst
        assert state_error(session.export_state(state), truth.state).worst <= K * truth.e_state_worst


@each_scheme
def test_a_state_survives_the_canonical_array(scheme: str) -> None:
    session = load(scheme)
    _, state = session.forward(prompt(9), None)
    canonical = session.export_state(state)
    again = session.import_state(canonical)
    np.testing.assert_array_equal(session.export_state(again), canonical)
    np.testing.assert_array_equal(session.forward([3], again)[0], session.forward([3], state)[0])
    canonical[...] = 0  # the imported state has its own memory
    np.testing.assert_array_equal(session.forward([3], again)[0], session.forward([3], state)[0])


def test_the_initial_state_is_the_reference_s() -> None:
    session = load("fp32")
    start = session.import_state(initial_state(CONFIG))
    np.testing.assert_array_equal(session.forward(prompt(4), start)[0], session.forward(prompt(4), None)[0])


def test_a_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 5, 48\); this model's is \(3, 5, 48\)"):
        load("fp32").import_state(np.zeros((1, 5, 48), np.float32))


@pytest.mark.parametrize(
    "use",
    [
        lambda session, state: session.forward(prompt(6), state),
        lambda session, state: session.forward([1], state),
        lambda session, state: session.logits(prompt(6), state),
        lambda session, state: session.trace(prompt(6), state, lambda name, x: x.fill(9)),
        lambda session, state: session.greedy(1, state, 5),
    ],
    ids=["prefill", "step", "logits", "trace", "greedy"],
)
def test_a_state_is_never_changed(use: Callable[[Any, Any], Any]) -> None:
    session = load("fp32")
    _, state = session.forward(prompt(9), None)
    before = session.export_state(state)
    first = session.forward([1], None)[0]
    use(session, state)
    use(session, None)
    np.testing.assert_array_equal(session.export_state(state), before)
    np.testing.assert_array_equal(session.forward([1], None)[0], first)


def test_what_a_tap_does_to_its_array_stays_there() -> None:
    session = load("fp32")
    traced, _ = session.trace(prompt(6), None, lambda name, x: x.fill(np.nan) if name != "logits" else None)
    np.testing.assert_array_equal(traced, session.forward(prompt(6), None)[0])


@each_scheme
def test_greedy_is_the_loop(scheme: str) -> None:
    session = load(scheme)
    _, state = session.forward(prompt(9), None)
    ids, end = session.greedy(5, state, 12)
    token, past, chosen = 5, state, []
    for _ in range(12):
        logits, past = session.forward([token], past)
        token = int(np.argmax(logits))
        chosen.append(token)
    assert ids.dtype == np.int64
    assert ids.tolist() == chosen
    np.testing.assert_array_equal(session.export_state(end), session.export_state(past))


def test_scoring_ends_where_forward_does() -> None:
    session = load("fp32")
    np.testing.assert_allclose(session.logits(prompt(9), None)[-1], session.forward(prompt(9), None)[0], atol=1e-5)


def test_fp16_overflows_where_half_precision_does() -> None:
    """No hidden rescue: squared ReLU past 65504 is Inf, in the very channels where fp32 passes it."""
    exact: dict[str, np.ndarray] = {}
    half: dict[str, np.ndarray] = {}
    load("fp32", scale=100.0).trace(prompt(8), None, exact.__setitem__)
    load("fp16", scale=100.0).trace(prompt(8), None, half.__setitem__)
    first_bad = next(name for name, x in half.items() if not np.isfinite(x).all())
    assert first_bad == "blocks.0.ffn.k2"
    clear = np.abs(exact[first_bad] - 65520) > 0.02 * 65520  # far enough from the edge for rounding not to decide
    np.testing.assert_array_equal(np.isinf(half[first_bad])[clear], (exact[first_bad] > 65520)[clear])
    assert all(np.isfinite(x).all() for x in exact.values())


@pytest.mark.parametrize("rows", [1, 2, 3, 33])
def test_every_product_is_rounded_once_from_a_float32_sum(rows: int) -> None:
    """The fp16 paths chosen by size (GEMV, GEMM, upcast) are one arithmetic: half an ulp of the exact product."""
    from backends.torch_eager.linear import make_linear

    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(700, 515, generator=generator).half()
    x = torch.randn(rows, 515, generator=generator).half()
    exact = x.double() @ weight.double().T
    error = (make_linear(weight)(x).double() - exact).abs()
    half_an_ulp = 2.0**-11 * exact.abs() + 2.0**-25
    sums = 515 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert bool((error <= half_an_ulp + sums).all())


@pytest.mark.parametrize("tokens", [[], [-1], [CONFIG.n_vocab]])
def test_bad_tokens_are_refused(tokens: list[int]) -> None:
    session = load("fp32")
    for use in (session.forward, session.logits):
        with pytest.raises(TokenError):
            use(tokens, None)


def test_threads_are_set_again_after_somebody_else_changed_them() -> None:
    session = torch_eager.load(weights(), "fp32", "cpu", 1)
    torch.set_num_threads(2)
    session.forward([1], None)
    assert torch.get_num_threads() == 1


def test_reduced_precision_of_another_library_is_undone() -> None:
    session = load("fp32")
    torch.set_float32_matmul_precision("medium")
    session.forward([1], None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_such_thread_count() -> None:
    with pytest.raises(Unsupported, match="at least one CPU thread"):
        torch_eager.load(weights(), "fp32", "cpu", 0)


@pytest.mark.parametrize("device", ["tpu", "cpu:1", "mps:0", "cuda:", "cuda:x", "cuda:-1", ""])
def test_no_such_device(device: str) -> None:
    with pytest.raises(Unsupported, match="no device"):
        torch_eager.load(weights(), "fp32", device, None)


def test_no_such_scheme() -> None:
    with pytest.raises(Unsupported, match="fp32, fp16, bf16"):
        torch_eager.load(weights(), "Q4_0", "cpu", None)


@pytest.mark.parametrize(
    ("cuda_build", "visible", "device", "reason"),
    [
        (None, 0, "cuda", "build without CUDA"),
        ("13.0", 0, "cuda", "sees no CUDA device"),
        ("13.0", 1, "cuda:1", "no cuda:1"),
        (None, 0, "mps", "no MPS device"),
    ],
)
def test_a_missing_device_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, cuda_build: str | None, visible: int, device: str, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(Unavailable, match=reason) as caught:
        torch_eager.load(weights(), "fp32", device, None)
    assert caught.value.how_to_get_it


def test_without_torch_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_eager, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="torch is not installed; pip install"):
        torch_eager.check()
    with pytest.raises(Unavailable):
        torch_eager.load(weights(), "fp32", "cpu", None)


def test_version_is_torch_s() -> None:
    assert torch.__version__.startswith(torch_eager.version().partition("+")[0])


def test_a_closed_session_gives_its_weights_back() -> None:
    session = load("fp32")
    model = weakref.ref(session._model)
    session.close()
    assert model() is None
