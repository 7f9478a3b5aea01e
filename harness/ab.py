"""An A/B comparison at work: which block comes next, and what has been measured so far.

A pair is a block of base and one of head of the same cell, whose samples alternate; where memory does not hold both,
one block right after the other. Which comes first is decided by a fair coin: that, and not any property of the noise,
makes the signs of the pairs' differences independent and even where the sides do not differ (Fisher's randomisation).
Cells take turns in an order drawn anew for every round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.ab_checkouts import BASE, HEAD, Side
from harness.ab_workers import Block, BlockFailed, BlockWrong
from harness.plan import Cell

Tell = Callable[[str], None]


@dataclass
class Pairs:
    """One cell: its pairs in order of time; what ended it early, by side.

    crowded  what a side failed of beside the other: since then each is measured alone
    """

    cell: Cell
    pairs: list[tuple[Block, Block]] = field(default_factory=list)
    head_first: list[bool] = field(default_factory=list)
    failed: dict[str, BlockFailed] = field(default_factory=dict)
    done: bool = False
    crowded: str = ""

    @property
    def wrong(self) -> bool:
        """Whether a side took times from wrong results: what it gave before counts for nothing either."""
        return any(isinstance(error, BlockWrong) for error in self.failed.values())

    @property
    def open(self) -> bool:
        """Whether more is to be measured."""
        return not (self.done or self.failed)


@dataclass(frozen=True)
class Job:
    """What is asked of every block.

    spec     options of :mod:`harness.ab_worker` that all cells share
    backend  (side, backend) -> what that side calls it
    measure  sides with what each is asked -> their blocks (:func:`harness.ab_workers.measure`)
    together whether both sides of a cell may be loaded at once
    """

    sides: tuple[Side, Side]
    spec: Mapping[str, Any]
    backend: Callable[[Side, str], str]
    seed: int
    measure: Callable[[Sequence[tuple[Side, Mapping[str, Any]]]], Sequence[Block | BlockFailed | None]]
    together: Callable[[Cell], bool] = lambda cell: True


def rounds(job: Job, cells: Sequence[Pairs], deadline: float, tell: Tell) -> Iterator[int]:
    """Measure round after round, one pair of every open cell each; gives the number of rounds done.

    Ends when no cell is open or ``time.monotonic()`` has passed ``deadline``; a pair cut short is not kept.
    """
    rng = random.Random(job.seed)
    number = 0
    while any(cell.open for cell in cells):
        order = [cell for cell in cells if cell.open]
        rng.shuffle(order)
        for cell in order:
            head_first = rng.random() < 0.5
            if time.monotonic() > deadline:
                return
            _pair(job, cell, head_first, tell)
        number += 1
        yield number


def _pair(job: Job, cell: Pairs, head_first: bool, tell: Tell) -> None:
    found: dict[str, Block | BlockFailed] = {}
    base, head = job.sides
    order = (head, base) if head_first else (base, head)
    pair = f"{cell.cell.backend} {cell.cell.scheme}: pair {len(cell.pairs) + 1}"
    if not cell.crowded and job.together(cell.cell):
        tell(f"{pair}, {order[0].name} and {order[1].name}")
        blocks = job.measure([(side, _spec(job, side, cell.cell)) for side in order])
        found = {side.name: block for side, block in zip(order, blocks, strict=True) if block is not None}
        # What fails beside the other may be the other's doing, as where memory holds only one: alone it is its own.
        failed = [(n, b) for n, b in found.items() if isinstance(b, BlockFailed) and not isinstance(b, BlockWrong)]
        cell.crowded = "; ".join(f"{name}: {error}" for name, error in failed)
    if cell.crowded or not found:
        samples: dict[str, int] = {}
        for side in order:
            tell(f"{pair}, {side.name}")
            (block,) = job.measure([(side, {**_spec(job, side, cell.cell), **samples})])
            assert block is not None
            found[side.name] = block
            if isinstance(block, Block):  # the other gets as many, however long it took to start
                samples = {"repeats": max(len(ns) for ns in block.ns.values())}
    cell.failed = {name: block for name, block in found.items() if isinstance(block, BlockFailed)}
    if not cell.failed:
        cell.pairs.append((_block(found[BASE]), _block(found[HEAD])))
        cell.head_first.append(head_first)


def _block(found: Block | BlockFailed) -> Block:
    assert isinstance(found, Block)
    return found


def _spec(job: Job, side: Side, cell: Cell) -> dict[str, Any]:
    return {
        **job.spec,
        "backend": job.backend(side, cell.backend),
        "model": cell.model,
        "scheme": cell.scheme,
        "device": cell.hardware.device,
        "threads": cell.threads,
        "prompt_tokens": cell.workload.prompt_tokens,
        "decode_tokens": cell.workload.decode_tokens,
    }
