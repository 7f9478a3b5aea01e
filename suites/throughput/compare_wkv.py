"""The WKV recurrence alone, over a prompt: this project's Triton kernel or ``fla.ops.rwkv4``; prints one row a length.

    python -m suites.throughput.compare_wkv --kernel triton --device cuda --tokens 512,4096 --width 4096
    python -m suites.throughput.compare_wkv --kernel fla --device cuda --tokens 512,4096 --width 4096

Same inputs, fp16 keys and values, batch 1. Each result is held against the reference in float64, with the bound of its
own arithmetic; a wrong one has no speed. On a GPU times are those of replayed CUDA graphs, taken by events, which
leaves out what Python needs to launch; copies of the inputs take turns, more than the cache holds. A row's model is
``wkv-<width>``, its prefill the tokens of one layer's recurrence a second. Triton's includes the receptance, which
fla's has not. Exit status 1 for a wrong result, 3 where the kernel is not to be had.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from backends.api import Unavailable, Unsupported
from backends.triton_cuda import machine
from harness.card import card_of, recorded
from harness.gpu_check.ablate import place
from harness.gpu_check.record import now
from harness.hardware import describe
from harness.rows import Row, line
from harness.run import new_run_id
from harness.samples import Workload
from harness.stats import derived
from harness.status import FAILED, NOT_AVAILABLE, PASSED
from harness.tolerance import K
from reference.forward import WkvState, wkv
from reference.numerics import ROUND, UNIT_ROUNDOFF, Exact
from suites.throughput.triton_wkv import microseconds, replayed

REPEATS, _WARMUP = 20, 3

#: The most copies of the inputs that take turns.
_MOST_COPIES = 32

#: Runs once over the inputs: wkv of every token, and aa, bb, pp after the last, both on the device.
Kernel = Callable[[], tuple[Any, Any]]


class Inputs(NamedTuple):
    """Keys and values that are fp16 numbers ``(T, C)``, decay and bonus ``(C,)``, all as float32."""

    k: np.ndarray
    v: np.ndarray
    w: np.ndarray
    u: np.ndarray


def inputs(tokens: int, width: int) -> Inputs:
    """As large as in a trained model: keys of a few units, decays from nearly one step to nearly none."""
    rng = np.random.default_rng(tokens)
    k, v = (ROUND["fp16"](size * rng.standard_normal((tokens, width)).astype(np.float32)) for size in (2, 1))
    decay, bonus = np.exp(rng.uniform(-6, 1, width)), rng.standard_normal(width)
    return Inputs(k, v, decay.astype(np.float32), bonus.astype(np.float32))


def off(y: np.ndarray, given: Inputs) -> tuple[float, float]:
    """Error of a result and its bound, both RMS in units of truth's: K roundings to fp16, and the float32 sums."""
    past = WkvState(*np.array([[0.0], [0.0], [-1e30]]) * np.ones(given.k.shape[1]))
    wide = [x.astype(np.float64) for x in given]
    truth, _ = wkv(wide[0], wide[1], wide[2], wide[3], past, Exact(np.float64))
    single, _ = wkv(*given, WkvState(*(x.astype(np.float32) for x in past)), Exact(np.float32))
    unit = float(np.sqrt(np.mean(truth**2)))
    unavoidable = UNIT_ROUNDOFF["fp16"] + float(np.sqrt(np.mean((single - truth) ** 2))) / unit
    return float(np.sqrt(np.mean((y - truth) ** 2))) / unit, K * unavoidable


def triton_kernel(given: Inputs, device: Any) -> Kernel:
    """This project's, in the interpreter where that is on."""
    import torch

    from backends.triton_cuda.model import scan

    tokens, width = given.k.shape
    k, v = (torch.from_numpy(x).to(device, torch.float16) for x in given[:2])
    w, u = (torch.from_numpy(x).to(device) for x in given[2:])
    past = torch.zeros(1, 3, width, device=device)
    past[:, 2] = -1e30
    after, out, raw = torch.empty_like(past), torch.empty_like(k), torch.empty_like(k)
    r = torch.zeros_like(k)

    def run() -> tuple[Any, Any]:
        scan(k, v, r, w, u, past, after, tokens, out)
        return out, after

    scan(k, v, r, w, u, past, after, tokens, out, raw)  # wkv itself, which the timed runs do not write
    checked = raw.clone()
    return lambda: (checked, run()[1])


def fla_kernel(given: Inputs, device: Any) -> Kernel:
    """Of flash-linear-attention, forward only."""
    import torch
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    k, v = (torch.from_numpy(x).to(device, torch.float16)[None] for x in given[:2])
    w, u = torch.from_numpy(np.log(given.w)).to(device), torch.from_numpy(given.u).to(device)
    past = torch.zeros(1, 3, 1, len(given.w), device=device)
    past[:, 2] = -1e30

    def run() -> tuple[Any, Any]:
        with torch.no_grad():
            y, after = fused_recurrent_rwkv4(w, u, k, v, past)
        return y[0], after

    return run


KERNELS = {"triton": triton_kernel, "fla": fla_kernel}
_PACKAGES = {"triton": "triton", "fla": "flash-linear-attention"}


def opened(kernel: str, device: str) -> Any:
    """``torch.device`` that the kernel runs on. Raises Unavailable, Unsupported."""
    if kernel == "fla" and find_spec("fla") is None:
        raise Unavailable("flash-linear-attention is not installed", "pip install flash-linear-attention")
    if kernel == "fla" and not device.startswith("cuda"):
        raise Unavailable(f"fla.ops.rwkv4 does not run on {device}", "it needs a CUDA device")
    machine.check()
    return machine.open_device(device)


def row(kernel: str, tokens: int, width: int, device: str) -> Row:
    """One length, judged and timed. Raises Unavailable, Unsupported."""
    where = opened(kernel, device)
    import torch

    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
        return _row(kernel, tokens, width, where, device)


def _row(kernel: str, tokens: int, width: int, where: Any, device: str) -> Row:
    hardware, given = place(device), inputs(tokens, width)
    work = KERNELS[kernel](given, where)
    error, bound = off(np.asarray(work()[0].float().cpu().numpy()), given)
    base = Row(
        kind="measured",
        run=new_run_id(),
        time=now(),
        hardware=hardware.name,
        hardware_detail=recorded(describe(hardware), card_of(device)),
        backend=kernel,
        backend_version=version(_PACKAGES[kernel]),
        model=f"wkv-{width}",
        synthetic=True,
        scheme="fp16",
        scheme_class="f16",
        device=hardware.device,
        workload=Workload(tokens, 0),
        metric="prefill",
        error=error,
        bound=bound,
        statistic="rms",
        reason="not timed",
    )
    if not error <= bound:
        return replace(base, verdict="FAIL", reason=f"wkv is off by {error:.1e}, bound {bound:.1e}; not timed")
    if where.type == "cuda":
        copies = [work, *(KERNELS[kernel](given, where) for _ in range(_copies(given, where) - 1))]
        taken = microseconds([replayed(copy) for copy in copies], _WARMUP + REPEATS)[_WARMUP:]
        samples = tuple(max(1, round(1000 * each)) for each in taken)
    else:
        samples = _by_the_clock(work)
    return derived(replace(base, samples=samples, verdict="PASS", reason=None, stopped="repeats reached"))


def _copies(given: Inputs, where: Any) -> int:
    """How many of fp16 keys and values are twice the device's last-level cache, and one more."""
    import torch

    cache = getattr(torch.cuda.get_device_properties(where), "L2_cache_size", 64 << 20)
    return min(_MOST_COPIES, 1 + -(-2 * cache // (2 * given.k.size + 2 * given.v.size)))


def _by_the_clock(work: Kernel) -> tuple[int, ...]:
    """Nanoseconds on a device that works while it is called."""
    samples = []
    for _ in range(_WARMUP + REPEATS):
        start = time.perf_counter_ns()
        work()
        samples.append(time.perf_counter_ns() - start)
    return tuple(samples[_WARMUP:])


def main(words: Sequence[str]) -> int:
    """The exit status; rows go to stdout."""
    parser = argparse.ArgumentParser(prog="python -m suites.throughput.compare_wkv", description=__doc__)
    parser.add_argument("--kernel", choices=tuple(KERNELS), required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="512,4096", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--width", default=4096, type=int)
    arguments = parser.parse_args(words)
    code = PASSED
    try:
        for tokens in arguments.tokens:
            found = row(arguments.kernel, tokens, arguments.width, arguments.device)
            sys.stdout.write(line(found))
            code = FAILED if found.verdict == "FAIL" else code
    except (Unavailable, Unsupported) as error:
        sys.stderr.write(f"{error}\n")
        return NOT_AVAILABLE
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
