"""The WKV recurrence alone, over a prompt: this project's Triton kernel or ``fla.ops.rwkv4``; prints one row a length.

    python -m suites.throughput.compare_wkv --kernel triton --device cuda --tokens 512,4096 --width 4096
    python -m suites.throughput.compare_wkv --kernel fla --device cuda --tokens 512,4096 --width 4096

Same inputs, fp16 keys and values, batch 1. What the timed runs themselves have left, the state after included, is held
against the reference in float64, with the bound of its own arithmetic; a wrong one has no speed. On a GPU times are
those of replayed CUDA graphs, taken by events, which leaves out what Python needs to launch; copies of the inputs take
turns, more than the cache holds. A row's model is ``wkv-<width>``, its prefill the tokens of one layer's recurrence a
second. Triton's includes the receptance, which fla's has not. Exit status 1 for a wrong result, 3 where the kernel is
not to be had.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from backends.api import Unavailable, Unsupported
from backends.triton_cuda import machine
from harness.card import card_of, recorded
from harness.cuda_order import settle
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
from suites.throughput.triton_wkv import replayed, spoil, timed

REPEATS, _WARMUP = 20, 3

#: The most copies of the inputs that take turns.
_MOST_COPIES = 32

#: Runs once over the inputs: what it makes of every token, and aa, bb, pp after the last, both on the device.
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


class Truth(NamedTuple):
    """wkv ``(T, C)`` and aa, bb, pp after it ``(3, C)`` in float64; bounds of their errors, RMS in units of theirs."""

    y: np.ndarray
    state: np.ndarray
    bound: float
    state_bounds: np.ndarray


def truth_of(given: Inputs, stored: str = "fp32") -> Truth:
    """K times what is unavoidable: a rounding to fp16 of wkv, float32 exponents of the state, float32 sums of both.

    A state that is stored as ``fp16`` is rounded to that besides.
    """
    past = WkvState(*np.array([[0.0], [0.0], [-1e30]]) * np.ones(given.k.shape[1]))
    wide = [x.astype(np.float64) for x in given]
    y, state = wkv(wide[0], wide[1], wide[2], wide[3], past, Exact(np.float64))
    single, after = wkv(*given, WkvState(*(x.astype(np.float32) for x in past)), Exact(np.float32))
    exponents = 1 + 2 * float(np.abs(given.k).max())  # exp of a difference of two keys, each rounded
    rounding = UNIT_ROUNDOFF["fp32"] * exponents + (UNIT_ROUNDOFF["fp16"] if stored == "fp16" else 0.0)
    bounds = [rounding + off(mine, exact) for mine, exact in zip(after, state, strict=True)]
    return Truth(y, np.stack(state), K * (UNIT_ROUNDOFF["fp16"] + off(single, y)), K * np.array(bounds))


def off(got: np.ndarray, exact: np.ndarray) -> float:
    """RMS of the error in units of truth's."""
    return float(np.sqrt(np.mean((got - exact) ** 2)) / np.sqrt(np.mean(exact**2)))


def judged(left: tuple[Any, Any], truth: Truth, scale: float) -> tuple[float, str | None]:
    """Error of wkv, ``scale`` times what a run has left, and in words what of it is wrong."""
    y, state = (np.asarray(x.float().cpu().numpy(), np.float64).reshape(-1, truth.y.shape[1]) for x in left)
    error = off(scale * y, truth.y)
    if not error <= truth.bound:
        return error, f"wkv is off by {error:.1e}, bound {truth.bound:.1e}; it has no speed"
    for name, got, exact, bound in zip(("aa", "bb", "pp"), state, truth.state, truth.state_bounds, strict=True):
        if not off(got, exact) <= bound:
            return error, f"{name} of the state after is off by {off(got, exact):.1e}, bound {bound:.1e}; no speed"
    return error, None


def triton_kernel(given: Inputs, device: Any) -> Kernel:
    """This project's, in the interpreter where that is on."""
    import torch

    from backends.triton_cuda.model import scan

    tokens, width = given.k.shape
    k, v = (torch.from_numpy(x).to(device, torch.float16) for x in given[:2])
    w, u = (torch.from_numpy(x).to(device) for x in given[2:])
    past = torch.zeros(1, 3, width, device=device)
    past[:, 2] = -1e30
    after, out, r = torch.empty_like(past), torch.empty_like(k), torch.zeros_like(k)

    def run() -> tuple[Any, Any]:
        scan(k, v, r, w, u, past, after, tokens, out)
        return out, after

    return run


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
#: What a kernel makes, times this, is wkv: ours is gated by the sigmoid of a receptance of 0.
_SCALES = {"triton": 2.0, "fla": 1.0}
#: What the state after is stored as; fla takes the type of the keys.
_STATES = {"triton": "fp32", "fla": "fp16"}
_PACKAGES = {"triton": "triton", "fla": "fla-core"}


def opened(kernel: str, device: str) -> Any:
    """``torch.device`` that the kernel runs on. Raises Unavailable, Unsupported."""
    if kernel == "fla" and not machine.installed(_PACKAGES[kernel]):
        raise Unavailable("fla is not installed", "pip install 'rwkv-bench[fla]'")
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
    work, truth = KERNELS[kernel](given, where), truth_of(given, _STATES[kernel])
    error, wrong = judged(work(), truth, _SCALES[kernel])
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
        bound=truth.bound,
        statistic="rms",
        reason="not timed",
    )
    if wrong is not None:
        return replace(base, verdict="FAIL", reason=wrong)
    if where.type == "cuda":
        copies = [work, *(KERNELS[kernel](given, where) for _ in range(_copies(given, where) - 1))]
        taken, left = timed([replayed(copy) for copy in copies], _WARMUP + REPEATS)
        samples = tuple(max(1, round(1000 * each)) for each in taken[_WARMUP:])
    else:
        samples, left = _by_the_clock(work)
    for result in left:
        error, wrong = judged(result, truth, _SCALES[kernel])
        base = replace(base, error=max(base.error or 0.0, error))
        if wrong is not None:
            return replace(base, verdict="FAIL", error=error, reason=f"a timed run: {wrong}")
    return derived(replace(base, samples=samples, verdict="PASS", reason=None, stopped="repeats reached"))


def _copies(given: Inputs, where: Any) -> int:
    """How many of fp16 keys and values are twice the device's last-level cache, and one more."""
    import torch

    cache = getattr(torch.cuda.get_device_properties(where), "L2_cache_size", 64 << 20)
    return min(_MOST_COPIES, 1 + -(-2 * cache // (2 * given.k.size + 2 * given.v.size)))


def _by_the_clock(work: Kernel) -> tuple[tuple[int, ...], list[tuple[Any, Any]]]:
    """Nanoseconds on a device that works while it is called, and what the last run has left."""
    samples, left = [], work()
    spoil(left)
    for _ in range(_WARMUP + REPEATS):
        start = time.perf_counter_ns()
        left = work()
        samples.append(time.perf_counter_ns() - start)
    return tuple(samples[_WARMUP:]), [left]


def main(words: Sequence[str]) -> int:
    """The exit status; rows go to stdout."""
    parser = argparse.ArgumentParser(prog="python -m suites.throughput.compare_wkv", description=__doc__)
    parser.add_argument("--kernel", choices=tuple(KERNELS), required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="512,4096", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--width", default=4096, type=int)
    arguments = parser.parse_args(words)
    settle()
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
