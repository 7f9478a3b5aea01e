"""The Triton backend as a whole, in Triton's interpreter: every scheme against truth, and what only it promises.

Run by ``TRITON_INTERPRET=1 pytest``; CI does, as a step of its own, and judges the whole embedded model there with
``rwkv-bench parity``. Here the embedded model has two layers, since a token of it takes the interpreter a second.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from backends import triton_cuda
from backends.api import Closing, Generating, Scoring, StateAccess, Traceable, Unavailable, Unsupported
from backends.triton_cuda import machine
from harness.compare import logits_error, state_error
from harness.models import open_model
from harness.tolerance import K, Truth, derive
from reference.config import with_layers
from reference.forward import forward, initial_state
from reference.schemes import apply
from reference.weights import Tensor, Weights

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
pytest.importorskip("triton", reason="triton is not installed: pip install 'rwkv-bench[triton]'")
if not machine.interpreted():
    pytest.skip("kernels run on the CPU in Triton's interpreter only: TRITON_INTERPRET=1", allow_module_level=True)

SCHEMES = tuple(triton_cuda.INFO.schemes)
TOKENS = tuple(b"Every list, once; nothing twice.")


@cache
def weights() -> Weights:
    """The first two layers of the embedded model."""
    whole = open_model("tiny").weights
    kept = {n: t for n, t in whole.items() if not n.startswith("blocks.") or int(n.split(".")[1]) < 2}
    return Weights(with_layers(whole.config, 2), kept)


@cache
def truth(scheme: str) -> Truth:
    return derive(weights(), scheme, triton_cuda.INFO.schemes[scheme], TOKENS)


@cache
def load(scheme: str) -> Any:
    session = triton_cuda.load(weights(), scheme, "cpu", None)
    assert all(isinstance(session, kind) for kind in (Scoring, Traceable, StateAccess, Generating, Closing))
    return session


def within(found: Truth, logits: np.ndarray, positions: slice) -> bool:
    """Whether every statistic of the logits is."""
    error = logits_error(logits, found.logits[positions], found.unit)
    return all(off <= bound for off, bound in found.logits_ratios(error).values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompt_step_and_state_are_within_the_bound(scheme: str) -> None:
    """All positions in one call; then half of them, and three steps on: the state between is right as well."""
    session, found = load(scheme), truth(scheme)
    assert within(found, session.logits(TOKENS, None), slice(None))
    half = len(TOKENS) // 2
    last, state = session.forward(TOKENS[:half], None)
    steps = [last]
    for token in TOKENS[half : half + 3]:
        last, state = session.forward([token], state)
        steps.append(last)
    assert within(found, np.stack(steps), slice(half - 1, half + 3))
    _, end = session.forward(TOKENS[half + 3 :], state)
    error = state_error(session.export_state(end), found.state)
    assert error.rms <= K * found.e_state_rms
    assert error.worst <= K * found.e_state_worst


def test_a_wrong_kernel_fails_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: squared ReLU forgets to square, and the same check sees it."""
    from backends.triton_cuda import model

    class Wrong:
        def __getitem__(self, grid: Any) -> Any:
            return lambda k, out, *rest, **named: out.copy_(k.relu())

    monkeypatch.setattr(model, "square", Wrong())
    assert not within(truth("fp16"), load("fp16").logits(TOKENS, None), slice(None))


@pytest.mark.parametrize("scheme", ["fp16", "q4f16_1"])
def test_traced_logits_are_those_of_a_captured_step_within_the_bound(scheme: str) -> None:
    session, found = load(scheme), truth(scheme)
    _, past = session.forward(TOKENS[:-1], None)
    points: list[str] = []
    traced, state = session.trace(TOKENS[-1:], past, lambda name, value: points.append(name))
    plain, after = session.forward(TOKENS[-1:], past)
    error = logits_error(traced[None], plain[None].astype(np.float64), found.unit)
    assert error.rms <= K * found.e_rms
    assert state_error(session.export_state(state), session.export_state(after).astype(np.float64)).worst <= (
        K * found.e_state_worst
    )
    want: list[str] = []
    forward(apply(weights(), scheme), TOKENS[-1:], tap=lambda name, value: want.append(name))
    assert points == want


def test_every_trace_point_is_the_reference_s() -> None:
    got: dict[str, np.ndarray] = {}
    want: dict[str, np.ndarray] = {}
    logits, _ = load("fp32").trace(TOKENS[:7], None, got.__setitem__)
    forward(apply(weights(), "fp32"), TOKENS[:7], tap=want.__setitem__)
    for name, value in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(logits, got["logits"][-1])
    np.testing.assert_array_equal(logits, load("fp32").forward(TOKENS[:7], None)[0])


def test_greedy_is_the_plain_loop_for_one_sequence_and_for_several() -> None:
    session = load("fp32")
    states = [session.forward(TOKENS[:n], None)[1] for n in (3, 5)]
    before = [session.export_state(state) for state in states]
    both, ends = session.greedy_batch([TOKENS[3], TOKENS[5]], states, 4)
    for i, n in enumerate((3, 5)):
        token, state, chosen = TOKENS[n], states[i], []
        for _ in range(4):
            logits, state = session.forward([token], state)
            token = int(logits.argmax())
            chosen.append(token)
        alone, end = session.greedy(TOKENS[n], states[i], 4)
        assert alone.tolist() == both[i].tolist() == chosen
        assert state_error(session.export_state(end), session.export_state(state).astype(np.float64)).worst < 1e-5
        assert state_error(session.export_state(ends[i]), session.export_state(state).astype(np.float64)).worst < 1e-5
        np.testing.assert_array_equal(session.export_state(states[i]), before[i])


@pytest.mark.parametrize("scheme", ["fp32", "q4f16_1"])
def test_a_batch_is_its_sequences_one_by_one(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, in one piece and in several of which the last is one token, then a step; past states are left alone."""
    from backends.triton_cuda import session as module

    session, unit = load(scheme), truth(scheme).unit
    prompts = [list(TOKENS[first : first + 5]) for first in (0, 7, 11)]
    alone = [session.forward(prompt, None) for prompt in prompts]
    steps = [session.forward([prompt[0]], state)[0] for prompt, (_, state) in zip(prompts, alone, strict=True)]

    def same(got: np.ndarray, want: np.ndarray) -> bool:
        """But for float32 sums; packed, products of several rows round otherwise."""
        error = logits_error(got[None], want[None].astype(np.float64), unit)
        ratios = truth(scheme).logits_ratios(error).values()
        return error.rms < 1e-5 if scheme == "fp32" else all(off <= bound for off, bound in ratios)

    for piece in (2048, 6):
        monkeypatch.setattr(module, "PIECE", piece)
        logits, states = session.forward_batch(prompts, None)
        assert logits.shape == (3, weights().config.n_vocab)
        before = session.export_state(states)
        again, _ = session.forward_batch([prompt[:1] for prompt in prompts], states)
        np.testing.assert_array_equal(session.export_state(states), before)
        for i, (one, state) in enumerate(alone):
            assert same(logits[i], one)
            assert same(again[i], steps[i])
            if scheme == "fp32":
                assert state_error(before[i], session.export_state(state).astype(np.float64)).worst < 1e-5


def test_a_packed_head_is_not_dequantized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor counted by the prediction of memory: it is the largest matrix. Logits are those of one product."""
    from backends.triton_cuda import matrix, model

    session = load("q4f16_1")
    whole = session.logits(TOKENS, None)
    usual, seen = matrix.unpacked, []

    def unpacked(packed: Any, dtype: Any) -> Any:
        seen.append(packed.results)
        return usual(packed, dtype)

    monkeypatch.setattr(matrix, "unpacked", unpacked)
    for module in (matrix, model):
        monkeypatch.setattr(module, "FUSED_ROWS", 4)
    found = session.logits(TOKENS, None)
    assert seen
    assert session._model._stored.head.results not in seen
    assert logits_error(found, whole.astype(np.float64), truth("q4f16_1").unit).rms < 2.0**-8


def test_a_length_that_comes_again_runs_on_buffers_of_its_own_and_is_the_same() -> None:
    """The second prompt of a length is captured, the third replayed; of more than are kept one unused longest goes."""
    session = load("fp32")
    for length in (6, 7, 8, 6):
        first, state = session.forward(TOKENS[:length], None)
        for _ in range(2):
            again, after = session.forward(TOKENS[:length], None)
            np.testing.assert_array_equal(again, first)
            np.testing.assert_array_equal(session.export_state(after), session.export_state(state))
    other, _ = session.forward(TOKENS[6:12], state)
    np.testing.assert_array_equal(session.export_state(after), session.export_state(state))
    want, _ = forward(apply(weights(), "fp32"), TOKENS[:12])
    assert logits_error(other[None], want[None].astype(np.float64), truth("fp32").unit).rms < 1e-5
    assert list(session._prompts._graphs) == [8, 6]
    session.forward(TOKENS[:8], None)
    session.forward(TOKENS[:7], None)
    assert list(session._prompts._graphs) == [8, 7], "used last, not captured last, is kept"


def test_a_prompt_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.triton_cuda import session as module

    whole, state = load("fp32").forward(TOKENS, None)
    scored = load("fp32").logits(TOKENS, None)
    monkeypatch.setattr(module, "PIECE", 5)
    monkeypatch.setattr(module, "SCORED_ROWS", 3)
    pieces, after = load("fp32").forward(TOKENS, None)
    unit = truth("fp32").unit
    assert logits_error(pieces[None], whole[None].astype(np.float64), unit).rms < 1e-5
    assert (
        state_error(load("fp32").export_state(after), load("fp32").export_state(state).astype(np.float64)).worst < 1e-5
    )
    assert logits_error(load("fp32").logits(TOKENS, None), scored.astype(np.float64), unit).rms < 1e-5


def test_a_state_of_another_shape_is_refused_and_the_initial_one_is_the_reference_s() -> None:
    session = load("fp32")
    with pytest.raises(ValueError, match="this model's is"):
        session.import_state(np.zeros((1, 5, 128), np.float32))
    start = session.import_state(initial_state(weights().config))
    np.testing.assert_array_equal(session.forward([3, 4], start)[0], session.forward([3, 4], None)[0])


def test_a_trace_shows_what_was_made_not_its_rounded_copy() -> None:
    """The inputs of products are float32 numbers, and what is made of a traced value is made of that value."""
    got: dict[str, np.ndarray] = {}
    load("fp16").trace(TOKENS[:5], None, got.__setitem__)
    for point in ("blocks.0.att.xk", "blocks.0.att.rwkv", "blocks.1.ffn.xr", "blocks.1.ffn.k2", "ln_out"):
        assert np.any(got[point] != got[point].astype(np.float16)), point
    squared = np.square(np.maximum(got["blocks.1.ffn.k"], 0))
    np.testing.assert_allclose(got["blocks.1.ffn.k2"], squared, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(got["blocks.0.att.rwkv"], got["blocks.0.att.r"] * got["blocks.0.att.wkv"], rtol=1e-6)


#: Squares of channel mixing's keys, and r * wkv, leave float16 where these weights are so much larger.
OVERFLOWING = {
    "ffn.k2": {"blocks.0.ffn.key.weight": 2.0**8, "blocks.0.ffn.value.weight": 2.0**-6},
    "att.rwkv": {"blocks.0.att.value.weight": 2.0**16, "blocks.0.att.output.weight": 2.0**-10},
}


@pytest.mark.parametrize("point", OVERFLOWING)
def test_float16_overflows_where_everything_is_float16_and_nowhere_else(point: str) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        factor = OVERFLOWING[point].get(name)
        return tensor if factor is None else Tensor.of(tensor.array() * np.float32(factor))

    model = weights().map(change)
    seen: dict[str, np.ndarray] = {}
    forward(apply(model, "fp16"), TOKENS, tap=seen.__setitem__)
    assert np.abs(seen[f"blocks.0.{point}"]).max() > 65504
    want, _ = forward(apply(model, "fp16"), TOKENS, dtype=np.float64)
    safe = triton_cuda.load(model, "fp16", "cpu", None)
    for logits in (safe.forward(TOKENS, None)[0], safe.forward(TOKENS[-1:], safe.forward(TOKENS[:-1], None)[1])[0]):
        assert np.linalg.norm(logits - want) / np.linalg.norm(want) < 0.01
    pure = triton_cuda.load(model, "q0f16", "cpu", None)
    assert not np.isfinite(pure.forward(TOKENS, None)[0]).all()
    assert not np.isfinite(pure.forward(TOKENS[:1], None)[0]).all()


def test_a_rescaled_stream_does_not_overflow_and_is_shown_in_its_own_units() -> None:
    """Products of the last layer reach 120,000, which half of fits float16."""
    seen: dict[str, np.ndarray] = {}
    forward(apply(weights(), "q0f16"), TOKENS[:3], tap=seen.__setitem__)
    factor = np.float32(120_000 / np.abs(seen["blocks.1.ffn.v"]).max())
    name = "blocks.1.ffn.value.weight"
    large = weights().map(lambda n, tensor: Tensor.of(tensor.array() * factor) if n == name else tensor)
    want, _ = forward(apply(large, "q0f16"), TOKENS[:3], dtype=np.float64, tap=seen.__setitem__)
    plain = triton_cuda.load(large, "q0f16", "cpu", None)
    assert not np.isfinite(plain.forward(TOKENS[:3], None)[0]).all()
    halved: Any = triton_cuda.adjust(large, "q0f16", "cpu", None, {"rescale_every": 1})
    got: dict[str, np.ndarray] = {}
    traced, state = halved.trace(TOKENS[:2], None, got.__setitem__)
    step, _ = halved.forward(TOKENS[2:3], state)
    for logits in (halved.forward(TOKENS[:3], None)[0], step):
        assert np.linalg.norm(logits - want) / np.linalg.norm(want) < 0.01
    assert np.isfinite(traced).all()
    for point in ("blocks.1.ffn.v", "blocks.1.ffn.residual", "blocks.1.att.residual"):
        np.testing.assert_allclose(got[point], seen[point][:2], rtol=0.02, atol=0.02 * np.abs(seen[point]).max())


def test_what_cannot_be_changed_is_refused() -> None:
    with pytest.raises(Unsupported, match="cannot change fp32; it can change rescale_every"):
        triton_cuda.adjust(weights(), "q0f16", "cpu", None, {"fp32": ["*"]})
    with pytest.raises(Unsupported, match="rescales q0f16 only"):
        triton_cuda.adjust(weights(), "fp16", "cpu", None, {"rescale_every": 2})


def test_memory_that_runs_out_while_loading_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.triton_cuda import session as module

    def full(*told: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, "place", full)
    with pytest.raises(Unavailable, match="triton ran out of memory of cpu while loading: CUDA out of memory; try"):
        triton_cuda.load(weights(), "fp16", "cpu", None)


def test_closing_gives_everything_back() -> None:
    import gc
    import weakref

    session: Any = triton_cuda.load(weights(), "fp16", "cpu", None)
    session.forward(TOKENS[:1], None)
    held = weakref.ref(session._model)
    session.close()
    gc.collect()
    assert held() is None
