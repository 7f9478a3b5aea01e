"""How many times as fast the Triton backend was as what it is held against on the same card, from a run's rows.

rwkv   its fp16, of the same model, prompt and metric; each decodes the way it does best
fla    its WKV over as many tokens and channels
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.rows import Row
from harness.samples import Workload

#: (rival, metric) -> the least ratio in fp16 and the one aimed at: of a 7B shape, WKV of every width.
BARS = {("rwkv", "decode"): (3.0, 5.0), ("rwkv", "prefill"): (1.5, 2.0), ("fla", "prefill"): (1.5, 4.0)}

_OURS, _SHAPE = "triton", "7b"


@dataclass(frozen=True)
class Ratio:
    """``value``: ours over the rival's, both tokens a second; ``bar``: the least and the aim, where there is one."""

    model: str
    metric: str
    scheme: str
    rival: str
    workload: Workload
    value: float
    bar: tuple[float, float] | None

    def __str__(self) -> str:
        size = f", {self.workload.prompt_tokens} tokens"
        text = f"{self.model} {self.metric}{size}: {_OURS} {self.scheme} {self.value:.2f} times {self.rival} fp16"
        if self.bar is None:
            return text
        least, aim = self.bar
        met = "" if self.value >= least else "UNDER "
        return f"{text}, {met}the bar of {least:g}; aimed at {aim:g}"


def ratios(rows: Iterable[Row], rehearsal: bool) -> list[Ratio]:
    """Of every timed row that has a rival's beside it; bars are a GPU's."""
    timed = [row for row in rows if row.metric in ("prefill", "decode") and _counts(row)]
    rivals = {_key(row): row for row in timed if row.backend in ("rwkv", "fla") and row.scheme == "fp16"}
    found = []
    for row in timed:
        rival = rivals.get(_key(row))
        if row.backend == _OURS and rival is not None and rival.value and row.value and row.workload is not None:
            barred = row.scheme == "fp16" and not rehearsal and (rival.backend == "fla" or row.model.startswith(_SHAPE))
            bar = BARS.get((rival.backend, row.metric)) if barred else None
            value = row.value / rival.value
            found.append(Ratio(row.model, row.metric, row.scheme, rival.backend, row.workload, value, bar))
    return found


def _counts(row: Row) -> bool:
    return row.verdict == "PASS" and row.value is not None and "ablation" not in row.extra


def _key(row: Row) -> tuple[str, str, Workload | None, str]:
    return row.model, row.metric, row.workload, row.unit
