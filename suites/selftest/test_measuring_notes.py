"""What a table says of memory that a shared process hides, and of a precision that was not reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from harness import schedule, session
from harness.meter import HereMeter
from harness.rows import Row
from harness.samples import PRECISION_REACHED, REPEATS_REACHED, TIME_BUDGET, Sampling
from reports.cells import cells
from reports.output import formatted
from reports.recommend import memory_of
from suites.selftest.conftest import Done
from suites.selftest.report_rows import cell

MIB = 1 << 20
SHARED = "cells that share a process have none"


def asked(stopped: str, half: float | None = 0.29, metric: str = "decode", **fields: Any) -> Row:
    """A speed that was measured with ``--precision 5%``, at most 10 s or 40 repeats."""
    row = next(row for row in cell(backend="numpy", scheme="fp32", **fields) if row.metric == metric)
    assert row.value is not None
    interval = None if half is None else (row.value * (1 - half), row.value)
    sampling = Sampling(repeats=40, budget_s=10.0, precision=0.05).to_dict()
    bare: dict[str, Any] = {"samples": None, "steps": None, "blocks": None, "percentiles": None}
    return replace(row, stopped=stopped, interval=interval, sampling=sampling, **bare)


def notes(*rows: Row, width: int | None = None) -> str:
    return str(formatted(rows, "table", width))


def test_a_precision_that_was_not_reached_is_a_note() -> None:
    assert "5 % was not reached within 10 s: numpy fp32 decode ±29 %" in notes(asked(TIME_BUDGET))
    assert "5 % was not reached within 40 repeats: numpy fp32 decode ±29 %" in notes(asked(REPEATS_REACHED))
    assert "decode has no interval" in notes(asked(TIME_BUDGET, None))
    both = notes(asked(TIME_BUDGET), asked(TIME_BUDGET, 0.1, "prefill"))
    assert "numpy fp32 decode ±29 %, prefill ±10 %" in both
    assert both.count("not reached") == 1
    assert "interruption" in notes(asked("interrupted"))


def test_one_that_was_reached_or_never_asked_for_is_none() -> None:
    assert "not reached" not in notes(asked(PRECISION_REACHED, 0.04))
    assert "not reached" not in notes(replace(asked(TIME_BUDGET), sampling=Sampling(budget_s=10.0).to_dict()))
    assert "not reached" not in notes(*cell())


def test_the_terminal_says_it_of_a_real_run(bench: Callable[..., Done], small: str) -> None:
    cell = ("--model", small, "--backend", "numpy", "--quant", "fp32")
    work = ("--decode-tokens", "2", "--prompt-tokens", "8", "--precision", "0.01%", "--time-budget", "0.2")
    done = bench("run", *cell, *work)
    assert done.code == 0, done.err
    assert "0.01 % was not reached within 0.1 s: numpy fp32 prefill " in " ".join(done.out.split())


class TestMemory:
    @pytest.fixture
    def grown(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Growth that the process tells, a cell a number; the last one stays."""
        told: list[int] = []

        class Told(HereMeter):
            def __init__(self) -> None:
                super().__init__()
                self.growth = told.pop(0) if len(told) > 1 else told[0]

            def peak_bytes(self) -> int | None:
                return self.growth

        monkeypatch.setattr(session, "HereMeter", Told)
        return told

    def peaks(self, done: Done) -> dict[str, set[int | None]]:
        assert done.code == 0, done.err
        rows = json.loads(done.out)["rows"]
        timed = [row for row in rows if row["metric"] in ("load", "prefill", "decode")]
        return {r["scheme"]: {o["peak_bytes"] for o in timed if o["scheme"] == r["scheme"]} for r in timed}

    def run(self, bench: Callable[..., Done], small: str, *more: str) -> Done:
        work = ("--decode-tokens", "2", "--prompt-tokens", "8", "--repeats", "2", "--format", "json")
        return bench("run", "--model", small, "--backend", "numpy", "--quant", "fp32,fp16,bf16", *work, *more)

    def test_only_the_first_of_a_process_has_any_growth_as_its_memory(
        self, bench: Callable[..., Done], small: str, grown: list[int]
    ) -> None:
        grown += [1, 1, 99 * MIB]  # the last is more than its weights
        done = self.run(bench, small)
        assert self.peaks(done) == {"fp32": {1}, "fp16": {None}, "bf16": {99 * MIB}}
        rows = [Row.from_dict(row) for row in json.loads(done.out)["rows"]]
        assert SHARED in notes(*rows)
        memory = {found.first.scheme: memory_of(found) for found in cells(rows)}
        assert memory["fp16"] is None
        assert memory["bf16"] == 99 * MIB

    def test_a_cell_that_is_loaded_again_after_others_has_that_of_its_first_load_only(
        self, bench: Callable[..., Done], small: str, grown: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a machine that does not hold two at once: there and back, half of the turns each."""
        monkeypatch.setattr(schedule, "SHARE", 0.0)
        grown += [2, 1]
        found = self.peaks(self.run(bench, small, "--quant", "fp32,fp16"))
        assert found == {"fp32": {2, None}, "fp16": {None}}

    def test_one_cell_alone_has_its_growth_and_no_note(
        self, bench: Callable[..., Done], small: str, grown: list[int]
    ) -> None:
        grown += [1]
        done = self.run(bench, small, "--quant", "fp16")
        assert self.peaks(done) == {"fp16": {1}}
        assert SHARED not in notes(*(Row.from_dict(row) for row in json.loads(done.out)["rows"]))

    def test_where_no_cell_has_any_sharing_is_not_why(self) -> None:
        rows = [replace(row, isolated=False, peak_bytes=None) for row in cell()]
        assert SHARED not in notes(*rows)
