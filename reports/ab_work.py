"""One A/B job: its cells, their parity on both sides, pairs of blocks until there is an answer, rows of it all."""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.ab import Job, Pairs, rounds
from harness.ab_checkouts import BASE, HEAD, Side, top_of, within
from harness.ab_parity import parity_rows
from harness.ab_workers import LEAST, BlockFailed, BlockWrong, measure
from harness.cell_rows import Job as RunJob
from harness.cell_rows import base_row
from harness.hardware import available_bytes
from harness.models import model_config, open_model
from harness.plan import Cell, Plan, Request, memory_needed
from harness.rows import Row
from harness.run import new_run_id
from harness.samples import Sampling
from harness.schedule import SHARE
from reports.verdict.comparison import Comparison, Judged, names_of
from reports.verdict.decision import UNDECIDED, Rules
from reports.verdict.exact import fewest
from reports.verdict.pairs import Looks, arms_of, comparison, line_of, side_row
from reports.verdict.permutation import Arms

METRICS = ("prefill", "decode")

#: Pairs beyond those without which nothing can be certain, before the first reading; one may point the wrong way.
FIRST_EXTRA = 2

Tell = Callable[[str], None]

_BAD = ("FAIL", "CRASHED", "TIMEOUT", "UNAVAILABLE")
_ORDER = ("CRASHED", "TIMEOUT", "FAIL", "UNAVAILABLE", "UNSUPPORTED", "PASS")


@dataclass
class Work:
    """One job: its cells, what was measured, and the readings."""

    arguments: argparse.Namespace
    rules: Rules
    request: Request
    planned: Plan
    sides: tuple[Side, Side]
    tell: Tell

    def __post_init__(self) -> None:
        self.run_id = new_run_id()
        self.cells = [Pairs(cell) for cell in self.planned.cells]
        self.looks: Looks = Looks(self.rules)
        self.parity: list[Judged] = []
        self.said: list[str] = []
        self.seed = self.request.seed or secrets.randbits(32)
        self.top = self.sides[1].root if self.arguments.head is None else top_of(Path(self.arguments.repository))

    def go(self) -> bool:
        """Parity of both sides, then pairs; whether it was interrupted.

        Read after a number of pairs known beforehand, and each time as many again; the last of ``looks`` readings is
        kept for when the time is over. What is read has no say in when it is.
        """
        try:
            self._judge_parity()
            for cell, judged in zip(self.cells, self.parity, strict=True):
                cell.done = judged.base in _BAD or judged.head in _BAD  # what is wrong has no speed
            spec = {"metrics": METRICS, "repeats": self.arguments.repeats, "seed": self.request.seed}
            job = Job(self.sides, spec, self.backend_of, self.seed, measure, _together)
            deadline = time.monotonic() + 60 * self.arguments.minutes
            at, read = self.first_look(), 0
            for pairs in rounds(job, self.cells, deadline, self.tell):
                if pairs < at or read == self.rules.looks - 1:
                    continue
                self._look()
                at, read = 2 * at, read + 1
            if any(cell.open for cell in self.cells):
                self._look()  # the time is over
        except KeyboardInterrupt:
            self._look()
            return True
        return False

    def first_look(self) -> int:
        """Pairs before the first reading."""
        tests = len(METRICS) * len([cell for cell in self.cells if cell.open])
        return fewest(self.rules.of_one(tests), paired=True) + FIRST_EXTRA

    def backend_of(self, side: Side, backend: str) -> str:
        """What ``side`` calls a backend."""
        return within(side, self.top, backend)

    def _look(self) -> None:
        arms = {key: arms for key, arms in self.arms().items() if min(arms.sizes)}
        answers = self.looks.read(arms)
        for i, cell in enumerate(self.cells):
            answered = [answers[i, metric].decision != UNDECIDED for metric in METRICS if (i, metric) in answers]
            cell.done = cell.done or (len(answered) == len(METRICS) and all(answered))

    def arms(self) -> dict[tuple[int, str], Arms]:
        """Cell and metric -> its pairs."""
        return {
            (i, metric): arms_of(*([pair[side].ns[metric] for pair in cell.pairs] for side in (0, 1)))
            for i, cell in enumerate(self.cells)
            for metric in METRICS
            if cell.pairs
        }

    def _judge_parity(self) -> None:
        found: dict[int, dict[str, tuple[str, str]]] = {i: {} for i in range(len(self.cells))}
        for side in self.sides:
            for options, numbers in self._parity_options(side):
                self.tell(f"parity of {side.name}")
                try:
                    rows = parity_rows(side, options)
                except BlockFailed as error:
                    rows = []
                    self.said.append(f"parity of {side.name} cannot be judged: {error}")
                for i in numbers:
                    cell = self.cells[i].cell
                    own = [row for row in rows if row["scheme"] == cell.scheme and row.get("verdict")]
                    if own:
                        worst = min(own, key=lambda row: _ORDER.index(row["verdict"]))
                        found[i][side.name] = (worst["verdict"], worst.get("reason") or "")
        for i, by_side in found.items():
            base, head = (by_side.get(side.name) for side in self.sides)
            why = (head or base or ("", ""))[1]
            row = self.row(self.cells[i].cell, "parity")
            self.parity.append(Judged(names_of(row), base and base[0], head and head[0], why, True))

    def _parity_options(self, side: Side) -> list[tuple[list[str], list[int]]]:
        """One call for each backend and model of the plan, and the cells it answers."""
        calls: dict[tuple[Any, ...], list[int]] = {}
        for i, pairs in enumerate(self.cells):
            cell = pairs.cell
            calls.setdefault((cell.backend, cell.model, cell.hardware.device, cell.threads), []).append(i)
        found = []
        for (backend, model, device, threads), numbers in calls.items():
            schemes = ",".join(self.cells[i].cell.scheme for i in numbers)
            words = ["--backend", self.backend_of(side, backend), "--model", model, "--quant", schemes]
            words += ["--device", device, "--threads", str(threads), "--seed", str(self.request.seed)]
            work = self.request.workload
            words += ["--prompt-tokens", str(work.prompt_tokens), "--decode-tokens", str(work.decode_tokens)]
            found.append((words, numbers))
        return found

    def row(self, cell: Cell, metric: str) -> Row:
        """A row of a cell without its figures."""
        job = RunJob(replace(self.request, isolate=True), Sampling(self.arguments.repeats or LEAST), self.run_id)
        model = open_model(cell.model, self.request.seed)
        return replace(base_row(cell, model, job), metric=metric, unit="", command=None)

    def comparison(self) -> Comparison:
        """What has been found so far."""
        arms, lines = self.arms(), []
        notes = [f"order of the pairs: seed {self.seed}"]
        parity, missing = list(self.parity), []
        for judged in parity:
            if judged.base == "PASS" and judged.head is None:
                missing.append(f"{judged.names['backend']} {judged.names['scheme']}: not judged in head")
        for i, cell in enumerate(self.cells):
            for metric in METRICS:
                if (i, metric) in self.looks.answers and not cell.wrong:
                    row = self.row(cell.cell, metric)
                    lines.append(line_of(row, arms[i, metric], self.looks.answers[i, metric]))
            label = f"{cell.cell.backend} {cell.cell.scheme}"
            if cell.crowded and not cell.failed:
                notes.append(f"{label}: each side alone, one after the other, since beside the other {cell.crowded}")
            for name, error in cell.failed.items():
                is_what = "is wrong" if isinstance(error, BlockWrong) else "cannot be measured"
                notes.append(f"{label} {is_what} in {name}: {error}")
                told = parity[i]
                verdicts = {BASE: told.base, HEAD: told.head, name: error.verdict}
                parity[i] = replace(told, base=verdicts[BASE], head=verdicts[HEAD], why=str(error))
            if BASE in cell.failed:
                missing.append(f"{label}: {cell.failed[BASE]}")
        names = (f"{self.sides[0].revision}", f"{self.sides[1].revision}")
        return comparison(names, self.rules, lines, parity, notes, missing)

    def rows(self) -> list[Row]:
        """Everything measured: a row for each side, cell and metric; of a side that is wrong, that it is."""
        return [
            self._side_row(i, number, metric)
            for i, cell in enumerate(self.cells)
            for number in (0, 1)
            for metric in METRICS
            if cell.pairs or isinstance(cell.failed.get(self.sides[number].name), BlockWrong)
        ]

    def _side_row(self, i: int, number: int, metric: str) -> Row:
        """All blocks of one side; of a wrong one, its verdict in their place."""
        cell, side = self.cells[i], self.sides[number]
        about = {"side": side.name, "revision": side.revision, "head_first": cell.head_first}
        row = replace(self.row(cell.cell, metric), isolated=True, extra={"revision": side.commit})
        error = cell.failed.get(side.name)
        if isinstance(error, BlockWrong):
            return replace(row, verdict=error.verdict, reason=f"no speed: {error}", extra={**row.extra, "ab": about})
        judged = self.parity[i]
        row = replace(row, verdict=(judged.base, judged.head)[number])
        if cell.pairs:
            last = cell.pairs[-1][number]
            row = replace(row, driver=last.drivers[metric], backend_version=last.version)
        return side_row(row, [pair[number].ns[metric] for pair in cell.pairs], about)


def _together(cell: Cell) -> bool:
    """Whether memory holds both sides; how much a GPU has left for the other is not known."""
    needed = memory_needed(cell, model_config(cell.model))
    return cell.hardware.device == "cpu" and 2 * needed <= SHARE * available_bytes()
