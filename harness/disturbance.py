"""Which blocks of samples were taken under a disturbance, by a stated rule, from what the noise watch saw.

    steal      another virtual machine took more than 2 % of the CPU time there was
    others     other processes took more than 10 % of it
    waiting    the main thread was ready and had no CPU for more than 5 % of the block
    clock      the mean clock of the CPUs (or of the GPU) was more than 10 % below the median over the row's blocks
    throttled  a core was slowed for heat during the block
    gpu        another process computed on the GPU

Steal and others are counted by the kernel in ticks of a hundredth of a second, so neighbouring blocks are
judged together until they make a quarter of a second. The rule looks at the noise only, never at a time that
was measured: leaving blocks out by it cannot favour a result.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

STEAL_SHARE, OTHERS_SHARE, WAITED_SHARE, CLOCK_SHARE = 0.02, 0.10, 0.05, 0.90

#: Seconds that blocks are judged together for.
TOGETHER_SECONDS = 0.25

#: With fewer clean blocks than this, disturbed ones are used too, and the row says so.
LEAST_CLEAN = 3

Noise = Mapping[str, float]


def disturbances(noises: Sequence[Noise]) -> list[str | None]:
    """Per block why it counts as disturbed; ``None`` where it does not."""
    shared: list[str | None] = [None] * len(noises)
    for first, last in _together(noises):
        shared[first:last] = [_of_others(noises[first:last])] * (last - first)
    usual = {name: _median(noises, name) for name in ("mhz", "gpu_mhz")}
    return [_of_block(noise, usual) or why for noise, why in zip(noises, shared, strict=True)]


def left_out(why: Sequence[str | None]) -> list[bool]:
    """Per block whether it is left out of value and interval: the disturbed ones, while enough others remain."""
    clean = sum(reason is None for reason in why)
    return [reason is not None and clean >= min(LEAST_CLEAN, len(why)) for reason in why]


def _together(noises: Sequence[Noise]) -> list[tuple[int, int]]:
    """Ranges of neighbouring blocks that are long enough together; a short rest belongs to the last range."""
    ranges: list[tuple[int, int]] = []
    first, seconds = 0, 0.0
    for i, noise in enumerate(noises):
        seconds += noise.get("seconds", 0.0)
        if seconds >= TOGETHER_SECONDS:
            ranges.append((first, i + 1))
            first, seconds = i + 1, 0.0
    if first < len(noises):
        start = ranges.pop()[0] if ranges else first
        ranges.append((start, len(noises)))
    return ranges


def _of_others(noises: Sequence[Noise]) -> str | None:
    """What neighbouring blocks suffered from others, together; too short a window tells nothing."""
    there = sum(noise.get("cpu_s", 0.0) for noise in noises)
    if not sum(noise.get("seconds", 0.0) for noise in noises) >= TOGETHER_SECONDS or not there > 0:
        return None
    steal = sum(noise.get("steal_s", 0.0) for noise in noises) / there
    others = sum(noise.get("others_s", 0.0) for noise in noises) / there
    if steal > STEAL_SHARE:
        return f"steal took {100 * steal:.0f} % of the CPU time"
    if others > OTHERS_SHARE:
        return f"other processes took {100 * others:.0f} % of the CPU time"
    return None


def _of_block(noise: Noise, usual: Mapping[str, float | None]) -> str | None:
    seconds, waited = noise.get("seconds", 0.0), noise.get("waited_s", 0.0)
    if noise.get("gpu_others", 0) > 0:
        return f"{noise['gpu_others']:.0f} other processes were on the GPU"
    if noise.get("throttled", 0) > 0:
        return "a core was slowed for heat"
    for name, what in (("mhz", "CPU"), ("gpu_mhz", "GPU")):
        expected = usual[name]
        if expected and noise.get(name, expected) < CLOCK_SHARE * expected:
            return f"the {what}'s clock was {noise[name]:.0f} MHz, {expected:.0f} as a rule"
    if seconds > 0 and waited > WAITED_SHARE * seconds:
        return f"the process waited {100 * waited / seconds:.0f} % of the time for a CPU"
    return None


def _median(noises: Sequence[Noise], name: str) -> float | None:
    values = [noise[name] for noise in noises if name in noise]
    return statistics.median(values) if values else None
