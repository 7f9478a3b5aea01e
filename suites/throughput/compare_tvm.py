"""Compiled TVM libraries beside rwkv.cpp: decode, prefill and compilation, against the bars they are held to.

    RWKV_CPP_LIBRARY=.../librwkv.so python -m suites.throughput.compare_tvm [--model 169m] [--threads 2]

All sessions are loaded at once, each in a process of its own, and measured in turn, every round in another order, by
the meters that rows come from. Printed are medians over rounds, decode over that of the rival's scheme, prefill over
a library's own decode and over the rival's prefill, and the bytes of weights that a step reads, per second. Each
library is compiled anew before, from a file and params folder included, and timed.

Exit status 1 where a bar is not met; 3 where something is missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from backends.api import Unavailable, Unsupported
from backends.rwkv_cpp.library import VARIABLE
from harness import command_compile, open_session
from harness.models import Model, gate_tokens, open_model
from harness.options import Parser
from harness.samples import LOOP, Sampling
from harness.session import Opened
from reference import save_checkpoint
from reference.errors import InputError
from reference.schemes import bytes_read_per_token

#: Scheme -> the rival's scheme, and so many times its decode at least.
BARS = {"q0f32": ("FP32", 1.0), "q4f16_1": ("Q4_0", 1.2), "q4f16_0": ("Q4_0", 1.4)}

#: Prefill over the library's own decode at least, and seconds of a compilation at most.
PREFILL, COMPILE = 5.0, 20.0

_ONCE = Sampling(repeats=1, warmup=0)


@dataclass
class Contender:
    """A loaded session, and tokens per second of every round."""

    name: str
    opened: Opened
    step_bytes: int
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    @property
    def rates(self) -> tuple[float, float]:
        """Medians of decode and prefill."""
        return statistics.median(self.decode), statistics.median(self.prefill)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if not os.environ.get(VARIABLE):
        print(f"{VARIABLE} names no library; a current librwkv is what this compares with", file=sys.stderr)
        return 3
    schemes = arguments.schemes.split(",")
    try:
        model = open_model(arguments.model)
        seconds = _compile_seconds(model, schemes)
        rivals = dict.fromkeys(BARS[scheme][0] for scheme in schemes)
        with ExitStack() as stack:
            ours = {scheme: _contender(stack, model, "tvm", scheme, arguments.threads) for scheme in schemes}
            theirs = {scheme: _contender(stack, model, "rwkv.cpp", scheme, arguments.threads) for scheme in rivals}
            _measure([*theirs.values(), *ours.values()], gate_tokens(model, arguments.prompt), arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (Unavailable, Unsupported) as error:
        print(error, file=sys.stderr)
        return 3
    return _print(ours, theirs, seconds, arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_tvm", description="Compiled TVM libraries beside rwkv.cpp.")
    parser.add_argument("--model", default="169m", help="preset, 'tiny', or a checkpoint's path (default 169m)")
    parser.add_argument("--schemes", default=",".join(BARS), help=f"comma list of {', '.join(BARS)} (default all)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is timed (default 9, at least 5)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (default 32)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default 128)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 5 or min(arguments.threads, arguments.tokens, arguments.prompt) < 1:
        parser.error("a median needs --rounds of at least 5; --threads, --tokens and --prompt are at least 1")
    unknown = [scheme for scheme in arguments.schemes.split(",") if scheme not in BARS]
    if unknown:
        parser.error(f"no bar for {', '.join(unknown)}; there are bars for {', '.join(BARS)}")
    return arguments


def _compile_seconds(model: Model, schemes: Sequence[str]) -> dict[str, float]:
    """Seconds of ``rwkv-bench compile --no-cache`` of a checkpoint's file, interpreter and params folder included.

    A file, since it takes longer to make up a preset's weights than to compile.
    """
    parser = Parser(prog="rwkv-bench compile")
    command_compile.options(parser)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.safetensors")
        save_checkpoint(model.weights, file, "safetensors")
        for scheme in schemes:
            asked = parser.parse_args([file, str(Path(folder) / scheme), "--quant", scheme, "--no-cache"])
            start = time.perf_counter_ns()
            command_compile.run(asked, lambda text: None)
            found[scheme] = (time.perf_counter_ns() - start) / 1e9
    return found


def _contender(stack: ExitStack, model: Model, backend: str, scheme: str, threads: int) -> Contender:
    opened = stack.enter_context(open_session(backend, model, scheme, threads=threads, isolate=True))
    source = model.weights["emb.weight"].stored
    return Contender(f"{backend} {scheme}", opened, bytes_read_per_token(model.config, scheme, source))


def _measure(contenders: Sequence[Contender], prompt: Sequence[int], arguments: argparse.Namespace) -> None:
    """Fill the contenders in, the first round left out."""
    for number in range(arguments.rounds + 1):
        turn = number % len(contenders)
        for one in (*contenders[turn:], *contenders[:turn]):
            meter = one.opened.meter
            decode = meter.decode(prompt[:16], arguments.tokens, _ONCE, lambda text: None, driver=LOOP)
            prefill = meter.prefill(prompt, _ONCE, lambda text: None)
            one.decode.append(1e9 / statistics.median(decode.steps[0]))
            one.prefill.append(1e9 * prefill.tokens / prefill.ns[0])
    for one in contenders:
        del one.decode[0], one.prefill[0]


def _print(
    ours: dict[str, Contender], theirs: dict[str, Contender], seconds: dict[str, float], arguments: argparse.Namespace
) -> int:
    """The table; whether a bar is missed."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{arguments.model}, {arguments.threads} threads, {arguments.rounds} rounds, prompt {arguments.prompt}, "
        f"{arguments.tokens} steps; load average {load}"
    )
    print("tok/s: median over rounds (min-max)")
    for one in theirs.values():
        print(_line(one))
    missed = 0
    for scheme, one in ours.items():
        against, bar = BARS[scheme]
        rival = theirs[against].rates
        decode, prefill = one.rates
        found = (decode / rival[0], prefill / decode, seconds[scheme])
        met = (found[0] >= bar, found[1] >= PREFILL, found[2] <= COMPILE)
        said = (
            f"decode {found[0]:.2f}x {against} (bar {bar}x)",
            f"prefill {found[1]:.1f}x its decode (bar {PREFILL:.0f}x)",
            f"compiled in {found[2]:.1f} s (bar {COMPILE:.0f} s)",
        )
        print(_line(one))
        print(f"  prefill {prefill / rival[1]:.2f}x {against}")
        for text, good in zip(said, met, strict=True):
            print(f"  {text}" + ("" if good else ": NOT met"))
            missed |= int(not good)
    return missed


def _line(one: Contender) -> str:
    return (
        f"{one.name} ({one.opened.version}): decode {_spread(one.decode)}, prefill {_spread(one.prefill)}; "
        f"{one.step_bytes / 1e6:.0f} MB a step, {one.step_bytes * one.rates[0] / 1e9:.1f} GB/s"
    )


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


if __name__ == "__main__":
    sys.exit(main())
