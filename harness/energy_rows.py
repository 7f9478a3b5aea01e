"""Energy per token of measured rows, where the machine that runs the cell counts energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from harness.hardware import Hardware
from harness.machine.energy import Spans, counter
from harness.rows import Row

T = TypeVar("T")


@dataclass
class _Span:
    joules: float = 0.0
    seconds: float = 0.0


class EnergyTally:
    """Joules and seconds of one cell's turns, by what they measured. A host's own counters are out of reach."""

    def __init__(self, place: Hardware, open_counter: Callable[[str], Spans | None] = counter) -> None:
        self._place, self._open = place, open_counter
        self._counter: Spans | None = None
        self._asked = False
        self._spans: dict[str, _Span] = {}

    def during(self, what: str, work: Callable[[], T]) -> T:
        """``work()``, its energy counted: what it takes to read that lies outside of what is timed."""
        if not self._asked:
            self._asked = True
            self._counter = self._open(self._place.device) if self._place.host is None else None
        if self._counter is None:
            return work()
        self._counter.begin()
        result = work()
        counted = self._counter.end()
        if counted is None:
            self._counter = None
            self._spans.clear()
            return result
        span = self._spans.setdefault(what, _Span())
        span.joules += counted[0]
        span.seconds += counted[1]
        return result

    def of(self, row: Row) -> Row:
        """The row with ``energy``: joules a token, mean watts and their source; as it is where nothing was counted.

        Power is the mean over all turns, what was untimed in them included; times are those of the row.
        """
        span = self._spans.get(row.metric)
        if span is None or self._counter is None or row.value is None or not row.value > 0 or not span.seconds > 0:
            return row
        watts = span.joules / span.seconds
        told: dict[str, Any] = {"joules_per_token": watts / row.value, "watts": watts, "source": self._counter.source}
        return replace(row, extra={**row.extra, "energy": told})
