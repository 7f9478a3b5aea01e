"""Figures that others have published: claims with a source, never mixed with what was measured.

A claim is exact only as far as it was printed: ``72.4 tok/s`` stands for 72.35 to 72.45, ``7.9 ms`` for 7.85 to 7.95.
Every field that a source leaves out is ``null`` in published.json and named in the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.rows import METRIC_UNITS, Row
from reference.schemes import SCHEMES
from reports.cells import cells
from reports.peak import with_peak_fraction

_FILE = Path(__file__).with_name("published.json")

#: Of two figures of this metric the lower one is better.
_LOWER_IS_BETTER = ("perplexity", "time_to_first_token", "first_call", "load")

#: What a complete claim would state, in the words of a row's reason. Perplexity depends on none of the first four.
_STATED = {
    "prompt_tokens": "prompt length",
    "decode_tokens": "decode length",
    "driver": "driver",
    "threads": "threads",
    "batch": "batch",
    "interval": "spread",
    "version": "version",
    "date": "date",
}


@dataclass(frozen=True)
class Claim:
    """One published figure; ``None``: not stated by its source.

    printed, unit  as the source has it, digits and all: tok/s, ms/token, ppl
    same_as        our backends that run the same system
    machine        what more the source says of the hardware
    """

    hardware: str
    machine: str | None
    device: str | None
    backend: str
    version: str | None
    same_as: tuple[str, ...]
    model: str
    scheme: str
    scheme_class: str | None
    metric: str
    printed: str
    unit: str
    threads: int | None
    prompt_tokens: int | None
    decode_tokens: int | None
    batch: int | None
    driver: str | None
    interval: tuple[float, float] | None
    date: str | None
    note: str | None
    source: str

    @property
    def bounds(self) -> tuple[float, float]:
        """What the printed digits allow, in the metric's own unit, lowest first."""
        value = Decimal(self.printed)
        half = Decimal(5).scaleb(-1 - len(self.printed.partition(".")[2]))
        ends = (float(value - half), float(value + half))
        if self.unit != "ms/token":
            return ends
        return 1e3 / ends[1], 1e3 / ends[0]

    @property
    def value(self) -> float:
        """The figure in the metric's own unit."""
        return 1e3 / float(self.printed) if self.unit == "ms/token" else float(self.printed)

    @property
    def missing(self) -> tuple[str, ...]:
        """What the source does not state."""
        timed = self.metric in ("prefill", "decode")
        skipped: tuple[str, ...] = () if timed else ("prompt_tokens", "decode_tokens", "driver", "batch", "threads")
        skipped += ("decode_tokens",) if self.metric == "prefill" else ()
        skipped += () if self.device == "cpu" else ("threads",)
        return tuple(name for name in _STATED if getattr(self, name) is None and name not in skipped)

    def row(self, url: str, title: str) -> Row:
        """As a published row, with its fraction of the hardware's published peak."""
        converted = self.unit != METRIC_UNITS[self.metric]
        said = [f"published as {self.printed} {self.unit}"] if converted else []
        said += [f"with {self.machine}"] if self.machine else []
        said += [self.note] if self.note else []
        said += ["not stated: " + ", ".join(_STATED[name] for name in self.missing)] if self.missing else []
        row = Row(
            kind="published",
            hardware=self.hardware,
            hardware_detail={"name": self.machine} if self.machine else None,
            backend=self.backend,
            backend_version=self.version,
            model=self.model,
            scheme=self.scheme,
            scheme_class=self.scheme_class,
            device=self.device,
            threads=self.threads,
            driver=self.driver,
            metric=self.metric,
            value=_rounded(self.value, self.printed) if converted else self.value,
            interval=self.interval,
            reason="; ".join(said) or None,
            extra={"source": url, "title": title, "missing": list(self.missing), "printed": self.printed},
        )
        return with_peak_fraction(row)


@lru_cache(maxsize=1)
def claims() -> tuple[tuple[Claim, str, str], ...]:
    """Every claim with the address and the title of its source. A record that lacks a field is an error here."""
    told = json.loads(_FILE.read_text(encoding="utf-8"))
    sources = told["sources"]
    return tuple(
        (_claim(fields), sources[fields["source"]]["url"], sources[fields["source"]]["title"])
        for fields in told["claims"]
    )


def published_rows(hardware: str, schemes: Iterable[str] = ("all",), measured: Sequence[Row] = ()) -> list[Row]:
    """Published rows of a hardware, for schemes by name or class; beside each our own of the same cell, if any."""
    wanted = set(schemes)
    return [
        beside(claim, claim.row(url, title), measured)
        for claim, url, title in claims()
        if claim.hardware == hardware and ("all" in wanted or wanted & {claim.scheme, _class(claim)})
    ]


def claims_of(measured: Sequence[Row]) -> list[Row]:
    """Published rows of the very cells that were measured, each with what became of it."""
    found = [beside(claim, claim.row(url, title), measured) for claim, url, title in claims()]
    return [row for row in found if "ours" in row.extra]


def beside_claims(rows: Sequence[Row]) -> list[Row]:
    """The rows, and published ones of the very cells that they measure, each beside our newest figure of it.

    Of a cell whose newest run did not pass there is none. What a claim among the rows says of ours, as it was when they
    were made, is replaced.
    """
    newest = [row for cell in cells(rows) for row in cell.rows if row.kind == "measured"]
    found = claims_of(sorted(newest, key=lambda row: row.time or ""))
    known = {_printed(row) for row in found}
    told = [row for row in rows if row.kind != "published" or _printed(row) not in known]
    return [*(row if row.kind != "published" else _alone(row) for row in told), *found]


def _alone(row: Row) -> Row:
    return replace(row, extra={key: value for key, value in row.extra.items() if key != "ours"})


def _printed(row: Row) -> tuple[Any, ...]:
    return row.hardware, row.model, row.backend, row.scheme, row.metric, row.threads, row.value, row.extra.get("source")


def beside(claim: Claim, row: Row, measured: Sequence[Row]) -> Row:
    """The claim's row with our last figure of its cell, and the word for the two or why there is none."""
    ours = next((own for own in reversed(measured) if same_cell(claim, own)), None)
    if ours is None:
        return row
    why = not_comparable(claim, ours)
    told: dict[str, Any] = {
        "decision": None if why else decision(claim, ours),
        "why": why,
        "value": ours.value,
        "interval": ours.interval,
        "backend": ours.backend,
        "run": ours.run,
    }
    return replace(row, extra={**row.extra, "ours": told})


def not_comparable(claim: Claim, ours: Row) -> str | None:
    """Why the two figures have no word between them: ``cpu`` stands for any processor, and ours is not the claim's."""
    machine = (ours.hardware_detail or {}).get("name")
    if claim.hardware != "cpu" or (machine is not None and machine == claim.machine):
        return None
    return f"another machine: published of {claim.machine or 'one not named'}, measured on {machine or 'one not named'}"


def same_cell(claim: Claim, row: Row) -> bool:
    """Whether a measured row is of the claim's cell, as far as the claim states it; only what passed counts."""
    if row.kind != "measured" or row.verdict != "PASS" or row.value is None:
        return False
    if claim.metric == "perplexity" and row.synthetic is not False:
        return False  # weights that were drawn have none of the model's quality
    keys = ("hardware", "model", "scheme", "metric")
    if any(getattr(row, key) != getattr(claim, key) for key in keys) or row.backend not in claim.same_as:
        return False
    work = row.workload
    asked = {"prompt_tokens": claim.prompt_tokens, "decode_tokens": claim.decode_tokens, "batch": claim.batch or 1}
    if work is not None and any(want not in (None, getattr(work, name)) for name, want in asked.items()):
        return False
    return claim.threads in (None, row.threads)


def decision(claim: Claim, ours: Row) -> str:
    """``reproduced``: our 95 % interval and what the printed digits allow have something in common; else ``exceeded``
    or ``contradicted``, by which side ours is on. ``undecided``: too few samples for an interval.
    """
    if ours.interval is None:
        return "undecided"
    low, high = ours.interval
    least, most = claim.bounds
    if claim.metric in _LOWER_IS_BETTER:
        low, high, least, most = -high, -low, -most, -least
    if not (low <= most):
        return "exceeded"
    return "reproduced" if high >= least else "contradicted"


def _claim(fields: dict[str, Any]) -> Claim:
    interval = fields["interval"]
    return Claim(
        **{**fields, "same_as": tuple(fields["same_as"]), "interval": None if interval is None else tuple(interval)}
    )


def _class(claim: Claim) -> str:
    scheme = SCHEMES.get(claim.scheme)
    return claim.scheme_class or (scheme.scheme_class if scheme else claim.scheme)


def _rounded(value: float, printed: str) -> float:
    """To the digits that the source printed, and no fewer than three."""
    digits = max(3, len(printed.replace(".", "").lstrip("0")))
    return float(f"{value:.{digits}g}")
