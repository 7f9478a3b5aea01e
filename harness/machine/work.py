"""The probe's work, in the process that runs it: read memory, multiply matrices, tell the best rates.

    python -m harness.machine.work THREADS [CPUS]      the processor; one JSON object on stdout

Best of many short runs, because what disturbs a run only ever slows it. Torch is used where it is installed: on a
processor its oneDNN multiplies bf16 and, on some, fp16; a graphics device is reached through nothing else here.

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np

#: Bytes that are read, at least, and how many times the last-level cache.
READ_BYTES, CACHES = 256 << 20, 4
DEVICE_READ_BYTES = 1 << 30

#: A type that would need longer than this for one product of a size is told by the smaller size before it.
LONG_SECONDS = 0.12
SECONDS = 0.6

SIZES = (256, 512, 1024, 2048)
DEVICE_SIZES = (1024, 4096, 8192)
TYPES = ("fp32", "fp16", "bf16", "int8")


def measure_cpu(threads: int, last_level_bytes: int = 0) -> dict[str, Any]:
    """``read_bytes_per_s``, ``flops`` by type, and ``versions`` of what computed, with that many threads."""
    flops = {"fp32": best_rate(_numpy_product, SIZES)}
    versions = {"numpy": np.__version__}
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        versions["torch"] = torch.__version__
        for kind, rate in _torch_rates("cpu", SIZES).items():
            flops[kind] = max(rate, flops.get(kind, 0.0))
    return {
        "read_bytes_per_s": read_rate(threads, max(READ_BYTES, CACHES * last_level_bytes)),
        "flops": flops,
        "last_level_bytes": last_level_bytes or None,
        "versions": versions,
    }


def measure_device(device: str) -> dict[str, Any]:
    """The same of a graphics device, through torch. Raises ImportError where this interpreter has none."""
    import torch

    size, cache = DEVICE_READ_BYTES, None
    if device.startswith("cuda"):
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    seconds = _read_seconds(device, size)
    flops = _torch_rates(device, DEVICE_SIZES)
    return {
        "read_bytes_per_s": size / seconds,
        "flops": flops,
        "last_level_bytes": cache,
        "versions": {"torch": torch.__version__},
    }


def _read_seconds(device: str, size: int) -> float:
    """Least seconds in which the device has added up ``size`` bytes."""
    import torch

    big, wait = torch.ones(size // 4, device=device), _waiting(device)

    def read() -> None:
        big.sum()
        wait()

    return fastest(read, SECONDS)


def read_rate(threads: int, total: int) -> float:
    """Bytes per second of ``threads`` threads that each read their part of ``total`` bytes again and again."""
    parts = [np.ones(max(1, total // threads // 4), dtype=np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = fastest(lambda: list(pool.map(np.max, parts)), SECONDS)  # numpy lets go of the interpreter's lock
    return sum(part.nbytes for part in parts) / seconds


def best_rate(product: Callable[[int], Callable[[], object]], sizes: tuple[int, ...]) -> float:
    """Highest operations per second of a square product over ``sizes``; ends where one product takes too long."""
    best = 0.0
    for n in sizes:
        work = product(n)
        once = fastest(work, 0)
        best = max(best, 2.0 * n**3 / once)
        if once > LONG_SECONDS:
            break
        best = max(best, 2.0 * n**3 / fastest(work, SECONDS / len(sizes)))
    return best


def fastest(work: Callable[[], object], seconds: float) -> float:
    """Least seconds that ``work`` has taken, over at least three runs and for at least that long."""
    work()
    best, start, runs = float("inf"), time.perf_counter_ns(), 0
    while runs < 3 or time.perf_counter_ns() - start < seconds * 1e9:
        began = time.perf_counter_ns()
        work()
        best = min(best, max(1, time.perf_counter_ns() - began) / 1e9)
        runs += 1
        if best > 1:  # a type that is emulated
            break
    return best


# Random values: equal ones switch few transistors, and a device that its power limits multiplies them faster.


def _numpy_product(n: int) -> Callable[[], object]:
    a = np.random.default_rng(n).standard_normal((n, n), np.float32)
    out = np.empty_like(a)
    return lambda: np.matmul(a, a, out=out)


def _torch_rates(device: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """Type -> rate, of those types that torch multiplies on the device."""
    import torch

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 is another type
    rates = {}
    try:
        with torch.inference_mode():
            for name in TYPES:
                try:
                    rates[name] = best_rate(_torch_product(device, kinds[name]), sizes)
                except (RuntimeError, TypeError, AttributeError):  # the device has not that type, or no memory for it
                    continue
    finally:
        torch.set_float32_matmul_precision(kept)
    return rates


def _torch_product(device: str, kind: Any) -> Callable[[int], Callable[[], object]]:
    import torch

    wait = _waiting(device)
    multiply = torch._int_mm if kind == torch.int8 else torch.mm

    def product(n: int) -> Callable[[], object]:
        if kind == torch.int8:
            a = torch.randint(-127, 128, (n, n), dtype=kind, device=device)
        else:
            a = torch.randn(n, n, device=device).to(kind)

        def work() -> None:
            multiply(a, a)
            wait()

        return work

    return product


def _waiting(device: str) -> Callable[[], None]:
    """What waits until a device has finished."""
    import torch

    if device.startswith("cuda"):
        return lambda: torch.cuda.synchronize(device)
    if device == "mps":
        return torch.mps.synchronize
    return lambda: None


def main(threads: str, last_level_bytes: str, cpus: str = "") -> None:
    """Measure the processor, bound to ``cpus`` if any are named; print what was found."""
    if cpus:
        from harness.isolation.placement import parse, pin

        pin(parse(cpus))
    sys.stdout.write(json.dumps(measure_cpu(int(threads), int(last_level_bytes))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
