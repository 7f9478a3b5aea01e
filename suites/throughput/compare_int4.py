"""Decode and prefill of the int4 backend beside rwkv.cpp's Q4_0, interleaved, each in a process of its own.

    RWKV_CPP_LIBRARY=.../librwkv.so python -m suites.throughput.compare_int4 [--model 169m] [--threads 2]

All sessions are loaded at once and measured in turn, every round in another order, by the meters that rows come
from. Printed are medians over rounds, the ratio to rwkv.cpp, and the part of the read bandwidth that a decode step
has used: bytes of weights that it must read, over its time and over the bandwidth measured in the same run.

rwkv.cpp keeps the head, a third of 169M, in fp16, so its step reads more bytes than 4 bits everywhere do. The row at
equal bytes is the one whose bytes are within EQUAL of the rival's: ort_int8_g128_int8act at 169M. ONNX Runtime has no
fp16 head on x86: its CPU MatMul takes float32 only, and a Cast before it is folded into a float32 matrix at loading.

Exit status 1 where a bar of BARS is not met; 3 where something is missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from backends.api import Unavailable, Unsupported
from backends.rwkv_cpp.library import VARIABLE
from harness import open_session
from harness.models import Model, gate_tokens, open_model
from harness.samples import LOOP, Sampling
from harness.session import Opened
from reference.errors import InputError
from reference.schemes import bytes_read_per_token

RIVAL = ("rwkv.cpp", "Q4_0")
DEFAULT = (
    "ort_int4_g32_asym_int8act",
    "ort_int4_g32_asym_att8_int8act",
    "ort_int4_g128_asym_int8act",
    "ort_int4_g128_asym_att8_int8act",
    "ort_int8_g128_int8act",
)

#: Bytes of a step, as a part of the rival's, that count as equal.
EQUAL = 0.1

#: Scheme -> at least so many times the rival's decode, so many times its prefill, this part of the read bandwidth.
#: They are for schemes whose KL divergence is no worse than the rival's (scripts/scheme_error.py).
BARS = {"ort_int4_g32_asym_int8act": (1.4, 1.5, 0.45), "ort_int4_g128_asym_att8_int8act": (1.8, 1.5, 0.55)}

_ONCE = Sampling(repeats=1, warmup=0)
_BUFFER_BYTES = 1 << 28  # per thread; far beyond any last-level cache


@dataclass
class Contender:
    """A loaded session, the bytes a step of it reads, and tokens per second of every round."""

    name: str
    opened: Opened
    step_bytes: int
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if not os.environ.get(VARIABLE):
        print(f"{VARIABLE} names no library; a current librwkv is what this compares with", file=sys.stderr)
        return 3
    try:
        model = open_model(arguments.model)
        with ExitStack() as stack:
            wanted = [RIVAL, *((arguments.backend, scheme) for scheme in arguments.schemes.split(","))]
            contenders = [_contender(stack, model, *one, arguments.threads) for one in wanted]
            bandwidths = _measure(contenders, gate_tokens(model, arguments.prompt), arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (Unavailable, Unsupported) as error:
        print(error, file=sys.stderr)
        return 3
    return _print(contenders, statistics.median(bandwidths), arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_int4", description="The int4 backend beside rwkv.cpp.")
    parser.add_argument("--model", default="169m", help="preset, 'tiny', or a checkpoint's path (default 169m)")
    parser.add_argument("--backend", default="onnx", help="name or .py file (default onnx)")
    parser.add_argument("--schemes", default=",".join(DEFAULT), help=f"comma list (default {','.join(DEFAULT)})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is timed (default 9, at least 5)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (default 32)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default 128)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 5 or min(arguments.threads, arguments.tokens, arguments.prompt) < 1:
        parser.error("a median needs --rounds of at least 5; --threads, --tokens and --prompt are at least 1")
    return arguments


def _contender(stack: ExitStack, model: Model, backend: str, scheme: str, threads: int) -> Contender:
    opened = stack.enter_context(open_session(backend, model, scheme, threads=threads, isolate=True))
    source = model.weights["emb.weight"].stored
    return Contender(f"{backend} {scheme}", opened, bytes_read_per_token(model.config, scheme, source))


def _measure(contenders: Sequence[Contender], prompt: Sequence[int], arguments: argparse.Namespace) -> list[float]:
    """Fill the contenders in, the first round left out; read bandwidth of every round, bytes per second."""
    bandwidths = []
    read = _reader(arguments.threads)
    for number in range(arguments.rounds + 1):
        turn = number % len(contenders)
        bandwidths.append(read())
        for one in (*contenders[turn:], *contenders[:turn]):
            meter = one.opened.meter
            decode = meter.decode(prompt[:16], arguments.tokens, _ONCE, lambda text: None, driver=LOOP)
            prefill = meter.prefill(prompt, _ONCE, lambda text: None)
            one.decode.append(1e9 / statistics.median(decode.steps[0]))
            one.prefill.append(1e9 * prefill.tokens / prefill.ns[0])
    for one in contenders:
        del one.decode[0], one.prefill[0]
    return bandwidths[1:]


def _reader(threads: int) -> Callable[[], float]:
    """What reads a large array with each of ``threads`` threads and tells bytes per second, best of three."""
    arrays = [np.ones(_BUFFER_BYTES // 4, dtype=np.float32) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def read() -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter_ns()
            list(pool.map(np.max, arrays))  # lets go of the interpreter's lock
            times.append(time.perf_counter_ns() - start)
        return threads * _BUFFER_BYTES / (min(times) / 1e9)

    return read


def _print(contenders: Sequence[Contender], bandwidth: float, arguments: argparse.Namespace) -> int:
    """The table; whether a bar is missed."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{arguments.model}, {arguments.threads} threads, {arguments.rounds} rounds, prompt {arguments.prompt}, "
        f"{arguments.tokens} steps; read bandwidth {bandwidth / 1e9:.1f} GB/s; load average {load}"
    )
    print("tok/s: median over rounds (min-max); ratios to the first")
    rival, missed = contenders[0], 0
    for one in contenders:
        decode, prefill = statistics.median(one.decode), statistics.median(one.prefill)
        ratios = decode / statistics.median(rival.decode), prefill / statistics.median(rival.prefill)
        fraction = one.step_bytes * decode / bandwidth
        bars = BARS.get(one.name.split()[-1], (0.0, 0.0, 0.0))
        met = all(found >= bar for found, bar in zip((*ratios, fraction), bars, strict=True))
        missed |= int(not met)
        size = one.step_bytes / rival.step_bytes
        equal = " (equal bytes)" if one is not rival and abs(size - 1) <= EQUAL else ""
        print(
            f"{one.name} ({one.opened.version}): decode {_spread(one.decode)}, {ratios[0]:.2f}x; "
            f"prefill {_spread(one.prefill)}, {ratios[1]:.2f}x; {one.step_bytes / 1e6:.0f} MB a step, "
            f"{size:.2f}x{equal}, {fraction:.0%} of the bandwidth"
            + ("" if met else f"; NOT met: {bars[0]}x, {bars[1]}x, {bars[2]:.0%}")
        )
    return missed


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


if __name__ == "__main__":
    sys.exit(main())
