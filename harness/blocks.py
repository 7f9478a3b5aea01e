"""The turns that one cell took for one quantity, put together: what is warm-up, what was disturbed, what is enough.

turns -> warm-up cut off -> blocks, the disturbed ones marked -> narrow enough? enough of them? -> row fields
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from harness.disturbance import disturbances, left_out
from harness.samples import PRECISION_REACHED, REPEATS_REACHED, TIME_BUDGET, NonFinite, Sampling, Taken
from harness.stats import LOOKS, half_width, interval_of_looks, median
from harness.warmup import warmup_length

#: Samples of a block that has a process of its own: its first ones may be warm-up.
FRESH_SAMPLES = 5


@dataclass
class Blocks:
    """Turns of one cell for prefill or for decode, in the order in which they were taken.

    processes  per turn, which process of the cell's took it, from 0
    spent_s    seconds in turns and before them, of the cell's time for this quantity
    """

    sampling: Sampling
    turns: list[Taken] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    spent_s: float = 0.0

    def add(self, taken: Taken, process: int) -> None:
        """One more turn."""
        self.turns.append(taken)
        self.processes.append(process)

    @property
    def non_finite_at(self) -> NonFinite | None:
        """The first logit that was no number."""
        return next((turn.non_finite_at for turn in self.turns if turn.non_finite_at is not None), None)

    def stopped(self) -> str | None:
        """Why no more turns are needed; ``None`` while they are."""
        asked, taken = self.sampling, len(self.turns)
        if taken == 0:
            return None
        if self.non_finite_at is not None:
            return REPEATS_REACHED  # the row says what was wrong instead of how fast
        over = asked.budget_s is not None and self.spent_s >= asked.budget_s
        if taken < min(asked.minimum, asked.repeats):
            return None
        if asked.precision is not None:
            # Every turn would do as well, but judging warm-up takes longer than a short turn.
            kept = Kept.of(self) if over or taken in _CHECKED or taken >= asked.repeats else None
            if kept is not None and narrow(kept.times, asked.precision):
                return PRECISION_REACHED
        if taken >= asked.repeats and (asked.again == 0 or self._replaced()):
            return REPEATS_REACHED
        return TIME_BUDGET if over else None

    def _replaced(self) -> bool:
        """Whether disturbed and warm-up turns have been made up for, as far as that is of use."""
        asked, taken = self.sampling, len(self.turns)
        kept = Kept.of(self)
        clean = sum(reason is None for reason in kept.why)
        return clean >= asked.repeats or clean == 0 or taken >= asked.repeats + asked.again


def narrow(times: Sequence[float], precision: float) -> bool:
    """Whether the median's interval, as of the last look, is within ``precision`` of the median on both sides.

    Of the times and of the rates alike: a table shows either.
    """
    if len(times) < LOOKS[0]:
        return False
    for values in (times, [1 / time for time in times]):
        interval = interval_of_looks(values)
        if interval is None or not half_width(values, interval) <= precision:
            return False
    return True


#: Turns after which the interval is looked at: just past each look, and on the way for what was cut off.
_CHECKED = frozenset(n + extra for n in LOOKS for extra in (0, 1, 2, 3, 4, 6, 8, 12))


@dataclass(frozen=True)
class Kept:
    """What remains of the turns: raw samples in order, which block each belongs to, and which blocks count.

    why, out  per block: the disturbance it was taken under, and whether it is left out for that
    times     per block that counts: the median of its samples, in ns
    """

    ns: tuple[int, ...]
    first_token_ns: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    warmup_ns: tuple[int, ...]
    blocks: tuple[Mapping[str, Any], ...]
    why: tuple[str | None, ...]
    times: tuple[float, ...]

    @staticmethod
    def of(found: Blocks) -> Kept:
        """Cut the warm-up off the front of every process, mark the disturbed blocks."""
        cut = _cuts(found)
        kept = [turn for turn, first in zip(found.turns, cut, strict=True) if first < len(turn.ns)]
        firsts = [first for turn, first in zip(found.turns, cut, strict=True) if first < len(turn.ns)]
        why = disturbances([turn.noise for turn in kept])
        out = left_out(why)
        blocks: list[dict[str, Any]] = []
        for turn, first, reason, gone in zip(kept, firsts, why, out, strict=True):
            start = blocks[-1]["start"] + blocks[-1]["count"] if blocks else 0
            blocks.append(_record(turn, start, len(turn.ns) - first, reason, gone))
        parts = list(zip(kept, firsts, strict=True))
        return Kept(
            ns=tuple(ns for turn, first in parts for ns in turn.ns[first:]),
            first_token_ns=tuple(ns for turn, first in parts for ns in turn.first_token_ns[first:]),
            steps=tuple(steps for turn, first in parts for steps in turn.steps[first:]),
            warmup_ns=tuple(ns for turn, first in zip(found.turns, cut, strict=True) for ns in turn.ns[:first]),
            blocks=tuple(blocks),
            why=tuple(why),
            times=tuple(median(turn.ns[first:]) for (turn, first), gone in zip(parts, out, strict=True) if not gone),
        )


def _cuts(found: Blocks) -> list[int]:
    """Per turn, how many of its first samples are warm-up: the first so many of each process."""
    samples: dict[int, list[int]] = {}
    for turn, process in zip(found.turns, found.processes, strict=True):
        samples.setdefault(process, []).extend(turn.ns)
    length = warmup_length([times for times in samples.values() if len(times) > 1])
    left = dict.fromkeys(samples, length)
    cuts = []
    for turn, process in zip(found.turns, found.processes, strict=True):
        cuts.append(min(left[process], len(turn.ns)))
        left[process] -= cuts[-1]
    return cuts


def _record(turn: Taken, start: int, count: int, why: str | None, out: bool) -> dict[str, Any]:
    """A block as a row keeps it."""
    when = datetime.fromtimestamp(turn.began, timezone.utc).isoformat(timespec="milliseconds")
    record: dict[str, Any] = {"start": start, "count": count, "time": when, "seconds": round(turn.seconds, 6)}
    record["noise"] = dict(turn.noise)
    if why is not None:
        record["disturbed"] = why
    if out:
        record["left_out"] = True
    return record
