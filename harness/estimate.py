"""What a run will take, before it runs: predicted from a 0.1 s probe of this machine, never measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from harness.blocks import FRESH_SAMPLES
from harness.budget import keeps, shortage
from harness.measure import Sampling
from harness.models import is_generated, model_config
from harness.plan import Cell, memory_needed
from harness.run import GATE_TOKENS
from harness.session import needs_isolation
from harness.tolerance import DRAWS
from reference.config import Config, count_parameters
from reference.schemes import SCHEMES, bytes_read_per_token

#: Interpreter and call overhead of one layer of one forward call, eager Python.
_CALL_SECONDS_PER_LAYER = 1.5e-4

#: Until a process of another environment has imported its runtime: 1 to 9 s were seen.
_START_SECONDS = 4.0

#: Normal numbers that numpy draws.
_DRAWN_PER_SECOND = 1e8


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds and bytes of one cell; ``short`` says why it would not start."""

    seconds: float
    bytes: int
    short: str | None


def estimate(cell: Cell, sampling: Sampling | None, config: Config | None = None) -> Estimate:
    """Roofline estimate: matrix products at the probed rate, decode steps at the probed bandwidth.

    Efficiencies of real backends differ by small factors; this answers "seconds or hours".
    """
    config = config or model_config(cell.model)
    known = SCHEMES.get(cell.scheme)
    scheme = cell.scheme if known is not None and known.codec is not None else "fp32"
    rate, bandwidth = probe()
    flop_per_token = 2.0 * (count_parameters(config) - config.n_vocab * config.n_embd)
    step = bytes_read_per_token(config, scheme) / bandwidth + config.n_layer * _CALL_SECONDS_PER_LAYER
    call = config.n_layer * _CALL_SECONDS_PER_LAYER

    def batch(tokens: int) -> float:
        return tokens * flop_per_token / rate + call + tokens * config.n_layer * 5e-6  # the WKV loop

    load = 4.0 * count_parameters(config) / 1e9 + _making_seconds(cell.model, config)
    load += _START_SECONDS if needs_isolation(cell.backend) else 0.0
    gate = (DRAWS + 6) * batch(GATE_TOKENS) + (GATE_TOKENS + 4) * step
    seconds = load + gate
    if sampling is not None:
        loads = sampling.repeats if sampling.fresh else 1
        seconds *= loads
        runs = sampling.repeats * (FRESH_SAMPLES if sampling.fresh else 1) + loads * sampling.warmup
        work = cell.workload
        timed = runs * (batch(work.prompt_tokens) + work.decode_tokens * step)
        seconds += timed if sampling.budget_s is None else min(timed, max(2 * sampling.budget_s, timed / runs))
    needed = memory_needed(cell, config)
    free = cell.hardware.facts.get("free_bytes")
    return Estimate(seconds, needed, shortage(needed, cell.hardware.device, None if free is None else int(free)))


def _making_seconds(model: str, config: Config) -> float:
    """Synthetic weights are drawn once where they are kept, else each time the backend or the gate reads them."""
    if not is_generated(model):
        return 0.0
    reads = 1 if keeps(2 * count_parameters(config)) else 3 + DRAWS
    return reads * count_parameters(config) / _DRAWN_PER_SECOND


@lru_cache(maxsize=1)
def probe() -> tuple[float, float]:
    """Matrix rate (FLOP/s, float32) and read bandwidth (byte/s) of numpy here; best of three short runs."""
    a = np.ones((512, 512), np.float32)
    big = np.ones(1 << 23, np.float32)
    rate = 2 * 512**3 / min(_seconds(lambda: a @ a) for _ in range(3))
    bandwidth = big.nbytes / min(_seconds(big.sum) for _ in range(3))
    return rate, bandwidth


def _seconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter_ns()
    work()
    return max(1, time.perf_counter_ns() - start) / 1e9
