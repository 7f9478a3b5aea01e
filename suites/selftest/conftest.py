"""What the tests of the command line share: folders of their own, and a model that runs in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.cli import main
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.synthetic import synthetic
from suites.selftest.ab_repository import repository as repository
from suites.selftest.ab_repository import untouched as untouched

#: Two layers, groups of 32 fit, the vocabulary is bytes.
SMALL = Config(n_layer=2, n_embd=32, n_ffn=64, n_vocab=256)


class Done(NamedTuple):
    """What one command came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small checkpoint with a space in its name."""
    path = tmp_path_factory.mktemp("models") / "a small.safetensors"
    save_checkpoint(synthetic(SMALL, 3), path, "safetensors", "fp32")
    return str(path)


@pytest.fixture(scope="session")
def _truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def state(tmp_path: Path, _truths: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test; the cache is shared, so that a truth is computed once."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(_truths))
    return tmp_path / "state" / "rwkv-bench"


@pytest.fixture
def bench(state: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""

    def run(*argv: str) -> Done:
        code = main(list(argv))
        return Done(code, *capsys.readouterr())

    return run
