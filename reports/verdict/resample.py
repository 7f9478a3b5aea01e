"""Reports made of recorded decode blocks: what they hold was measured, only who was base and who was head is drawn.

``apart``   every block from anywhere in the record: independent blocks, each with the bursts inside it
``a row``   blocks that followed each other, from a random place, base and head each from their own: two files, as
            stored, with bursts and drift as recorded
``pairs``   blocks that followed each other, two by two, a coin saying which was head: as ``rwkv-bench ab`` measures
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reports.verdict.permutation import Arms

TRACES = Path(__file__).parents[1] / "traces"

#: Blocks some seconds apart, for as long as half an hour.
SLOW = TRACES / "slow"

APART, A_ROW, PAIRS = "apart", "a row", "pairs"
DRAWINGS = (APART, A_ROW, PAIRS)


@dataclass(frozen=True)
class Record:
    """Recorded blocks: logarithms of the times of each one's samples ``(blocks, samples)``, in order of time.

    step   seconds from the beginning of one block to that of the next
    """

    name: str
    logs: np.ndarray
    about: str
    step: float = 0.0

    @property
    def spread(self) -> float:
        """Coefficient of variation of the blocks' medians."""
        times = np.exp(np.median(self.logs, axis=1))
        return float(times.std(ddof=1) / times.mean())

    def scaled(self, spread: float) -> Record:
        """The same bursts and drift, larger or smaller: deviations times a factor that gives this spread."""
        middle = float(np.median(self.logs))
        low, high = 0.0, 1.0
        while self._times(high, middle).spread < spread:
            high *= 2
        for _ in range(40):
            factor = (low + high) / 2
            low, high = (low, factor) if self._times(factor, middle).spread > spread else (factor, high)
        return self._times(high, middle)

    def _times(self, factor: float, middle: float) -> Record:
        return replace(self, logs=(self.logs - middle) * factor)


def recorded(folder: Path = TRACES) -> list[Record]:
    """The records that come with this project."""
    return [
        from_dict(json.loads(file.read_text(encoding="utf-8")), file.stem) for file in sorted(folder.glob("*.json"))
    ]


def from_dict(found: dict[str, Any], name: str) -> Record:
    """A trace of :mod:`harness.block_trace` as written by ``scripts/record_traces.py``."""
    blocks = np.asarray(found["blocks"], dtype=float)
    about = f"{len(blocks)} blocks of {found['backend']} {found['scheme']}, {found['starts'][-1]:.0f} s"
    return Record(name, np.log(blocks), about, float(np.median(np.diff(found["starts"]))) if len(blocks) > 1 else 0.0)


def draw(
    record: Record, how: str, reports: int, cells: int, blocks: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of base and head, log times ``(reports, cells, blocks, samples)`` each, without any difference."""
    total, stack = len(record.logs), (reports, cells)
    if how == APART:
        base, head = rng.integers(0, total, (2, *stack, blocks))
        return record.logs[base], record.logs[head]
    if how == A_ROW:
        base, head = (rng.integers(0, total, (2, *stack))[..., None] + np.arange(blocks)) % total
        return record.logs[base], record.logs[head]
    first = rng.integers(0, total, stack)[..., None] + 2 * np.arange(blocks)
    swap = rng.integers(0, 2, (*stack, blocks))
    return record.logs[(first + swap) % total], record.logs[(first + 1 - swap) % total]


def arms(base: np.ndarray, head: np.ndarray, how: str) -> Arms:
    """A block is worth the mean of its samples' logarithms."""
    return Arms(base.mean(axis=-1), head.mean(axis=-1), how == PAIRS)
