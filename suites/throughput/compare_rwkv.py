"""Speed of this project's CPU backends beside the ``rwkv`` package's, interleaved in one process.

    python -m suites.throughput.compare_rwkv [--model 169m] [--threads 2] [--rounds 7]

Every round times every system once, starting with another one each round, so that what the machine
does meanwhile hits all alike. A system whose logits fail its parity gate is reported, not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import numpy as np

from backends import rwkv_pip
from backends.api import Session
from backends.index import load_backend
from harness.models import Model, gate_tokens, open_model
from harness.parity import gate
from harness.tolerance import derive
from reference.errors import InputError
from reference.numerics import Arithmetic

GATE_TOKENS = 32
PREFILL_TOKENS = 256
DECODE_TOKENS = 32
BASE = "rwkv"
INSTALL = "pip install torch && pip install --no-deps rwkv==0.8.32"


@dataclass
class System:
    """One program in one scheme, and its seconds per round."""

    name: str
    scheme: str
    session: Session
    arithmetic: Arithmetic
    problem: str | None = None
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if find_spec("torch") is None or find_spec("rwkv") is None:
        print(f"the rwkv package is not installed: {INSTALL}", file=sys.stderr)
        return 3
    try:
        model = open_model(arguments.model)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    systems = open_systems(model, arguments.schemes, arguments.threads)
    tokens = gate_tokens(model, GATE_TOKENS)
    for system in systems:
        truth = derive(model.weights, system.scheme, system.arithmetic, tokens, model.sha256)
        system.problem = None if (found := gate(system.session, truth)).passed else str(found.first_bad)
        print(f"{system.name} {system.scheme}: {system.problem or 'PASS'}", file=sys.stderr)
    measure(
        [system for system in systems if system.problem is None], gate_tokens(model, PREFILL_TOKENS), arguments.rounds
    )
    print(f"{model.name}, {arguments.threads} threads, {arguments.rounds} rounds, tok/s: median (min-max)")
    print(table(systems))
    return 1 if any(system.problem for system in systems) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_rwkv", description="CPU speed beside the rwkv package, interleaved.")
    parser.add_argument("--model", default="169m", help="preset, 'tiny', or a checkpoint's path (default 169m)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every system (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="times each system is timed (default 7, at least 5)")
    parser.add_argument("--schemes", default="fp32,bf16,fp16", help="comma list of fp32, bf16, fp16 (default all)")
    arguments = parser.parse_args(argv)
    arguments.schemes = arguments.schemes.split(",")
    if unknown := set(arguments.schemes) - {"fp32", "bf16", "fp16"}:
        parser.error(f"no scheme {unknown.pop()!r} here; it is fp32, bf16 or fp16")
    if arguments.rounds < 5 or arguments.threads < 1:
        parser.error("a median needs --rounds of at least 5, and --threads is at least 1")
    return arguments


def open_systems(model: Model, schemes: Sequence[str], threads: int) -> list[System]:
    """The rwkv package, the torch backend and the numpy reference, as far as each has the scheme."""
    systems = []
    backend = load_backend("torch")
    for scheme in schemes:
        arithmetic = backend.INFO.arithmetic(scheme, "cpu")
        if scheme != "fp16":  # the package's CPU path has no half-precision product worth the name
            package = rwkv_pip.load(model.weights, scheme, "cpu", threads)
            systems.append(System(BASE, scheme, package, arithmetic))
        systems.append(System("torch", scheme, backend.load(model.weights, scheme, "cpu", threads), arithmetic))
    if "fp32" in schemes:
        reference = load_backend("numpy")
        session = reference.load(model.weights, "fp32", "cpu", threads)
        systems.append(System("numpy", "fp32", session, reference.INFO.arithmetic("fp32", "cpu")))
    return systems


def measure(systems: Sequence[System], prompt: Sequence[int], rounds: int) -> None:
    """Time every system once a round; the first, untimed, round warms up TorchScript and oneDNN."""
    for number in range(-1, rounds):
        shift = number % max(1, len(systems))
        for system in [*systems[shift:], *systems[:shift]]:
            prefill = _timed(partial(system.session.forward, prompt, None))
            decode = _timed(partial(_decode, system.session))
            if number >= 0:
                system.prefill.append(prefill)
                system.decode.append(decode)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e9


def _decode(session: Session) -> None:
    """The same loop for everybody: arg-max on the host, one ``forward`` a token."""
    token, state = 0, None
    for _ in range(DECODE_TOKENS):
        logits, state = session.forward([token], state)
        token = int(np.argmax(logits))


def table(systems: Sequence[System]) -> str:
    """One line a system; the ratio is that of the medians, to the package in the same scheme."""
    lines = [f"{'':<12}{'decode':>26}{'ratio':>7}{'prefill ' + str(PREFILL_TOKENS):>28}{'ratio':>7}"]
    for system in systems:
        label = f"{system.name} {system.scheme}"
        if system.problem is not None:
            lines.append(f"{label:<12}  FAIL: {system.problem}")
            continue
        base = next((s for s in systems if s.name == BASE and s.scheme == system.scheme and not s.problem), None)
        decode = _speeds(DECODE_TOKENS, system.decode, base.decode if base else None)
        prefill = _speeds(PREFILL_TOKENS, system.prefill, base.prefill if base else None)
        lines.append(f"{label:<12}{decode:>33}{prefill:>35}")
    return "\n".join(lines)


def _speeds(tokens: int, seconds: Sequence[float], base: Sequence[float] | None) -> str:
    median, best, worst = (tokens / s for s in (statistics.median(seconds), min(seconds), max(seconds)))
    ratio = f"{statistics.median(base) / statistics.median(seconds):.2f}" if base else "-"
    return f"{median:.1f} ({worst:.1f}-{best:.1f}){ratio:>7}"


if __name__ == "__main__":
    sys.exit(main())
