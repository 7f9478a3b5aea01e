"""Run a plan: load, gate, measure, one row at a time, each handed on as soon as it is known.

A session is judged before it is timed, on the weights it was just loaded with. One that fails has no
speed: its prefill and decode rows carry the verdict instead of a number.
"""

from __future__ import annotations

import gc
import os
import secrets
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from backends.api import Session, Unavailable, Unsupported
from backends.index import LIBRARIES
from harness import inventory
from harness.budget import shortage
from harness.bundle import save_bundle
from harness.cell_rows import (
    Job,
    arithmetic_text,
    base_row,
    itself_rows,
    no_speed_row,
    parity_rows,
    quality_rows,
    refused_row,
    reproduce,
    sampled_row,
    timed_row,
    unjudged,
)
from harness.checks import Check
from harness.isolation.child import ChildDied, ChildTimedOut
from harness.isolation.remote import RemoteError
from harness.measure import MeasureError, Samples, Sampling
from harness.models import Model, gate_tokens, open_model
from harness.names import one_line
from harness.parity import Gate, gate
from harness.plan import Cell, Plan, memory_needed
from harness.roofline_rows import Roofline
from harness.rows import Row, RowError
from harness.session import Apart, Opened, open_session
from harness.store import StoreError
from harness.timed_check import decode_checks, prefill_checks, returned_check, timed_length
from harness.tolerance import Truth
from harness.trace_point import first_bad_point
from harness.without_codec import NotComparable, has_codec, quality, truth_for
from reference.errors import CheckpointError, InputError
from reference.numerics import Arithmetic
from reference.schemes import apply

#: Length of the parity gate's prompt; the bound needs at least 32 positions.
GATE_TOKENS = 48

#: Called with each finished row and whether its cell was asked for by name.
Emit = Callable[[Row, bool], None]
#: Called with the cell that starts and with what it is doing.
Tell = Callable[[Cell, str], None]


def new_run_id() -> str:
    """Names one invocation: UTC time and four random bytes."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(4)


def run(plan: Plan, job: Job, emit: Emit, tell: Tell) -> None:
    """Run every cell in order. Whatever one cell does, the next one runs; only Ctrl-C goes through."""
    models: dict[str, Model] = {}
    for refusal in plan.refused:
        emit(refused_row(refusal, job), refusal.by_name)
    for cell in plan.cells:
        if cell.model not in models:
            tell(cell, "opening the model")
            models.clear()  # one model at a time: two 7B checkpoints do not fit
            gc.collect()
            models[cell.model] = open_model(cell.model, job.request.seed)
        run_cell(cell, models[cell.model], job, partial(_emit_named, emit, job.request.explicit), tell)


def _emit_named(emit: Emit, named: bool, row: Row) -> None:
    emit(row, named)


def run_cell(cell: Cell, model: Model, job: Job, emit: Callable[[Row], None], tell: Tell) -> None:
    """All rows of one cell. A backend that raises, dies or hangs becomes a row that says so."""
    tell(cell, "loading")
    base = base_row(cell, model, job)
    free = cell.hardware.facts.get("free_bytes")  # of a host, as it was when it was asked
    short = shortage(memory_needed(cell, model.config), cell.hardware.device, None if free is None else int(free))
    if short:
        emit(replace(base, verdict="UNAVAILABLE", reason=short))
        return
    work = _Work(cell, model, job, emit, partial(tell, cell))
    try:
        with open_session(
            cell.backend,
            model,
            cell.scheme,
            cell.hardware.device,
            cell.threads,
            job.request.isolate,
            apart_of(cell, job),
            work.tell,
        ) as opened:
            work.judge_and_measure(opened, base)
    except (RowError, StoreError):
        raise  # ours, not the backend's
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and the next cell must run
        emit(failure_row(error, base, cell, job, work.metric))
    finally:
        gc.collect()


def failure_row(error: Exception, base: Row, cell: Cell, job: Job, metric: str) -> Row:
    """What an exception of a cell comes to; ``metric`` is what a row would have been about.

    A library of the user's that is none, or another model's, is bad input: the row names it in ``first_bad``.
    """
    verdict, reason = verdict_of(error, cell, job)
    library = os.environ.get(LIBRARIES.get(cell.backend, ""), "")
    named = isinstance(error, CheckpointError) and bool(library)  # the model itself was opened before
    return replace(
        base,
        metric="parity" if verdict in ("UNAVAILABLE", "UNSUPPORTED") else metric,
        unit="",
        verdict=verdict,
        reason=one_line(reason),
        first_bad={"library": library} if named else None,
    )


def apart_of(cell: Cell, job: Job) -> Apart | None:
    request = job.request
    host = inventory.load().hosts[cell.hardware.host] if cell.hardware.host else None
    if host is None and request.timeout is None and request.placement is None:
        return None
    return Apart(request.timeout, request.placement, host)


def verdict_of(error: Exception, cell: Cell, job: Job) -> tuple[str, str]:
    """What an exception of a cell makes of it, and why."""
    if isinstance(error, Unavailable):
        return "UNAVAILABLE", str(error)
    if isinstance(error, (Unsupported, InputError)):
        return "UNSUPPORTED", str(error)
    if isinstance(error, (MeasureError, NotComparable)):
        return "FAIL", str(error)
    if isinstance(error, ChildTimedOut):
        return "TIMEOUT", str(error)
    if isinstance(error, ChildDied):
        return "CRASHED", str(error)
    remote = isinstance(error, RemoteError)
    lines = error.traceback if isinstance(error, RemoteError) else traceback.format_exc()
    where = save_bundle(job.run, str(cell), {"traceback": lines})
    what = one_line(str(error) if remote else f"{type(error).__name__}: {error}").rstrip(": ")
    return "CRASHED", f"{what}; traceback in {where}"


@dataclass
class _Work:
    """One cell at work. ``metric`` is what a row would be about, should it end now."""

    cell: Cell
    model: Model
    job: Job
    emit: Callable[[Row], None]
    tell: Callable[[str], None]
    metric: str = "load"

    def judge_and_measure(self, opened: Opened, base: Row) -> None:
        cell, job, model, session = self.cell, self.job, self.model, opened.session
        base = replace(
            base,
            backend_version=opened.version,
            arithmetic=arithmetic_text(opened),
            isolated=opened.isolated,
            cpus=opened.cpus,
        )
        prompt = gate_tokens(model, max(GATE_TOKENS, cell.workload.prompt_tokens), job.request.seed)
        timed = prompt[: cell.workload.prompt_tokens]
        first: Samples | None = None
        if job.sampling is not None:
            self._begin("first_call", "first call")
            first = opened.meter.first_call(timed)
        load_peak = opened.meter.peak_bytes()
        self._begin("parity", "deriving the bound")
        known = has_codec(cell.scheme)
        judged, arithmetic = prompt[:GATE_TOKENS], opened.arithmetic
        truth = truth_for(session, model.weights, cell.scheme, arithmetic, judged, model.sha256)
        self.tell("parity")
        found = _judge(cell, model, session, arithmetic, truth, timed, first)
        rows = parity_rows(base, found, truth) if known else itself_rows(base, found)
        if not found.passed:
            rows[0] = _explained(rows[0], cell, model, job, opened, truth, found)
        for row in rows:
            self.emit(row)
        if not known and found.passed:
            self.tell("quality")
            rows = quality_rows(base, quality(session, model.weights, cell.scheme, timed))
            for row in rows:
                self.emit(row)
            if rows[0].verdict != "PASS":
                if job.sampling is not None:
                    self._no_speed(base, f"not timed: {rows[0].reason}")
                return
        opened.meter.forget()  # what the reference needed is not the backend's
        if job.sampling is None or first is None:
            return
        self._figure(timed_row(base, "load", (opened.load_ns,), found, load_peak))
        self._figure(timed_row(base, "first_call", first.ns, found, load_peak))
        if not found.passed:
            self._no_speed(base, f"not timed: {found.first_bad}")
            return
        self._measure(opened, base, truth, timed, job.sampling)

    def _measure(self, opened: Opened, base: Row, truth: Truth, timed: Sequence[int], sampling: Sampling) -> None:
        """Prefill and decode; a decode after a prefill that went wrong has no speed either."""
        roofline = Roofline(self.cell.hardware, self.cell.threads, self.model.config, opened, self.tell)
        self._begin("prefill", "prefill")
        prefill = opened.meter.prefill(timed, sampling, lambda text: self.tell(f"prefill, {text}"))
        peak = opened.meter.peak_bytes()
        bad = _first_bad(prefill_checks(opened.session, truth, prefill))
        if bad is not None:
            self._no_speed(base, f"no speed: {bad}")
            return
        self._figure(roofline.of(sampled_row(base, "prefill", prefill, peak)))
        self._figure(sampled_row(base, "time_to_first_token", replace(prefill, ns=prefill.first_token_ns), peak))
        self._begin("decode", "decode")
        steps = self.cell.workload.decode_tokens
        decode = opened.meter.decode(timed, steps, sampling, lambda text: self.tell(f"decode, {text}"))
        peak = opened.meter.peak_bytes()
        bad = _first_bad(decode_checks(opened.session, timed, truth, decode))
        row = sampled_row(base, "decode", decode, peak) if bad is None else None
        self._figure(roofline.of(row) if row else no_speed_row(base, "decode", f"no speed: {bad}"))

    def _figure(self, row: Row) -> None:
        """A time or a speed; of a kernel that nobody could judge it is no PASS."""
        self.emit(row if has_codec(self.cell.scheme) else unjudged(row))

    def _no_speed(self, base: Row, why: str) -> None:
        for metric in ("prefill", "decode"):
            self.emit(no_speed_row(base, metric, why))

    def _begin(self, metric: str, phase: str) -> None:
        self.metric = metric
        self.tell(phase)


def _first_bad(checks: Sequence[Check]) -> Check | None:
    return next((check for check in checks if not check.passed), None)


def _judge(
    cell: Cell,
    model: Model,
    session: Session,
    arithmetic: Arithmetic,
    truth: Truth,
    timed: Sequence[int],
    first: Samples | None,
) -> Gate:
    """The gate, the timed length, and what the first call gave."""
    found = gate(session, truth)
    checks = list(found.logits)
    if found.passed:
        checks.append(timed_length(session, model.weights, cell.scheme, arithmetic, timed, truth, model.sha256))
        if first is not None:
            checks.append(returned_check("first call", session, truth, first))
    return Gate(tuple(checks), found.state)


def _explained(row: Row, cell: Cell, model: Model, job: Job, opened: Opened, truth: Truth, found: Gate) -> Row:
    """A failing parity row with the trace point where it begins, if the backend shows any, and its bundle."""
    known = has_codec(cell.scheme)
    stored = apply(model.weights, cell.scheme) if known else None
    point = None if stored is None else first_bad_point(opened.session, stored, opened.arithmetic, truth.tokens)
    where = f"; {point}" if point else ""
    first_bad = {**(row.first_bad or {}), "point": point.name if point else None}
    bundle = _bundle(cell, job, opened, truth, found)
    return replace(row, reason=f"{row.reason}{where}; bundle {bundle}", first_bad=first_bad)


def _bundle(cell: Cell, job: Job, opened: Opened, truth: Truth, found: Gate) -> str:
    """What a failing cell leaves behind: the prompt, truth, what the backend gave, and every check."""
    content: dict[str, Any] = {
        "checks": "\n".join(str(check) for check in (*found.logits, *found.state)),
        "command": reproduce(cell, job),
        "tokens": list(truth.tokens),
        "truth_logits": truth.logits,
        "truth_state": truth.state,
    }
    return os.fspath(save_bundle(job.run, str(cell), content, opened.session, truth.tokens))
