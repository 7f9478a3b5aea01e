"""Every Triton kernel in the interpreter against numpy: ragged sizes, odd lengths, one token, every type.

Those that make several things at once have test_triton_fused; together they are every kernel, which is held to there.
Run by ``TRITON_INTERPRET=1 pytest`` (Triton decides when it is imported whether it compiles); CI does, as a step of its
own. Blocks are made smaller than the data as well as larger, so that loops, masks and seams are all gone through.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends.triton_cuda import machine
from reference.codecs_mlc import MlcGroups
from reference.forward import WkvState, wkv
from reference.numerics import Exact

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[triton]'")
pytest.importorskip("triton", reason="triton is not installed: pip install 'rwkv-bench[triton]'")
if not machine.interpreted():
    pytest.skip("kernels run on the CPU in Triton's interpreter only: TRITON_INTERPRET=1", allow_module_level=True)

from backends.triton_cuda import kernels_gemm, kernels_gemv, matrix, model  # noqa: E402
from backends.triton_cuda.tiles import Tile, power_of_two  # noqa: E402
from suites.selftest.triton_launched import of  # noqa: E402
from suites.throughput import compare_wkv, triton_wkv  # noqa: E402

FORMATS = ("fp32", "fp16", "bf16", "int4 NK", "int4 KN", "int8 NK")
#: Relative error of a float32 sum of a few hundred products.
CLOSE = 2e-6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(kind: str, results: int, columns: int) -> tuple[Any, np.ndarray]:
    """A matrix of a format, and its values in float64."""
    w = draw(results, columns, seed=results + columns)
    if not kind.startswith("int"):
        data = torch.from_numpy(w).to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind])
        return matrix.Matrix(data, results, columns), data.double().numpy()
    bits, layout = int(kind[3]), kind.split()[1]
    packing = MlcGroups(bits, np.float16, 32, layout)
    packed = packing.quantize(w)
    parts = packing.arrays(packed)
    words, scales = torch.from_numpy(parts["q_weight"].view(np.int32)), torch.from_numpy(parts["q_scale"])
    return matrix.Matrix(words, results, columns, scales, bits, layout == "KN"), packing.dequantize(packed).astype(
        np.float64
    )


def off(got: Any, want: np.ndarray) -> float:
    """Relative error; NaN where anything is."""
    got = got.double().numpy() if isinstance(got, torch.Tensor) else got
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def blocks(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    """Blocks much smaller than the data."""
    if small:
        monkeypatch.setattr(matrix, "gemv_tile", lambda *a: Tile(16, 16, 1))
        monkeypatch.setattr(matrix, "gemm_tile", lambda *a: (16, 32, 16, 1))
        monkeypatch.setattr(matrix, "dequantize_tile", lambda kn: (32, 64))
        monkeypatch.setattr(model, "row_tile", lambda width, rows: Tile(2, power_of_two(width), 1))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("results", "columns", "small"), [(1, 1, False), (37, 130, True), (50, 33, False)])
@of("gemv")
def test_product_with_a_vector(
    monkeypatch: pytest.MonkeyPatch, kind: str, results: int, columns: int, small: bool
) -> None:
    blocks(monkeypatch, small)
    stored_matrix, values = stored(kind, results, columns)
    x, gate, start = draw(columns, seed=1), draw(results, seed=2), draw(results, seed=3)
    out = torch.from_numpy(start.copy())
    given = stored_matrix.placed(
        torch.from_numpy(x).to(stored_matrix.data.dtype if not stored_matrix.bits else torch.float32)
    )
    exact = torch.from_numpy(x).to(given.dtype).double().numpy() if not stored_matrix.bits else x.astype(np.float64)
    matrix.vector_product(stored_matrix, given, out, torch.from_numpy(gate), made=torch.float32, add=True)
    assert off(out, start + gate * (values @ exact)) < CLOSE
    out = torch.full((results,), np.nan)
    matrix.vector_product(stored_matrix, given, out, made=torch.float32)
    assert off(out, values @ exact) < CLOSE * 10  # results may cancel


@pytest.mark.parametrize("kind", ["int4 NK", "int4 KN", "int8 NK"])
@pytest.mark.parametrize(("rows", "small"), [(2, True), (19, False), (70, True)])
@of("gemm_packed", "dequantize")
def test_product_of_a_prompt_with_a_packed_matrix(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, small: bool
) -> None:
    """Short prompts dequantize inside the product, longer ones before it; weights are rounded to float16 in both."""
    blocks(monkeypatch, small)
    stored_matrix, values = stored(kind, 45, 100)
    x = torch.from_numpy(draw(rows, 100)).half()
    want = x.double().numpy() @ values.astype(np.float16).astype(np.float64).T
    assert off(matrix.product(stored_matrix, x, torch.float32), want) < 1e-3 / 5
    part = matrix.product(stored_matrix.rows(7, 20), x, torch.float32)
    assert off(part, want[:, 7:27]) < 1e-3 / 5


@pytest.mark.parametrize(("length", "batch", "chunk"), [(1, 1, 16), (1, 3, 16), (23, 1, 5), (16, 2, 16), (33, 2, 8)])
@of("wkv_totals", "wkv_output")
def test_wkv_in_chunks(monkeypatch: pytest.MonkeyPatch, length: int, batch: int, chunk: int) -> None:
    """The seams between chunks, keys of 60, and a state that goes on, against the recurrence step by step."""
    monkeypatch.setattr(model, "wkv_chunk", lambda *a: chunk)
    monkeypatch.setattr(model, "WKV_BLOCK", 32)
    width = 45
    k, v, r = (draw(batch * length, width, seed=seed) for seed in range(3))
    k *= 20
    w, u = np.exp(draw(width, seed=4) * 2), draw(width, seed=5)
    past = draw(batch, 3, width, seed=6)
    past[:, 1] = np.abs(past[:, 1]) + 1
    past[0, 2] = -1e30
    past[0, :2] = 0
    after, out = torch.empty(batch, 3, width), torch.empty(batch * length, width)
    raw = torch.empty_like(out)
    kt, vt, rt, wt, ut, pt = (torch.from_numpy(x) for x in (k, v, r, w, u, past))
    model.scan(kt, vt, rt, wt, ut, pt, after, length, out, raw)
    for b in range(batch):
        here = slice(b * length, (b + 1) * length)
        k64, v64, w64, u64 = (x.astype(np.float64) for x in (k[here], v[here], w, u))
        want, state = wkv(k64, v64, w64, u64, WkvState(*past[b].astype(np.float64)), Exact(np.float64))
        assert off(raw[here], want) < 2e-5  # exponents of 60 are rounded to 4e-6
        assert off(out[here], want / (1 + np.exp(-r[here].astype(np.float64)))) < 2e-5
        for row in range(3):
            assert off(after[b, row], state[row]) < 2e-5


@pytest.mark.parametrize(("length", "batch", "width"), [(1, 1, 33), (1, 3, 64), (5, 2, 50)])
@pytest.mark.parametrize("bits", [0, 4])
@of("norm_mix")
def test_norm_and_token_shift(monkeypatch: pytest.MonkeyPatch, length: int, batch: int, width: int, bits: int) -> None:
    blocks(monkeypatch, True)
    rows = batch * length
    x, past, affine, mu = draw(rows, width), draw(batch, width, seed=1), draw(2, width, seed=2), draw(3, width, seed=3)
    if rows > 1:
        bits = 0  # one vector is placed for a packed matrix, many are not
    empty = matrix.Matrix(torch.empty(1, 1), 1, width, None, bits)
    mixed = torch.zeros(3, rows, empty.vector)
    after = torch.empty(batch, width)
    fake: Any = SimpleNamespace(config=SimpleNamespace(n_embd=width))
    fake._by_rows = lambda *a, **k: model.Model._by_rows(fake, *a, **k)
    norm, weights, row = (torch.from_numpy(a) for a in (affine, mu, past))
    model.Model._norm_mix(fake, torch.from_numpy(x), norm, weights, row, after, mixed, length, 1.0, bits=bits)
    wide = x.astype(np.float64)
    h = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * affine[0] + affine[1]
    h = h.reshape(batch, length, width)
    before = np.concatenate([past[:, None], h[:, :-1]], axis=1)
    assert off(after, h[:, -1]) < CLOSE
    for j in range(3):
        want = torch.from_numpy((h * mu[j] + before * (1 - mu[j])).reshape(rows, width))
        want = empty.placed(want[0].float())[None].double() if bits else want
        assert off(mixed[j], want.numpy()) < CLOSE


@of("square")
def test_squared_relu_stays_in_range() -> None:
    """A row that would leave float16 is divided by a power of two; the others are not touched; NaN is not lost."""
    k = draw(5, 70)
    k[1] *= 400
    k[2, 3] = 3e4
    k[3, 7] = np.nan
    squared, factors = torch.empty(5, 70, dtype=torch.float16), torch.ones(5)
    kernels_gemm.square[(3,)](torch.from_numpy(k), squared, factors, 70, 5, LIMITED=True, ROWS=2, BLOCK=32)
    want = np.square(np.maximum(k.astype(np.float64), 0))
    assert factors[0] == factors[4] == 1
    assert factors[1] > 1
    assert torch.log2(factors).frac().abs().max() == 0
    for row in (0, 1, 2, 4):
        assert off(squared[row].double() * factors[row].double(), want[row]) < 2**-11
    assert torch.isnan(squared[3, 7])
    assert not torch.isnan(squared[3, :7]).any()


@pytest.mark.parametrize("vocabulary", [1, 7, 100])
@of("top_of_block", "choose")
def test_arg_max(vocabulary: int) -> None:
    """The first of equal ones; NaN is larger than all, so that it cannot hide, and an id is always one."""
    logits = np.round(draw(4, vocabulary) * 2)
    logits[3, vocabulary // 2] = np.nan
    blocks = -(-vocabulary // 16)
    tops, places = torch.empty(4, blocks), torch.empty(4, blocks, dtype=torch.int32)
    ids, chosen, count = torch.zeros(4, dtype=torch.int64), torch.zeros(9, 4, dtype=torch.int64), torch.full((4,), 2)
    count = count.int()
    kernels_gemv.top_of_block[(blocks, 4)](torch.from_numpy(logits), tops, places, vocabulary, BLOCK=16)
    kernels_gemv.choose[(4,)](tops, places, ids, chosen, count, blocks, 4, BLOCK=8)
    assert ids.tolist() == chosen[2].tolist() == logits.argmax(1).tolist()
    assert count.tolist() == [3] * 4


def test_wkv_alone_is_judged_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = compare_wkv.row("triton", 8, 33, "cpu")
    assert (right.verdict, len(right.samples or ()), right.device) == ("PASS", compare_wkv.REPEATS, "cpu")
    assert compare_wkv.main(["--kernel", "triton", "--device", "cuda", "--tokens", "8", "--width", "33"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("TRITON_INTERPRET is set, so no kernel is compiled for cuda")
    kernel = compare_wkv.KERNELS["triton"]
    wrong = {"triton": lambda given, device: kernel(given._replace(w=given.w * 2), device)}
    monkeypatch.setattr(compare_wkv, "KERNELS", wrong)
    off = compare_wkv.row("triton", 8, 33, "cpu")
    assert (off.verdict, off.value, not off.samples) == ("FAIL", None, True)


def _no_output(usual: Any, *given: Any) -> None:
    usual(*given)
    if len(given) < 10:  # as it is launched to be timed: nobody looks at wkv itself
        given[8].fill_(torch.nan)


def _no_state(usual: Any, *given: Any) -> None:
    after = given[6].clone()
    usual(*given)
    given[6].copy_(after)


def _state_of_another(usual: Any, *given: Any) -> None:
    usual(*given)
    given[6][:, 1] *= 1.001


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_no_output, "wkv is off by nan"),
        (_no_state, "aa of the state after is off by"),
        (_state_of_another, "bb of the state after is off by 1.0e-03"),
    ],
)
def test_the_runs_that_are_timed_are_judged_and_the_state_they_leave(
    fault: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_wkv, "REPEATS", 2)
    usual = model.scan
    monkeypatch.setattr(model, "scan", lambda *given: fault(usual, *given))
    found = compare_wkv.row("triton", 9, 33, "cpu")
    assert (found.verdict, found.value, found.samples) == ("FAIL", None, None)
    assert words in str(found.reason)


def test_a_kernel_that_fails_while_it_is_timed_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right when it is looked at first, and nothing comes out of the runs after."""
    monkeypatch.setattr(compare_wkv, "REPEATS", 2)
    usual, calls = model.scan, iter(range(100))
    monkeypatch.setattr(model, "scan", lambda *given: usual(*given) if next(calls) == 0 else None)
    found = compare_wkv.row("triton", 9, 33, "cpu")
    assert (found.verdict, found.value, found.samples) == ("FAIL", None, None)
    assert str(found.reason).startswith("a timed run: wkv is off by nan")


@pytest.mark.parametrize("fault", [None, _no_output, _no_state])
def test_the_table_beside_fla_judges_what_it_times(
    fault: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_the_cpu(runs: Any, rounds: int) -> Any:
        triton_wkv.spoil(runs[0]())
        return [7.0] * rounds, [run() for run in runs]

    monkeypatch.setattr(triton_wkv, "replayed", lambda run: run)
    monkeypatch.setattr(triton_wkv, "timed", on_the_cpu)
    usual = model.scan
    if fault is not None:
        monkeypatch.setattr(model, "scan", lambda *given: fault(usual, *given))
    assert triton_wkv._row(9, 33, torch.device("cpu"), 1.5) is (fault is None)
    shown = capsys.readouterr().out.split()
    assert shown[:2] == ["9", "7.0" if fault is None else "nan"]


def test_copies_of_the_inputs_are_more_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    for tokens, copies in ((4096, 3), (512, 14), (1, 32)):
        arrays = np.empty((tokens, 4096), np.float32)
        given = compare_wkv.Inputs(arrays, arrays, arrays[0], arrays[0])
        assert compare_wkv._copies(given, "cuda") == copies
