"""The Triton backend beside the ``rwkv`` package (``cuda fp16``) on one GPU: decode and prefill, their ratios.

    python -m suites.throughput.triton_rwkv [--model 7b-world] [--quant fp16 q4f16_1] [--prompts 512 2048]

One session at a time, since two models of 7B need not fit together; both are asked for the same tokens and each is
closed, its memory given back, before the next. Decode is what each does best: ours the greedy loop that stays on the
device, the package's one ``forward`` a token with the arg-max on the host. Beside the times stand the fractions of
the read bandwidth and of the fp16 matrix rate, both measured here in the same run. Weights are random: see
``rwkv-bench parity`` for whether they are computed with rightly.

Exit status: 0; 1 where a ratio of fp16 is under its bar (decode 3, prefill 1.5); 2 for wrong usage; 3 without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from backends import rwkv_pip, triton_cuda
from backends.api import Closing, Generating, Unavailable, Unsupported
from backends.triton_cuda import machine
from harness.models import Model, open_model
from reference.config import Config, count_parameters
from reference.errors import InputError
from reference.schemes import bytes_read_per_token

DECODE_BAR, PREFILL_BAR = 3.0, 1.5
_ROUNDS, _STEPS = 5, 64


@dataclass
class Speeds:
    """Tokens per second: of decode, and of prompts by length."""

    name: str
    scheme: str
    decode: float
    prefill: dict[int, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; see the module."""
    asked = _parsed(arguments)
    try:
        triton_cuda.check()
        device = machine.open_device(asked.device)
        if device.type != "cuda":
            raise Unavailable("times are those of a GPU", "unset TRITON_INTERPRET")
        model = open_model(asked.model)
        bandwidth, rate = ceilings(device)
        systems = [
            measured(
                "triton", scheme, asked.prompts, model, triton_cuda.load(model.weights, scheme, asked.device, None)
            )
            for scheme in asked.quant
        ]
        rival = _rival(model, asked)
    except (Unavailable, Unsupported) as error:
        print(error, file=sys.stderr)
        return 3
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{model.name} on {device}: read {bandwidth / 1e9:.0f} GB/s, fp16 product {rate / 1e12:.0f} TFLOP/s")
    print(table([*systems, *([rival] if rival else [])], rival, model.weights.config, bandwidth, rate))
    mine = next((system for system in systems if system.scheme == "fp16"), None)
    return int(rival is not None and mine is not None and not _met(mine, rival))


def _rival(model: Model, asked: argparse.Namespace) -> Speeds | None:
    """The package in fp16; nothing, and why, where it is not here."""
    try:
        return measured("rwkv", "fp16", asked.prompts, model, rwkv_pip.load(model.weights, "fp16", asked.device, None))
    except (Unavailable, Unsupported) as error:
        print(f"rwkv: {error}; no ratios", file=sys.stderr)
        return None


def _met(mine: Speeds, rival: Speeds) -> bool:
    prompts = all(mine.prefill[n] >= PREFILL_BAR * rival.prefill[n] for n in rival.prefill)
    return mine.decode >= DECODE_BAR * rival.decode and prompts


def measured(name: str, scheme: str, prompts: Sequence[int], model: Model, session: Any) -> Speeds:
    """Medians over rounds; the first, untimed, compiles and captures. Closes the session."""
    tokens = np.random.default_rng(0).integers(0, model.weights.config.n_vocab, max(prompts)).tolist()
    try:
        _, state = session.forward(tokens[:8], None)
        found = Speeds(name, scheme, _STEPS / _median(lambda: _decode(session, state)))
        for length in prompts:
            found.prefill[length] = length / _median(partial(session.forward, tokens[:length], None))
        return found
    finally:
        if isinstance(session, Closing):
            session.close()


def _decode(session: Any, state: Any) -> None:
    if isinstance(session, Generating):
        session.greedy(0, state, _STEPS)
        return
    token = 0
    for _ in range(_STEPS):
        logits, state = session.forward([token], state)
        token = int(logits.argmax())


def _median(work: Callable[[], object]) -> float:
    """Seconds; what ``work`` returns is on the host, so the device has finished."""
    times = []
    for number in range(-2, _ROUNDS):
        start = time.perf_counter_ns()
        work()
        if number >= 0:
            times.append((time.perf_counter_ns() - start) / 1e9)
    return statistics.median(times)


def ceilings(device: Any) -> tuple[float, float]:
    """Bytes per second of a sum over 4 GiB, and operations per second of a product of random halves, 8192 cubed."""
    import torch

    found = _read_bandwidth(device), _matrix_rate(device)
    torch.cuda.empty_cache()
    return found


def _read_bandwidth(device: Any) -> float:
    import torch

    data = torch.ones(1 << 30, device=device)
    return data.numel() * data.element_size() / _median(lambda: data.sum().item())


def _matrix_rate(device: Any) -> float:
    import torch

    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.float16) for _ in range(2))

    def products() -> float:
        for _ in range(10):
            last = a @ b
        return float(last[0, 0].item())

    return 10 * 2 * 8192**3 / _median(products)


def table(systems: Sequence[Speeds], rival: Speeds | None, config: Config, bandwidth: float, rate: float) -> str:
    """One line for each system and length: tokens per second, of the ceiling, over the rival."""
    operations = 2 * (
        count_parameters(config) - 2 * config.n_vocab * config.n_embd
    )  # a token's, embedding and head apart
    lines = [f"{'':22}{'tok/s':>10}{'of ceiling':>12}{'ratio':>8}"]
    for system in systems:
        of_read = system.decode * bytes_read_per_token(config, system.scheme) / bandwidth
        over = f"{system.decode / rival.decode:.2f}" if rival else "-"
        label = f"{system.name} {system.scheme}"
        lines.append(f"{label + ' decode':22}{system.decode:>10.1f}{of_read:>12.1%}{over:>8}")
        for length, speed in system.prefill.items():
            over = f"{speed / rival.prefill[length]:.2f}" if rival else "-"
            lines.append(f"{f'{label} {length}':22}{speed:>10.1f}{speed * operations / rate:>12.1%}{over:>8}")
    return "\n".join(lines)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m suites.throughput.triton_rwkv", description=__doc__)
    parser.add_argument("--model", default="7b-world")
    schemes = list(triton_cuda.INFO.schemes)
    parser.add_argument("--quant", nargs="+", default=["fp16", "q4f16_1"], choices=schemes, metavar="SCHEME")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
