"""The faster-rwkv adapter over a stand-in module, and what it says where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import faster_rwkv as backend
from backends.api import Closing, Session, StateAccess, Unavailable, Unsupported
from harness.compare import logits_error, state_error
from harness.parity import gate
from harness.tolerance import derive
from reference.config import Config
from reference.forward import forward
from reference.schemes import SCHEMES
from reference.synthetic import synthetic
from reference.weights import Weights

STAND_IN = Path(__file__).parent / "faster_rwkv_stand_in"
WEIGHTS: Weights = synthetic(Config(n_layer=7, n_embd=64, n_ffn=256, n_vocab=90), 3)  # 7: one halving of the residual
TOKENS = [int(i) for i in np.random.default_rng(2).integers(0, 90, 34)]

EXPORT = """#!{python}
import shutil, sys
source, prefix, dtype = sys.argv[1:]
assert dtype == "fp16"
shutil.copyfile(source, prefix + ".bin")
for end in ("param", "config"):
    open(f"{{prefix}}.{{end}}", "w").close()
"""


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path / "cache"))
    for variable in (backend.VARIABLE, "FR_THREADS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, importable as ``fasterrwkv``."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    import fasterrwkv

    fasterrwkv.MADE.clear()
    yield fasterrwkv
    del sys.modules["fasterrwkv"]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder with ``chat`` and an ``export_ncnn`` that copies."""
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "chat").touch()
    (folder / "export_ncnn").write_text(EXPORT.format(python=sys.executable))
    (folder / "export_ncnn").chmod(0o755)
    monkeypatch.setenv(backend.VARIABLE, str(folder / "chat"))
    return folder


def model(session: Session) -> Any:
    assert isinstance(session, backend.FasterRwkvSession)
    return session._model


@pytest.mark.usefixtures("module")
def test_cuda_passes_its_gate_and_shows_no_state() -> None:
    session = backend.load(WEIGHTS, "fp16", "cuda", None)
    assert isinstance(session, Closing)
    assert not isinstance(session, StateAccess)
    found = gate(session, derive(WEIGHTS, "fp16", backend.INFO.arithmetic("fp16", "cuda"), TOKENS))
    assert found.passed, found.first_bad


def test_an_old_state_is_reached_by_the_calls_that_led_to_it(module: Any) -> None:
    session = backend.load(WEIGHTS, "fp16", "cuda", 3)
    assert module.MADE == [("cuda fp16", "3")]
    assert "FR_THREADS" not in os.environ
    _, first = session.forward(TOKENS[:5], None)
    expected, second = session.forward(TOKENS[5:6], first)
    _, third = session.forward(TOKENS[6:7], second)
    assert model(session).calls == 3, "going on costs one call"
    again, _ = session.forward(TOKENS[5:6], first)
    assert model(session).calls == 5, "the five tokens in one call, then the token"
    np.testing.assert_array_equal(again, expected)
    session.forward([TOKENS[7]], third)
    assert model(session).calls == 9, "three calls again, and the new one"


def test_a_returned_array_is_not_the_modules(module: Any) -> None:
    session = backend.load(WEIGHTS, "fp16", "cuda", None)
    logits, state = session.forward(TOKENS[:1], None)
    kept = logits.copy()
    session.forward(TOKENS[1:2], state)
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.usefixtures("module", "build")
def test_ncnn_takes_and_gives_states() -> None:
    session = backend.load(WEIGHTS, backend.NCNN, "cpu", 2)
    assert isinstance(session, StateAccess)
    truth, end = forward(WEIGHTS, TOKENS, dtype=np.float64)
    _, middle = forward(WEIGHTS, TOKENS[:20])
    logits, state = session.forward(TOKENS[20:], session.import_state(middle))
    assert logits_error(logits[None], truth[None]).worst < 1e-4
    assert state_error(session.export_state(state), end).worst < 1e-4
    middle[:] = np.nan
    session.forward(TOKENS[:3], None)
    again, _ = session.forward(TOKENS[20:], session.import_state(session.export_state(state)))
    assert np.isfinite(again).all()
    replayed, _ = session.forward(TOKENS[:1], state)
    fresh, _ = session.forward(TOKENS[:1], session.import_state(session.export_state(state)))
    np.testing.assert_array_equal(replayed, fresh)


def test_a_module_that_gives_copies_of_its_state_is_found_out(
    module: Any, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Tensor, "numpy", lambda self: self._array.copy())
    session = backend.load(WEIGHTS, backend.NCNN, "cpu", None)
    assert isinstance(session, StateAccess)
    state = session.import_state(np.ones((7, 5, 64), np.float32))
    with pytest.raises(RuntimeError, match="copies of its state"):
        session.forward(TOKENS[:1], state)


def test_the_scheme_of_ncnn_has_no_codec_and_says_what_it_is() -> None:
    scheme = SCHEMES[backend.NCNN]
    assert scheme.codec is None
    assert scheme.scheme_class == "bf16"


@pytest.mark.usefixtures("module")
def test_a_missing_or_failing_export_program_is_told(build: Path) -> None:
    (build / "export_ncnn").write_text("#!/bin/sh\necho not a model; exit 3\n")
    with pytest.raises(RuntimeError, match="ended with 3: not a model"):
        backend.load(WEIGHTS, backend.NCNN, "cpu", None)
    (build / "export_ncnn").unlink()
    with pytest.raises(Unavailable, match="export_ncnn of faster-rwkv"):
        backend.load(WEIGHTS, backend.NCNN, "cpu", None)


@pytest.mark.usefixtures("module", "build")
def test_an_embedding_that_its_groups_do_not_divide_is_unsupported() -> None:
    narrow = synthetic(Config(n_layer=1, n_embd=96, n_ffn=384, n_vocab=9), 0)
    with pytest.raises(Unsupported, match="multiples of 64, not 96"):
        backend.load(narrow, backend.NCNN, "cpu", None)


@pytest.mark.parametrize(
    ("scheme", "device", "said"),
    [
        ("fp32", "cuda", "no scheme 'fp32'"),
        ("fp16", "cpu", "fp16 on cuda, not on 'cpu'"),
        (backend.NCNN, "cuda", "on cpu"),
    ],
)
def test_what_it_does_not_offer(scheme: str, device: str, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        backend.load(WEIGHTS, scheme, device, None)


def test_without_the_module_the_reason_tells_what_to_do(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"no logits to judge; import its speed with `rwkv-bench import --from"):
        backend.check()
    monkeypatch.setenv(backend.VARIABLE, str(build / "nothing"))
    with pytest.raises(Unavailable, match="which is no file"):
        backend.check()
    monkeypatch.delenv(backend.VARIABLE)
    with pytest.raises(Unavailable, match=r"^faster-rwkv is not installed; build its Python module"):
        backend.check()
