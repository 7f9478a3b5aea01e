"""Triton kernels that make several things at once, one by one against numpy: ragged sizes, every type and format.

Run as test_triton_kernels is. Numpy is given what the kernel is given, so an error is the kernel's own: that of float32
sums, and one rounding for each type that a result passes through.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from backends.triton_cuda import machine
from reference.forward import WkvState, wkv
from reference.numerics import UNIT_ROUNDOFF, Exact

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
pytest.importorskip("triton", reason="triton is not installed: pip install 'rwkv-bench[triton]'")
if not machine.interpreted():
    pytest.skip("kernels run on the CPU in Triton's interpreter only: TRITON_INTERPRET=1", allow_module_level=True)

from backends.triton_cuda import kernels_gemm, kernels_gemv, kernels_norm, matrix, model  # noqa: E402
from backends.triton_cuda.types import TRITON  # noqa: E402
from suites.selftest import triton_launched  # noqa: E402
from suites.selftest.test_triton_kernels import FORMATS, draw, off, stored  # noqa: E402
from suites.selftest.triton_launched import of  # noqa: E402

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Largest relative error of one rounding; the interpreter cuts bfloat16 off where a GPU rounds to the nearest.
ROUNDING = {**UNIT_ROUNDOFF, "bf16": 2 * UNIT_ROUNDOFF["bf16"]}
#: Widths that no block divides, one channel, and one that is a block.
WIDTHS = (1, 37, 64)
EPS = 1e-5


def bound(kind: str, roundings: int = 4) -> float:
    """Relative error of a result: float32's sums and exponentials, and so many roundings to a type."""
    return 2e-5 if kind == "fp32" else roundings * ROUNDING[kind]


def as_stored(x: np.ndarray, kind: str) -> tuple[Any, np.ndarray]:
    """A tensor of a type, and what it holds in float64."""
    tensor = torch.from_numpy(x).to(TYPES[kind])
    return tensor, tensor.double().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def layer_norm(x: np.ndarray, affine: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt(x.var(-1, keepdims=True) + EPS) * affine[0] + affine[1])


def lying(bits: int, width: int) -> Any:
    """A packed matrix of so many columns, to lay vectors out for."""
    return matrix.Matrix(torch.empty(1, 1), 1, width, None, bits)


def vectors(of_matrix: Any, *values: np.ndarray) -> tuple[Any, list[np.ndarray]]:
    """What the matrix is multiplied by, as it takes it; and the values in float64."""
    kind = torch.float32 if of_matrix.bits else of_matrix.data.dtype
    rounded = [torch.from_numpy(value).to(kind) for value in values]
    return torch.stack([of_matrix.placed(value) for value in rounded]), [value.double().numpy() for value in rounded]


@pytest.mark.parametrize("made", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", FORMATS)
@of("gemv_time_mix")
def test_time_mixing_of_one_token(kind: str, width: int, made: str) -> None:
    """k, v, r, WKV and r * wkv; the state is moved on in place."""
    kvr, weights = stored(kind, 3 * width, width)
    mixed, (xk, xv, xr) = vectors(kvr, *(draw(width, seed=seed) for seed in range(3)))
    past = draw(3, width, seed=4)
    past[1] = np.abs(past[1]) + 1
    w, u = np.exp(draw(width, seed=5)), draw(width, seed=6)
    out = torch.full((lying(4, width).vector,), torch.nan)
    state = torch.from_numpy(past.copy())
    kernels_gemv.gemv_time_mix[(-(-width // 16),)](
        kvr.data, kvr.scales, mixed, state, state, torch.from_numpy(w), torch.from_numpy(u), out, width, kvr.vector,
        *kvr.strides, MADE=TRITON[TYPES[made]], OUT_BITS=4, BITS=kvr.bits, KN=kvr.kn, BN=16, BK=16,
    )  # fmt: skip
    k, v, r = (weights[j * width : (j + 1) * width] @ x for j, x in enumerate((xk, xv, xr)))
    before = WkvState(*past.astype(np.float64))
    y, after = wkv(k[None], v[None], w.astype(np.float64), u.astype(np.float64), before, Exact(np.float64))
    want = lying(4, width).placed(torch.from_numpy((sigmoid(r) * y[0]).astype(np.float32)))
    there = ~torch.isnan(out)
    assert int(there.sum()) == width, "one place for each channel"
    assert off(torch.where(there, out, 0.0), want.double().numpy()) < bound(made, 8)
    for row, exact in zip(state, after, strict=True):
        assert off(row, exact) < bound(made, 8)


@pytest.mark.parametrize("made", TYPES)
@pytest.mark.parametrize(("width", "hidden"), [(1, 7), (37, 130), (64, 96)])
@pytest.mark.parametrize("kind", FORMATS)
@of("gemv_channel_mix")
def test_channel_mixing_of_one_token(kind: str, width: int, hidden: int, made: str) -> None:
    """Squared ReLU of the key and the gate, by programs that make either."""
    kr, weights = stored(kind, hidden + width, width)
    mixed, (xk, xr) = vectors(kr, draw(width, seed=1), draw(width, seed=2))
    squared, gate = torch.full((lying(8, hidden).vector,), torch.nan), torch.full((width,), torch.nan)
    kernels_gemv.gemv_channel_mix[(-(-hidden // 16) + -(-width // 16),)](
        kr.data, kr.scales, mixed, squared, gate, width, hidden, kr.vector, *kr.strides,
        MADE=TRITON[TYPES[made]], OUT_BITS=8, BITS=kr.bits, KN=kr.kn, BN=16, BK=16,
    )  # fmt: skip
    want = lying(8, hidden).placed(torch.from_numpy(np.square(np.maximum(weights[:hidden] @ xk, 0)).astype(np.float32)))
    there = ~torch.isnan(squared)
    assert int(there.sum()) == hidden, "one place for each channel"
    assert off(torch.where(there, squared, 0.0), want.double().numpy()) < bound(made, 4)
    assert off(gate, sigmoid(weights[hidden:] @ xr)) < bound(made, 4)


@of("gemv_channel_mix")
def test_not_a_number_is_not_lost_in_channel_mixing() -> None:
    kr, _ = stored("fp32", 10, 5)
    squared, gate = torch.zeros(5), torch.zeros(5)
    kernels_gemv.gemv_channel_mix[(2,)](
        kr.data, kr.scales, torch.full((2, 5), torch.nan), squared, gate, 5, 5, 5, *kr.strides,
        MADE=TRITON[torch.float32], OUT_BITS=0, BITS=0, KN=False, BN=16, BK=16,
    )  # fmt: skip
    assert torch.isnan(squared).all()
    assert torch.isnan(gate).all()


@pytest.mark.parametrize("stream", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 37), (5, 37), (4, 64)])
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "KN" not in kind])
@of("embed_norm")
def test_embedding_and_its_norm(kind: str, rows: int, width: int, stream: str) -> None:
    """Rows of a table that lie apart, one of them twice, the last one too; and traced, the embedding itself."""
    table, values = stored(kind, 9, width)
    ids = torch.tensor([8, 0, 3, 8, 5][:rows])
    affine = draw(2, width, seed=3)
    x = torch.full((rows, width), torch.nan, dtype=TYPES[stream])
    raw, (weight, bias) = torch.full_like(x, torch.nan), torch.from_numpy(affine)
    for trace in (False, True):
        kernels_norm.embed_norm[(-(-rows // 2),)](
            ids, table.data, table.scales, weight, bias, x, raw if trace else None, width, -(-width // 32), rows, EPS,
            BITS=table.bits, TRACE=trace, ROWS=2, BLOCK=64,
        )  # fmt: skip
        want = layer_norm(values[ids.numpy()], affine)
        assert off(x, want) < bound(stream, 1)
    assert off(raw, values[ids.numpy()]) < bound(stream, 1)


@pytest.mark.parametrize("made", TYPES)
@pytest.mark.parametrize("stream", TYPES)
@pytest.mark.parametrize(("rows", "width", "bits"), [(1, 1, 0), (5, 37, 0), (1, 37, 4), (1, 50, 8), (4, 64, 0)])
@of("norm")
def test_last_norm(rows: int, width: int, bits: int, stream: str, made: str) -> None:
    """Into rows of their own order, or one vector as a packed matrix takes it."""
    x, exact = as_stored(draw(rows, width), stream)
    affine = draw(2, width, seed=1)
    out = torch.zeros(rows, lying(bits, width).vector, dtype=torch.float32 if bits else TYPES[made])
    weight, bias = torch.from_numpy(affine)
    kernels_norm.norm[(-(-rows // 2),)](
        x, weight, bias, out, width, rows, out.shape[1], EPS, BITS=bits, ROWS=2, BLOCK=64
    )
    want = layer_norm(exact, affine)
    if bits:
        want = lying(bits, width).placed(torch.from_numpy(want[0].astype(np.float32))).double().numpy()[None]
    assert off(out, want) < bound("fp32" if bits else made, 1)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 37), (4, 64)])
@of("fit")
def test_rows_are_made_to_fit(rows: int, width: int) -> None:
    """Divided by a power of two where they leave float16, and only there; NaN is not lost."""
    x = draw(rows, width)
    x[-1] = 3e6 * (np.abs(x[-1]) + 1)
    x[0, -1] = np.nan if rows > 1 else x[0, -1]
    out, factors = torch.zeros(rows, width, dtype=torch.float16), torch.zeros(rows)
    kernels_gemm.fit[(-(-rows // 2),)](torch.from_numpy(x), out, factors, width, rows, ROWS=2, BLOCK=64)
    assert factors[-1] > 1
    assert torch.log2(factors[-1]).frac() == 0
    assert torch.isfinite(out[-1]).all()
    for row in range(1 if rows > 1 else 0, rows):
        assert off(out[row].double() * factors[row].double(), x[row]) < UNIT_ROUNDOFF["fp16"]
        assert row == rows - 1 or factors[row] == 1
    assert rows == 1 or torch.isnan(out[0, -1])


@pytest.mark.parametrize("made", TYPES)
@pytest.mark.parametrize("stream", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 37), (4, 64)])
@pytest.mark.parametrize("limited", [False, True])
@of("add_gated")
def test_gated_addition(limited: bool, rows: int, width: int, stream: str, made: str) -> None:
    x, start = as_stored(draw(rows, width), stream)
    (r, r64), (v, v64) = (as_stored(draw(rows, width, seed=seed), made) for seed in (1, 2))
    factors = np.exp2(np.arange(rows)).astype(np.float32)
    kernels_gemm.add_gated[(-(-rows // 2),)](
        x, r, v, torch.from_numpy(factors), width, rows, LIMITED=limited, MADE=TRITON[TYPES[made]], ROWS=2, BLOCK=64
    )
    added = sigmoid(r64) * v64 * (factors[:, None].astype(np.float64) if limited else 1.0)
    room = bound(made, 2) * np.linalg.norm(added) + bound(stream, 1) * np.linalg.norm(start + added)
    assert float(np.linalg.norm(x.double().numpy() - start - added)) < room


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize(("length", "batch", "chunk"), [(1, 3, 16), (23, 1, 5), (33, 2, 8)])
@of("wkv_totals", "wkv_output")
def test_wkv_of_half_floats(kind: str, length: int, batch: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out is rounded once or twice; the state is float32's, in chunks as in one piece."""
    monkeypatch.setattr(model, "wkv_chunk", lambda *a: chunk)
    monkeypatch.setattr(model, "WKV_BLOCK", 32)
    width = 45
    (k, k64), (v, v64), (r, r64) = (as_stored(4 * draw(batch * length, width, seed=seed), kind) for seed in range(3))
    w, u, past = np.exp(draw(width, seed=4)), draw(width, seed=5), draw(batch, 3, width, seed=6)
    past[:, 1] = np.abs(past[:, 1]) + 1
    after, out, raw = torch.empty(batch, 3, width), torch.empty_like(k), torch.empty_like(k)
    wt, ut, pt = (torch.from_numpy(x) for x in (w, u, past))
    model.scan(k, v, r, wt, ut, pt, after, length, out, raw)
    w64, u64 = w.astype(np.float64), u.astype(np.float64)
    for b in range(batch):
        here = slice(b * length, (b + 1) * length)
        want, state = wkv(k64[here], v64[here], w64, u64, WkvState(*past[b].astype(np.float64)), Exact(np.float64))
        assert off(raw[here], want) < bound(kind, 1)
        assert off(out[here], want * sigmoid(r64[here])) < bound(kind, 3)
        for got, exact in zip(after[b], state, strict=True):
            assert off(got, exact) < 2e-5


def test_every_kernel_has_a_test_of_its_own() -> None:
    import_module("suites.selftest.test_triton_kernels")
    assert triton_launched.kernels() == set(triton_launched.TESTS)
