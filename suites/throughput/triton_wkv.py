"""The WKV kernels over a prompt beside ``fla.ops.rwkv4``, on one GPU: median times, their ratio, both against float64.

    python -m suites.throughput.triton_wkv [--channels 4096] [--lengths 512 4096] [--device cuda]

Same float32 inputs. What the timed runs themselves have left, state included, is held against the recurrence in
float64 (this project's reference); a kernel that is wrong gets no time. Times are those of replayed CUDA graphs where
the kernel can be captured, taken by events. fla is optional: without it our times stand alone. Ours includes r * wkv,
which fla leaves to the caller.

Exit status: 0; 1 where a result is wrong or the ratio is under --bar; 2 for wrong usage; 3 without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from backends.api import Unavailable, Unsupported
from backends.triton_cuda import machine
from harness.cuda_order import settle
from reference.forward import PP_START, WkvState, wkv
from reference.numerics import Exact

#: Relative error that float32 exponents allow with keys of some units.
WRONG = 1e-4
_ROUNDS, _WARMUP = 50, 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; see the module."""
    asked = _parsed(arguments)
    settle()
    try:
        machine.check()
        device = machine.open_device(asked.device)
        if device.type != "cuda":
            raise Unavailable("times are those of a GPU", "unset TRITON_INTERPRET")
    except (Unavailable, Unsupported) as error:
        print(error, file=sys.stderr)
        return 3
    import torch

    print(f"{torch.cuda.get_device_name(device)}, {asked.channels} channels; fla {_fla_version()}")
    print(f"{'tokens':>7}{'ours us':>10}{'fla us':>10}{'ratio':>8}{'our error':>11}{'fla error':>11}")
    failed = False
    with torch.cuda.device(device), torch.inference_mode():
        for length in asked.lengths:
            failed |= not _row(length, asked.channels, device, asked.bar)
    return int(failed)


def _row(length: int, channels: int, device: Any, bar: float) -> bool:
    """Print one length; whether it is right, and fast enough where there is something to compare with."""
    import torch

    random = np.random.default_rng(length)
    k, v, r = (random.standard_normal((length, channels)).astype(np.float32) for _ in range(3))
    w, u = np.exp(random.uniform(-6, 2, channels)).astype(np.float32), random.standard_normal(channels)
    zeros = np.zeros(channels)
    start = WkvState(zeros, zeros, np.full(channels, PP_START))
    k64, v64, w64 = (x.astype(np.float64) for x in (k, v, w))
    want, after = wkv(k64, v64, w64, u, start, Exact(np.float64))
    kt, vt, rt, wt, ut = (torch.from_numpy(x.astype(np.float32)).to(device) for x in (k, v, r, w, u))
    gated = want / (1 + np.exp(-r.astype(np.float64)))
    our_time, our_error = _judged(_ours(kt, vt, rt, wt, ut), (gated, *after))
    fla_time, fla_error = float("nan"), float("nan")
    if find_spec("fla"):
        fla_time, fla_error = _judged(_fla(kt, vt, wt, ut), (want, *after))
    ratio = fla_time / our_time
    print(f"{length:>7}{our_time:>10.1f}{fla_time:>10.1f}{ratio:>8.2f}{our_error:>11.1e}{fla_error:>11.1e}")
    return our_error <= WRONG and (not find_spec("fla") or ratio >= bar)


def _judged(run: Callable[[], Any], want: Sequence[np.ndarray]) -> tuple[float, float]:
    """Median microseconds of a kernel, NaN for a wrong one, and the largest relative error of what its runs left.

    ``want``: what comes out ``(T, C)``, then aa, bb, pp ``(C,)``.
    """
    times, (left,) = timed([replayed(run)], _ROUNDS)
    out, state = left
    pairs = list(zip((out, *state.reshape(3, -1)), want, strict=True))
    error = float(np.max([_off(got, exact) for got, exact in pairs]))  # NaN where any is
    return (statistics.median(times) if error <= WRONG else float("nan")), error


def _ours(k: Any, v: Any, r: Any, w: Any, u: Any) -> Callable[[], Any]:
    """The kernels as the model launches them, into buffers of their own: r * wkv, and the state after."""
    import torch

    from backends.triton_cuda.model import scan

    past = torch.zeros(1, 3, k.shape[1], device=k.device)
    past[:, 2] = PP_START
    after, out = torch.empty_like(past), torch.empty_like(k)

    def run() -> Any:
        scan(k, v, r, w, u, past, after, len(k), out)
        return out, after

    return run


def _fla(k: Any, v: Any, w: Any, u: Any) -> Callable[[], Any]:
    """``fused_recurrent_rwkv4``: its decay is a logarithm, as in checkpoints, its state ``(batch, 3, 1, C)``."""
    import torch
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    state = torch.zeros(1, 3, 1, k.shape[1], device=k.device)
    state[:, 2] = PP_START
    return lambda: fused_recurrent_rwkv4(w.log(), u, k[None], v[None], state)


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as a graph on the current device where it can be captured, warmed up; gives the same tensors."""
    import torch

    for _ in range(_WARMUP):
        run()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            left = run()
    except RuntimeError:  # somebody else's operator may allocate or synchronise
        torch.cuda.synchronize()
        return run

    def replay() -> Any:
        graph.replay()
        return left

    return replay


def timed(runs: Sequence[Callable[[], Any]], rounds: int) -> tuple[list[float], list[Any]]:
    """Microseconds by events on the current device, ``runs`` in turn; and the tensors that each has left last.

    They are filled with NaN before, so that nothing is left of runs that were not timed.
    """
    import torch

    runs = runs[:rounds]
    for run in runs:
        spoil(run())
    times: list[float] = []
    left: list[Any] = [None] * len(runs)
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        left[i % len(runs)] = runs[i % len(runs)]()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return times, left


def spoil(left: Sequence[Any]) -> None:
    """NaN into the tensors that a run has left."""
    for tensor in left:
        tensor.fill_(float("nan"))


def _off(got: Any, want: np.ndarray) -> float:
    found = got.reshape(want.shape).double().cpu().numpy()
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def _fla_version() -> str:
    return machine.installed("fla-core") or "is not installed"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m suites.throughput.triton_wkv", description=__doc__)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bar", type=float, default=1.5, help="least ratio of fla's time to ours (default: 1.5)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
