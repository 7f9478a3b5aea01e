"""The transformers backend in this process: what the gate of every backend does not ask of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import transformers_rwkv as backend
from backends.api import Traceable, Unavailable, Unsupported
from backends.shared.hf_session import hf_folder
from harness import open_session
from harness.parity import gate
from harness.tolerance import derive
from harness.trace_point import first_bad_point
from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.config import Config
from reference.forward import forward
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights

torch = pytest.importorskip("torch", reason="not installed: pip install torch")
pytest.importorskip("transformers", reason="not installed: pip install 'transformers<5'")

SMALL = Config(n_layer=3, n_embd=64, n_ffn=256, n_vocab=300)
SHAPES = {
    "one layer": Config(n_layer=1, n_embd=32, n_ffn=128, n_vocab=54),
    "odd": Config(n_layer=2, n_embd=50, n_ffn=111, n_vocab=77),
    "deep": Config(n_layer=13, n_embd=32, n_ffn=128, n_vocab=101),
}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 50, 40)]

#: What no module of the model takes or gives.
UNSEEN = ("att.r", "att.wkv", "ffn.r")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", backend.INFO.schemes)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: str, scheme: str) -> None:
    weights = synthetic(SHAPES[shape], 1, 1.5)
    with open_session("transformers", weights, scheme, threads=1, isolate=False) as opened:
        found = gate(opened.session, derive(weights, scheme, opened.arithmetic, TOKENS))
        assert found.state
        assert found.passed, str(found.first_bad)
        assert not found.loose


@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_trace_points_are_the_reference_s(scheme: str) -> None:
    """Every point it shows is right, none is missing but those that are inside a module."""
    weights = apply(synthetic(SMALL, 2), scheme)
    wanted: list[str] = []
    seen: dict[str, tuple[int, ...]] = {}
    forward(weights, TOKENS, tap=lambda name, x: wanted.append(name))
    with open_session("transformers", weights, scheme, threads=1, isolate=False) as opened:
        session = opened.session
        assert isinstance(session, Traceable)
        assert first_bad_point(session, weights, opened.arithmetic, TOKENS) is None
        logits, state = session.trace(TOKENS, None, lambda name, x: seen.__setitem__(name, x.shape))
        plain, same = session.forward(TOKENS, None)
    assert set(seen) == {name for name in wanted if not name.endswith(UNSEEN)}
    assert all(shape[0] == len(TOKENS) for shape in seen.values())
    assert np.array_equal(logits, plain)
    assert all(torch.equal(a, b) for a, b in zip(state, same, strict=True))


def test_a_trace_leaves_no_hooks() -> None:
    with open_session("transformers", synthetic(SMALL, 2), "fp32", threads=1, isolate=False) as opened:
        calls = itertools.count()
        session: Any = opened.session
        with pytest.raises(ZeroDivisionError):
            session.trace(TOKENS, None, lambda name, x: next(calls) / 0)
        taken = next(calls)
        session.forward(TOKENS, None)
        assert next(calls) == taken + 1


def test_rescaling_is_off_whatever_the_checkpoint_asks_for(tmp_path: Path) -> None:
    """A folder that asks for halvings gives what the same weights give without; the folder stays as it is."""
    weights = synthetic(SHAPES["deep"], 3)
    asks = replace(weights, config=replace(weights.config, rescale_every=2))
    save_checkpoint(asks, tmp_path / "asks", "hf", "fp32")
    logits = []
    for source in (weights, load_checkpoint(tmp_path / "asks")):
        with open_session("transformers", source, "fp32", threads=1, isolate=False) as opened:
            logits.append(opened.session.forward(TOKENS, None)[0])
    assert np.array_equal(logits[0], logits[1])
    assert load_checkpoint(tmp_path / "asks").config.rescale_every == 2


def loaded(weights: Weights) -> Any:
    from transformers import RwkvForCausalLM

    return RwkvForCausalLM.from_pretrained(str(hf_folder(weights, "fp32"))).eval()


def test_batched_decode_is_wrong_upstream() -> None:
    """Two sequences in one batch: the prompt is right, one token from its state is not.

    Their last inputs ``(2, C)`` are broadcast against ``(2, 1, C)`` into a prompt of two tokens, each
    sequence seeing the other's. When this fails, transformers has been mended: then say so in the
    docstrings of backends/transformers_rwkv.py and backends/shared/hf_session.py, and allow batches there.
    """
    model = loaded(synthetic(SMALL, 4))
    prompts = torch.tensor([TOKENS[:8], TOKENS[8:16]])
    with torch.inference_mode():
        both = model(prompts, use_cache=True)
        alone = [model(prompt[None], use_cache=True) for prompt in prompts]
        for i in range(2):
            torch.testing.assert_close(both.logits[i], alone[i].logits[0])
        step = torch.tensor([[1], [2]])
        wrong = model(step, state=both.state, use_cache=True).logits
        right = [model(step[i : i + 1], state=alone[i].state, use_cache=True).logits for i in range(2)]
    assert [tuple(logits.shape) for logits in right] == [(1, 1, SMALL.n_vocab)] * 2
    assert tuple(wrong.shape) == (2, 2, SMALL.n_vocab)
    for i in range(2):
        off = (wrong[i, -1] - right[i][0, 0]).abs().max() / right[i].std()
        assert off > 0.1


def test_the_model_writes_to_the_state_it_is_given() -> None:
    """Why a session copies it. When this fails, the copies in backends/shared/hf_session.py can go."""
    model = loaded(synthetic(SMALL, 5))
    with torch.inference_mode():
        given = model(torch.tensor([TOKENS]), use_cache=True).state
        before = [row.clone() for row in given]
        model(torch.tensor([[7]]), state=given, use_cache=True)
    assert not any(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_a_transformers_without_rwkv_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found(name: str) -> ModuleSpec:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        return spec

    monkeypatch.setattr(backend, "find_spec", found)
    with pytest.raises(Unavailable, match=r"has no RWKV-4 any more; pip install torch 'transformers>=4.40,<5'"):
        backend.check()


def test_what_it_does_not_do_is_refused() -> None:
    weights = synthetic(SMALL, 6)
    with pytest.raises(Unsupported, match="no scheme 'q4f16_1'; it has fp32, fp16, bf16"):
        backend.load(weights, "q4f16_1", "cpu", 1)
    with pytest.raises(Unsupported, match="at least one CPU thread; 0 were asked for"):
        backend.load(weights, "fp32", "cpu", 0)
    with pytest.raises(Unsupported, match="no device 'mps'"):
        backend.load(weights, "fp32", "mps", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="CUDA"):
        backend.load(synthetic(SMALL, 6), "fp32", "cuda", 1)
