"""Run the steps: each command in a process of its own, so that it takes nothing with it, and none keeps the card.

Rows go to a store of the command's own while they are measured, so that one that is killed loses nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.card import card_of
from harness.gpu_check import record
from harness.gpu_check.steps import LOCALIZED, ROWS, Command, Step
from harness.hardware import Hardware
from harness.names import one_line
from harness.rows import Row, RowError
from harness.status import FAILED, NOT_AVAILABLE, PASSED, row_code
from harness.store import StoreError, read

Emit = Callable[[Row], None]
Tell = Callable[[str], None]
Clock = Callable[[], float]

#: Seconds that a command is given at the least; with less left it is not begun.
LEAST_SECONDS = 5.0

_CLI = "import sys; from harness.cli import main; raise SystemExit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Job:
    """``seconds``: when no command is begun or goes on any more; ``notes``: what rows say of the whole check."""

    run: str
    hardware: Hardware
    seconds: float | None
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a process left: its status (negative: a signal; ``None``: its time was over), and what it printed."""

    status: int | None
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line of stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return one_line(lines[-1]) if lines else "it said nothing"


def run(steps: Sequence[Step], job: Job, emit: Emit, tell: Tell, clock: Clock = time.monotonic) -> None:
    """Every command of every step in order; what one does, the next one runs, and Ctrl-C goes through."""
    end = None if job.seconds is None else clock() + job.seconds
    for step in steps:
        for number, command in enumerate(step.commands, 1):
            tell(f"{step.name} {number} of {len(step.commands)}: {command.backend} {command.scheme}")
            left = None if end is None else end - clock()
            if left is not None and left < LEAST_SECONDS:
                why = f"not run: the budget of {job.seconds:.0f} s is spent; --only {step.name} runs it"
                rows = [record.failed(command, job.hardware, job.run, "UNAVAILABLE", why, line_of(command))]
            else:
                rows = _rows(command, job, left)
            for row in rows:
                emit(record.kept(row, step.name, job.notes))


def _rows(command: Command, job: Job, seconds: float | None) -> list[Row]:
    """What one command measured, and a row that says what went wrong, if anything did."""
    before = card_of(job.hardware.device)
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-gpu-check-") as folder:
        store = Path(folder) / "rows.jsonl"
        answer = answered(argv(command, store), command.environment, seconds)
        rows, lost = _measured(command, store, answer)

    def failed(verdict: str, why: str) -> Row:
        return record.failed(command, job.hardware, job.run, verdict, why, line_of(command))

    if command.kind == LOCALIZED and answer.status in (PASSED, FAILED):
        try:
            rows = [record.localized(command, job.hardware, job.run, json.loads(answer.out), line_of(command))]
        except ValueError as error:
            rows = [failed("CRASHED", f"its answer is no JSON: {error}")]
    elif lost is not None:
        rows.append(failed("CRASHED", lost))
    ended = _ended_badly(command, answer, rows, seconds)
    if ended is not None:
        rows.append(failed(*ended))
    after = card_of(job.hardware.device)
    kept_back, others = record.not_given_back(before, after), record.shared(before, after)
    if kept_back and others:
        note = f"{kept_back}, which may be theirs: the card is {others}"
        rows = [replace(row, extra={**row.extra, "device_memory": note}) for row in rows]
    elif kept_back:
        rows.append(failed("FAIL", kept_back))
    return [record.completed(row, line_of(command), before) for row in rows]


def _ended_badly(command: Command, answer: Answer, rows: list[Row], seconds: float | None) -> tuple[str, str] | None:
    """Verdict and reason of an end that no row of the command accounts for; ``None`` where one does."""
    if answer.status is None:
        return "TIMEOUT", f"ended after {seconds:.0f} s, when the budget was spent; {len(rows)} rows kept"
    if answer.status < 0:
        return "CRASHED", f"killed by {_signal(answer.status)}: {answer.last_words}"
    told = command.kind == LOCALIZED or answer.status in {PASSED, *(row_code(row, True) for row in rows)}
    if rows and told:
        return None
    verdict = "UNAVAILABLE" if answer.status == NOT_AVAILABLE else "CRASHED"
    return verdict, f"exit status {answer.status}: {answer.last_words}"


def _measured(command: Command, store: Path, answer: Answer) -> tuple[list[Row], str | None]:
    """Rows from a command's store or its lines, and why some could not be read."""
    try:
        if command.kind == ROWS:
            return (read(store) if store.exists() else []), None
        lines = answer.out.splitlines() if command.kind != LOCALIZED else []
        return [Row.from_dict(_record(line)) for line in lines if line.startswith("{")], None
    except (RowError, StoreError, ValueError) as error:
        return [], f"its rows cannot be read: {one_line(str(error))}"


def _record(line: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(line)
    found.pop("schema", None)
    return found


def argv(command: Command, store: Path | None) -> list[str]:
    """The process of a command; rows go to ``store``."""
    if command.kind == ROWS:
        return [sys.executable, "-c", _CLI, *command.words, "--store", str(store), "--format", "jsonl"]
    if command.kind == LOCALIZED:
        return [sys.executable, "-c", _CLI, *command.words, "--format", "json"]
    return [sys.executable, "-m", *command.words]


def line_of(command: Command) -> str:
    """What a person types for the same."""
    start = ["rwkv-bench"] if command.kind in (ROWS, LOCALIZED) else ["python", "-m"]
    variables = [f"{name}={value}" for name, value in command.environment.items()]
    return shlex.join([*variables, *start, *command.words])


def answered(words: list[str], environment: Mapping[str, str], seconds: float | None) -> Answer:
    """Run a process in a group of its own, which ends as a whole when ``seconds`` are over or we are interrupted."""
    root = Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
        return Answer(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        out, err = _ended(process)
        return Answer(None, out, err)
    except BaseException:
        _ended(process)
        raise


def _ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """First asked, then killed, with all it has started."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("a killed process ends")


def _signal(status: int) -> str:
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def named(steps: Sequence[Step], only: Sequence[str]) -> tuple[Step, ...]:
    """The steps asked for: by name, or by the beginning of several names, ``throughput``."""
    return tuple(step for step in steps if any(step.name == name or step.name.startswith(f"{name}-") for name in only))
