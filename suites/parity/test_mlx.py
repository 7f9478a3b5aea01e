"""The mlx backend in its own environment on the CPU: gates, its codec and its scan against MLX and the reference."""

from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import mlx_rwkv as backend
from backends.api import Generating, Scoring, StateAccess, Traceable, Unavailable, Unsupported
from harness import open_session
from harness.isolation import start
from harness.models import gate_tokens, open_model
from harness.parity import gate
from harness.session import Opened
from harness.tolerance import derive
from reference.codecs_mlx import MLX_SCHEMES, MlxGroups
from reference.config import Config
from reference.errors import ConfigError
from reference.forward import WkvState, forward, wkv
from reference.numerics import Exact
from reference.operations import steps
from reference.synthetic import synthetic

ODD = Config(n_layer=2, n_embd=192, n_ffn=704, n_vocab=299)
QUANTIZED = tuple(MLX_SCHEMES)


@pytest.fixture(scope="module")
def _environment() -> None:
    try:
        start.environment("mlx", backend)
    except Unavailable as missing:
        pytest.skip(str(missing))


def opened(model: Any, scheme: str) -> AbstractContextManager[Opened]:
    return open_session("mlx", model, scheme, "cpu")


def inside(code: str, *arguments: str) -> str:
    """What Python code prints in the backend's environment, with this project on its path."""
    environment = start.environment("mlx", backend)
    assert environment is not None
    root = str(Path(backend.__file__).parents[2])
    command = [str(environment.python), "-I", "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- in its environment


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("scheme", backend.INFO.schemes)
def test_gate(scheme: str) -> None:
    weights = synthetic(ODD, 4)
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, ODD.n_vocab, 40)]
    with opened(weights, scheme) as found:
        checked = gate(found.session, derive(weights, scheme, found.arithmetic, tokens))
        for capability in (Scoring, StateAccess, Generating, Traceable):
            assert isinstance(found.session, capability)
    assert checked.passed, str(checked.first_bad)
    assert checked.state
    assert not checked.loose


@pytest.mark.usefixtures("_environment")
def test_gate_of_the_embedded_model() -> None:
    """The tightest of the quantized ones; every scheme of it is judged by suites/parity/test_cells.py."""
    model = open_model("tiny")
    truth = derive(model.weights, "4bit", backend.INFO.arithmetic("4bit", "cpu"), gate_tokens(model, 48), model.sha256)
    with opened(model, "4bit") as found:
        checked = gate(found.session, truth)
    assert checked.passed, str(checked.first_bad)


@pytest.mark.usefixtures("_environment")
def test_a_prompt_of_several_evaluations_and_its_trace() -> None:
    """Longer than session.CHUNK, and not a multiple of it; every trace point in order."""
    weights = synthetic(ODD, 2)
    tokens = [int(i) for i in np.random.default_rng(3).integers(0, ODD.n_vocab, 519)]
    expected, state = forward(weights, tokens, all_logits=True)
    seen: dict[str, np.ndarray] = {}
    with opened(weights, "fp32") as found:
        session = found.session
        assert isinstance(session, Scoring)
        assert isinstance(session, StateAccess)
        assert isinstance(session, Traceable)
        rows = session.logits(tokens, None)
        logits, after = session.forward(tokens, None)
        canonical = session.export_state(after)
        session.trace(tokens[:9], None, seen.__setitem__)
    close = 1e-3 * expected.std()
    np.testing.assert_allclose(rows, expected, atol=close)
    np.testing.assert_allclose(logits, expected[-1], atol=close)
    np.testing.assert_allclose(canonical[:, :2], state[:, :2], atol=1e-3)
    assert list(seen) == [step.point for step in steps(ODD)]
    np.testing.assert_allclose(seen["logits"], expected[:9], atol=close)


_QUANTIZE = """
import numpy as np, mlx.core as mx
mx.set_default_device(mx.cpu)
found = {}
for name, w in np.load(sys.argv[1]).items():
    for bits in (4, 8):
        for group in (32, 64, 128):
            parts = mx.quantize(mx.array(w), group_size=group, bits=bits)
            back = mx.dequantize(*(p if p.dtype == mx.uint32 else p.astype(mx.float32) for p in parts),
                                 group_size=group, bits=bits)
            for part, kept in zip(("codes", "scales", "biases", "back"), (*parts, back)):
                found[f"{name} {bits} {group} {part}"] = np.array(kept)
np.savez(sys.argv[2], **found)
"""


@pytest.mark.usefixtures("_environment")
def test_the_codec_gives_the_bits_of_mlx(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((96, 256)) * 10.0 ** rng.integers(-7, 4, (96, 1))
    w[0], w[1], w[2], w[3, :128] = 0, 1.5, -2, 7
    w[4], w[5], w[6] = np.abs(w[4]), -np.abs(w[5]), np.repeat([1, -1, 0.5, 0], 64)
    w[7:40] = rng.integers(-8, 8, (33, 256)) / 16  # ties between two codes, and equal ends
    kinds = {"float16": np.float16, "float32": np.float32}
    np.savez(tmp_path / "w.npz", float16=w.astype(np.float16), float32=w.astype(np.float32))
    inside(_QUANTIZE, str(tmp_path / "w.npz"), str(tmp_path / "q.npz"))
    found = np.load(tmp_path / "q.npz")
    for key in found:
        name, bits, group, part = key.split()
        groups = MlxGroups(int(bits), int(group), kinds[name])
        packed = groups.quantize(w.astype(kinds[name]).astype(np.float32))
        ours = groups.dequantize(packed) if part == "back" else getattr(packed, part)
        assert ours.tobytes() == found[key].tobytes(), key


_PLACED = """
import numpy as np
from backends.mlx_rwkv.weights import quantized
from reference.codecs_mlx import MLX_SCHEMES
w = np.random.default_rng(0).standard_normal((5, 192)).astype(np.float32)
w[1, 70], w[2, 0], w[3, 191] = np.nan, np.inf, 7e4  # the last overflows in fp16
for groups in (MLX_SCHEMES[name] for name in sys.argv[1:]):
    ours = groups.quantize(w)
    for kept, expected in zip(quantized(np.where(np.abs(w) > 65504, np.inf, w), groups), ours):
        bad = np.isnan(np.repeat(ours.scales, len(expected[0]) // len(ours.scales[0]), axis=-1))
        assert np.array_equal(np.array(kept)[~bad], expected[~bad])
        if kept.shape == ours.scales.shape and expected is ours.scales:
            assert np.array_equal(np.isnan(np.array(kept)), np.isnan(expected)) and np.isnan(expected).sum() == 3
"""


@pytest.mark.usefixtures("_environment")
def test_what_is_placed_is_what_the_codec_keeps_and_no_nan_is_stepped_over() -> None:
    inside(_PLACED, *QUANTIZED)


_SCAN = """
import numpy as np, mlx.core as mx
from backends.mlx_rwkv.wkv import wkv
given = np.load(sys.argv[1])
with mx.stream(mx.cpu):
    past = tuple(mx.array(row[None]) for row in given["past"])
    y, after = wkv(*(mx.array(given[name]) for name in ("k", "v", "w", "u")), past)
    np.savez(sys.argv[2], y=np.array(y), after=np.concatenate([np.array(part) for part in after]))
"""


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize(("length", "size"), [(1, 1.0), (2, 30.0), (33, 5.0), (600, 1.0), (64, 1e4)])
def test_the_scan_is_the_recurrence(length: int, size: float, tmp_path: Path) -> None:
    """However large the keys: sums over spans of 2, 4, 8, ... tokens end where the loop ends."""
    rng = np.random.default_rng(length)
    k, v = (size * rng.standard_normal((length, 8)).astype(np.float32), rng.standard_normal((length, 8)).astype("f4"))
    w, u = np.exp(rng.uniform(-8, 3, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    past = np.stack([rng.standard_normal(8), rng.uniform(0, 1, 8), rng.standard_normal(8)]).astype(np.float32)
    if length == 33:
        past = np.stack([np.zeros(8), np.zeros(8), np.full(8, -1e30)]).astype(np.float32)
    np.savez(tmp_path / "in.npz", k=k, v=v, w=w, u=u, past=past)
    inside(_SCAN, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"))
    found = np.load(tmp_path / "out.npz")
    past64 = WkvState(*past.astype(np.float64))
    expected, after = wkv(k.astype("f8"), v.astype("f8"), w.astype("f8"), u.astype("f8"), past64, Exact(np.float64))
    off = 1e-4 + 2.0**-22 * float(np.abs(k).max())  # an exponent of this size is known to so much in float32
    np.testing.assert_allclose(found["y"], expected, rtol=off, atol=off)
    shift = np.exp(found["after"][2].astype(np.float64) - after.pp)
    np.testing.assert_allclose(found["after"][0] * shift, after.aa, rtol=off, atol=off)
    np.testing.assert_allclose(found["after"][1] * shift, after.bb, rtol=off, atol=off)


_ADDED = """
import numpy as np, mlx.core as mx
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
x, w = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 4096), (32, 4096)))
def off(y, truth):
    return float(np.sqrt(np.mean((np.array(y.astype(mx.float32)) - truth) ** 2) / np.mean(truth**2)))
for kind in (mx.float32, mx.float16, mx.bfloat16):
    a, b = x.astype(kind), w.astype(kind)
    parts = mx.quantize(b, group_size=64, bits=4)
    exact = mx.dequantize(*(p if p.dtype == mx.uint32 else p.astype(mx.float32) for p in parts), group_size=64, bits=4)
    a64, b64, q64 = (np.array(y.astype(mx.float32)).astype(np.float64) for y in (a, b, exact))
    print(off(a @ b.T, a64 @ b64.T), off(mx.quantized_matmul(a, *parts, group_size=64, bits=4), a64 @ q64.T))
"""


@pytest.mark.usefixtures("_environment")
def test_products_add_up_as_declared() -> None:
    """Plain ones in float32 whatever the inputs are; quantized ones in the type of the inputs, so in fp32 only."""
    rows = [tuple(map(float, line.split())) for line in inside(_ADDED).splitlines()]
    (plain32, packed32), (plain16, packed16), (plainb, packedb) = rows
    assert plain32 < 3e-6
    assert packed32 < 3e-6
    assert plain16 < 2.0**-11
    assert plainb < 2.0**-8
    if packed16 < 2.0**-11 and packedb < 2.0**-8:
        pytest.fail("quantized_matmul adds up fp16 in float32 here: schemes.py may declare it, and compute in fp16")


# --- what it does not offer


@pytest.mark.parametrize(
    ("scheme", "device", "error", "said"),
    [
        ("Q4_0", "cpu", Unsupported, "no scheme 'Q4_0'; it has fp16, bf16, fp32, 4bit"),
        ("fp16", "cuda", Unsupported, "no device 'cuda' here; it has cpu and mps, the Apple GPU"),
        ("fp16", "mps:0", Unsupported, "no device 'mps:0' here"),
    ],
)
def test_what_it_does_not_offer(scheme: str, device: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        backend.load(synthetic(ODD, 0), scheme, device, 1)


def test_an_apple_gpu_elsewhere_is_unavailable_and_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "check", lambda: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(Unavailable, match="mlx sees no Apple GPU; it needs macOS on Apple silicon; --device cpu"):
        backend.load(synthetic(ODD, 0), "fp16", "mps", 1)


# --- its codec, without MLX

_RAMP = (np.arange(32) * 37 % 32 - 15.5) / 16
#: What mx.quantize of MLX 0.32.0 makes of float16 rows: codes, scale, bias.
GOLDEN = {
    "ramp": (_RAMP, "df8b36e19c47f2ad5803be6914cf7a25", "c0af", "c03b"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_codec_against_bytes_of_mlx(name: str) -> None:
    row, codes, scale, bias = GOLDEN[name]
    packed = MlxGroups(4, 32).quantize(np.asarray(row, np.float32)[None])
    assert (packed.codes.tobytes().hex(), packed.scales.tobytes().hex(), packed.biases.tobytes().hex()) == (
        codes,
        scale,
        bias,
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_weight_is_off_by_more_than_half_a_step_and_rounding(name: str) -> None:
    groups = MLX_SCHEMES[name]
    w = np.random.default_rng(5).standard_normal((7, 3 * groups.group)).astype(np.float16).astype(np.float32)
    packed = groups.quantize(w)
    step = np.repeat(np.abs(packed.scales.astype(np.float32)), groups.group, axis=-1)
    # Zero is moved onto a code, so the range can reach half a step beyond the last one.
    assert np.all(np.abs(groups.dequantize(packed) - w) <= 1.05 * step + 2.0**-9 * np.abs(w).max())


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 96 weights do not divide into groups of 64"):
        MLX_SCHEMES["4bit"].quantize(np.zeros((1, 96), np.float32))
