"""Overflow planted for TVM's q0f16: named by its trace, contained in the kernel that a plain instrument finds first."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import tvm_mlc
from backends.api import Traceable, Unavailable, Unsupported
from harness.isolation import start
from harness.localize import localize
from harness.localize.bench import Bench
from harness.localize.finding import CLEAN, NON_FINITE, TRACE
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.synthetic import synthetic
from suites.nan import vm_instrument
from suites.nan.instrument import counts
from suites.nan.planted import plant

CONFIG = Config(n_layer=3, n_embd=64, n_ffn=256, n_vocab=256)
WEIGHTS = synthetic(CONFIG, 5)
TOKENS = [int(i) for i in np.random.default_rng(1).integers(0, CONFIG.n_vocab, 40)]
SCHEME = "q0f16"

#: Word in a kernel's name -> the operations it holds. TVM's logits are float32, which nothing here overflows.
HOLDS = {
    "layer_norm": ("ln1", "ln2", "ln_out"),
    "mix3": ("att.xk", "att.xv", "att.xr"),
    "wkv": ("att.r", "att.wkv", "att.rwkv"),
    "add": ("att.out", "att.residual"),
    "mix2": ("ffn.xk", "ffn.xr"),
    "square": ("ffn.k", "ffn.k2"),
    "gate": ("ffn.v", "ffn.out", "ffn.residual"),
    "plain": ("att.k", "att.v", "att.r", "ffn.r"),
}

#: Operation, layer, and where it shows: a product that is added to the stream in one kernel is float32 until then.
PLANTED = [
    ("ln1", 1, "ln1"),
    ("att.k", 2, "att.k"),
    ("att.v", 0, "att.v"),
    ("att.out", 1, "att.residual"),
    ("att.residual", 2, "att.residual"),
    ("ln2", 1, "ln2"),
    ("ffn.k", 0, "ffn.k2"),
    ("ffn.k2", 2, "ffn.k2"),
    ("ffn.residual", 1, "ffn.residual"),
]

#: What the plain instrument sees late or not at all. It counts a kernel's last output, and a token shift has three; and
#: of the last LayerNorm the ordinary library runs the last position alone.
UNSEEN = [("att.xk", 1, "plain"), ("ln_out", None, None)]

#: What is float32 in a kernel of TVM's, whose logits are float32 too: it overflows fp16 nowhere.
HELD = [("ffn.v", 0), ("att.wkv", 1), ("logits", None)]


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of TVM's environment."""
    try:
        found = start.environment("tvm", tvm_mlc)
    except Unavailable as missing:
        pytest.skip(str(missing))
    assert found is not None
    return Path(found.python)


def plain_instrument(python: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """NaN and Inf of every kernel of the ordinary library, counted in TVM's own interpreter."""
    root = Path(__file__).parents[2]
    tokens = ",".join(map(str, TOKENS))
    done = subprocess.run(
        [python, vm_instrument.__file__, checkpoint, SCHEME, tokens],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [kernel for kernel in kernels if not kernel["kernel"].startswith("vm.")]


def traced_and_counted(python: Path, tmp_path: Path, name: str, layer: int | None, point: str) -> list[dict[str, Any]]:
    """Localize names the planted point and its fix restores parity; what the plain instrument says of each kernel."""
    weights, _ = plant(WEIGHTS, TOKENS, name, layer)
    bench = Bench("tvm", SCHEME, threads=1)
    found = localize(bench, weights, SCHEME, bench.schemes[SCHEME], TOKENS)
    assert (found.verdict, found.method, found.point, found.layer) == (NON_FINITE, TRACE, point, layer), found.cause
    assert found.fix is not None
    assert found.fix.verified, found.fix
    assert not found.fix.what.startswith("scheme q4"), found.fix  # of fp16 weights that would lose most of their bits
    with bench(weights) as session:
        assert isinstance(session, Traceable)
        assert counts(session, TOKENS)[0].point == point
    path = tmp_path / "planted.safetensors"
    save_checkpoint(weights, str(path), "safetensors", "fp32")
    return plain_instrument(python, path)


@pytest.mark.parametrize(("name", "layer", "shows"), PLANTED)
def test_named_by_the_trace_and_within_the_first_bad_kernel(
    python: Path, tmp_path: Path, name: str, layer: int, shows: str
) -> None:
    kernels = traced_and_counted(python, tmp_path, name, layer, f"blocks.{layer}.{shows}")
    first = next(i for i, kernel in enumerate(kernels) if kernel["nan"] or kernel["inf"])
    word = next(word for word in HOLDS if word in kernels[first]["kernel"])
    blocks = sum("mix3" in kernel["kernel"] for kernel in kernels[: first + 1])
    assert shows in HOLDS[word], kernels[first]
    assert layer == blocks - 1 + (shows == "ln1")


@pytest.mark.parametrize(("name", "layer", "word"), UNSEEN)
def test_named_by_the_trace_where_the_plain_instrument_is_late_or_blind(
    python: Path, tmp_path: Path, name: str, layer: int | None, word: str | None
) -> None:
    point = name if layer is None else f"blocks.{layer}.{name}"
    kernels = traced_and_counted(python, tmp_path, name, layer, point)
    bad = [kernel["kernel"] for kernel in kernels if kernel["nan"] or kernel["inf"]]
    assert (word in bad[0]) if word else not bad


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize(("name", "layer"), HELD)
def test_what_a_fused_kernel_holds_is_no_fault(name: str, layer: int | None) -> None:
    """``ffn.v`` of 1e5 overflows fp16 where it is stored; TVM gates it in float32 first, and no alarm is raised."""
    weights, _ = plant(WEIGHTS, TOKENS, name, layer)
    bench = Bench("tvm", SCHEME, threads=1)
    found = localize(bench, weights, SCHEME, bench.schemes[SCHEME], TOKENS)
    assert (found.verdict, found.fix) == (CLEAN, None)


@pytest.mark.usefixtures("python")
def test_a_stream_that_overflows_is_halved_by_another_library() -> None:
    """Localize chooses how often; ``adjust`` compiles with it, and the planted checkpoint is judged right."""
    planted, point = plant(WEIGHTS, TOKENS, "att.residual", 2)
    bench = Bench("tvm", SCHEME, threads=1)
    found = localize(bench, planted, SCHEME, bench.schemes[SCHEME], TOKENS)
    assert (found.verdict, found.point) == (NON_FINITE, point)
    assert found.fix is not None
    assert found.fix.verified, found.fix
    assert found.fix.what.startswith("rescale_every "), found.fix
    with pytest.raises(Unsupported, match="it can change rescale_every"), bench.open(planted, change={"fp32": [point]}):
        pass
