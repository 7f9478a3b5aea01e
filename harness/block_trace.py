"""Decode blocks one after another, as a record of how noisy a machine is: bursts, drift, neighbours alike.

A block is a few decode samples in a row; blocks follow each other without a pause, so that what disturbs the
machine for longer than a block shows in several of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from harness.models import gate_tokens, open_model
from harness.samples import Sampling
from harness.session import open_session

Tell = Callable[[str], None]

#: Steps of one decode sample, samples of one block.
STEPS, SAMPLES = 4, 5

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Trace:
    """Times of decode blocks in the order in which they were taken.

    blocks   per block, nanoseconds of each of its samples of ``steps`` steps
    starts   per block, seconds since the first began
    """

    backend: str
    scheme: str
    steps: int
    blocks: tuple[tuple[int, ...], ...]
    starts: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def record(
    backend: str = "numpy",
    scheme: str = "fp32",
    seconds: float = 60.0,
    most: int = 2000,
    renew: int = 40,
    tell: Tell = lambda text: None,
    every: float = 0.0,
) -> Trace:
    """Decode blocks of the embedded model, one thread, for so many seconds; a new session every ``renew`` blocks.

    every   seconds from the beginning of one block to that of the next, at least: what lasts for minutes is seen in
            few blocks
    """
    model = open_model("tiny")
    prompt = gate_tokens(model, _PROMPT_TOKENS, 0)
    began = time.monotonic()
    blocks: list[tuple[int, ...]] = []
    starts: list[float] = []
    sampling = Sampling(repeats=SAMPLES, warmup=0)
    while len(blocks) < most and time.monotonic() - began < seconds:
        with open_session(backend, model, scheme, threads=1) as opened:
            opened.meter.decode(prompt, STEPS, Sampling(repeats=1, warmup=1), lambda text: None)
            for _ in range(renew):
                starts.append(round(time.monotonic() - began, 3))
                blocks.append(opened.meter.decode(prompt, STEPS, sampling, lambda text: None).ns)
                if time.monotonic() - began >= seconds or len(blocks) >= most:
                    break
                time.sleep(max(0.0, starts[-1] + every - (time.monotonic() - began)))
        tell(f"recording decode blocks: {len(blocks)} in {time.monotonic() - began:.0f} of {seconds:.0f} s")
    return Trace(backend, scheme, STEPS, tuple(blocks), tuple(starts))
