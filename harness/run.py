"""Run a plan: load, gate, measure, one row at a time, each handed on as soon as it is known.

A session is judged before it is timed, on the weights it was just loaded with. One that fails has no
speed: its prefill and decode rows carry the verdict instead of a number.
"""

from __future__ import annotations

import gc
import os
import secrets
import shlex
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from backends.api import Unavailable, Unsupported
from harness.budget import shortage
from harness.bundle import save_bundle
from harness.hardware import describe
from harness.measure import (
    MeasureError,
    Samples,
    Sampling,
    measure_decode,
    measure_first_call,
    measure_prefill,
)
from harness.memory import MemorySpan
from harness.models import Model, gate_tokens, open_model
from harness.parity import Gate, gate, length_check, worst
from harness.plan import Cell, Plan, Refused, Request, memory_needed
from harness.rows import Row, RowError
from harness.session import Opened, open_session
from harness.stats import derived
from harness.store import StoreError
from harness.tolerance import Truth, derive
from harness.trace_point import first_bad_point
from reference.config import Config
from reference.errors import ConfigError, InputError
from reference.schemes import SCHEMES, apply, stored_bytes

#: Length of the parity gate's prompt; the bound needs at least 32 positions.
GATE_TOKENS = 48

#: Called with each finished row and whether its cell was asked for by name.
Emit = Callable[[Row, bool], None]
#: Called with the cell that starts and with what it is doing.
Tell = Callable[[Cell, str], None]


@dataclass(frozen=True)
class Job:
    """What to do with each cell: ``sampling`` is ``None`` where only verdicts are wanted."""

    request: Request
    sampling: Sampling | None
    run: str


def new_run_id() -> str:
    """Names one invocation: UTC time and four random bytes."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(4)


def run(plan: Plan, job: Job, emit: Emit, tell: Tell) -> None:
    """Run every cell in order. Whatever one cell does, the next one runs; only Ctrl-C goes through."""
    models: dict[str, Model] = {}
    for refusal in plan.refused:
        emit(_refused(refusal, job), refusal.by_name)
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
    """All rows of one cell. A backend that raises becomes a row that says so."""
    tell(cell, "loading")
    base = _base(cell, model, job)
    short = shortage(memory_needed(cell, model.config), cell.hardware.device)
    if short:
        emit(replace(base, verdict="UNAVAILABLE", reason=short))
        return
    span = MemorySpan()
    try:
        with open_session(cell.backend, model, cell.scheme, cell.hardware.device, cell.threads) as opened:
            _judge_and_measure(cell, model, job, opened, base, span, emit, tell)
    except (RowError, StoreError):
        raise  # ours, not the backend's
    except (Unavailable, Unsupported, InputError) as error:
        verdict = "UNAVAILABLE" if isinstance(error, Unavailable) else "UNSUPPORTED"
        emit(replace(base, verdict=verdict, reason=str(error)))
    except MeasureError as error:
        emit(replace(base, verdict="FAIL", reason=str(error)))
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and the next cell must run
        where = save_bundle(job.run, str(cell), {"traceback": traceback.format_exc()})
        reason = f"{type(error).__name__}: {error}".splitlines()[0] + f"; traceback in {where}"
        emit(replace(base, verdict="CRASHED", reason=reason))
    finally:
        span.close()
        gc.collect()


def _judge_and_measure(
    cell: Cell,
    model: Model,
    job: Job,
    opened: Opened,
    base: Row,
    span: MemorySpan,
    emit: Callable[[Row], None],
    tell: Tell,
) -> None:
    base = replace(base, backend_version=opened.version, arithmetic=_arithmetic_text(opened))
    prompt = gate_tokens(model, max(GATE_TOKENS, cell.workload.prompt_tokens), job.request.seed)
    timed = prompt[: cell.workload.prompt_tokens]
    first: Samples | None = None
    if job.sampling is not None:
        tell(cell, "first call")
        first = measure_first_call(opened.session, timed)
    load_peak = span.peak().growth_bytes
    tell(cell, "deriving the bound")
    truth = derive(model.weights, cell.scheme, opened.arithmetic, prompt[:GATE_TOKENS], model.sha256)
    tell(cell, "parity")
    found = gate(opened.session, truth)
    if found.passed and len(timed) > GATE_TOKENS:
        found = Gate((*found.logits, length_check(opened.session, timed, truth)), found.state)
    rows = _parity_rows(base, found)
    if not found.passed:
        rows[0] = _explained(rows[0], cell, model, job, opened, truth, found)
    for row in rows:
        emit(row)
    span.forget()  # what the reference needed is not the backend's
    if job.sampling is None or first is None:
        return
    emit(_timed_row(base, "load", (opened.load_ns,), found, load_peak))
    emit(_timed_row(base, "first_call", first.ns, found, load_peak))
    if not found.passed:
        for metric in ("prefill", "decode"):
            emit(replace(base, metric=metric, unit="", verdict="FAIL", reason=f"not timed: {found.first_bad}"))
        return
    tell(cell, "prefill")
    prefill = measure_prefill(opened.session, timed, job.sampling)
    emit(_sampled(base, "prefill", prefill, span))
    emit(_sampled(base, "time_to_first_token", replace(prefill, ns=prefill.first_token_ns), span))
    tell(cell, "decode")
    decode = measure_decode(opened.session, timed, cell.workload.decode_tokens, job.sampling)
    emit(_sampled(base, "decode", decode, span))


def _explained(row: Row, cell: Cell, model: Model, job: Job, opened: Opened, truth: Truth, found: Gate) -> Row:
    """A failing parity row with the trace point where it begins, if the backend shows any, and its bundle."""
    point = first_bad_point(opened.session, apply(model.weights, cell.scheme), opened.arithmetic, truth.tokens)
    where = f"; {point}" if point else ""
    first_bad = {**(row.first_bad or {}), "point": point.name if point else None}
    bundle = _bundle(cell, job, opened, truth, found)
    return replace(row, reason=f"{row.reason}{where}; bundle {bundle}", first_bad=first_bad)


def _base(cell: Cell, model: Model, job: Job) -> Row:
    """The fields that all rows of a cell share; as it stands, a parity row without a verdict."""
    config = model.config
    scheme = SCHEMES.get(cell.scheme)
    return Row(
        kind="measured",
        run=job.run,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        hardware=cell.hardware.name,
        hardware_detail=describe(cell.hardware),
        backend=cell.backend,
        model=cell.model,
        model_sha256=model.sha256,
        synthetic=model.weights.synthetic,
        config=vars(config),
        scheme=cell.scheme,
        scheme_class=scheme.scheme_class if scheme else None,
        device=cell.hardware.device,
        threads=cell.threads,
        isolated=False,
        workload=cell.workload,
        metric="parity",
        weight_bytes=_weight_bytes(config, cell.scheme),
        command=reproduce(cell, job),
        reason="not run",
    )


def reproduce(cell: Cell, job: Job) -> str:
    """The command line that runs this one cell again."""
    work = cell.workload
    words = ["rwkv-bench", "run" if job.sampling else "parity", "--model", cell.model, "--backend", cell.backend]
    words += ["--quant", cell.scheme, "--device", cell.hardware.device, "--threads", str(cell.threads)]
    if job.sampling:
        words += ["--prompt-tokens", str(work.prompt_tokens), "--decode-tokens", str(work.decode_tokens)]
        words += ["--repeats", str(job.sampling.repeats)]
    if job.request.seed:
        words += ["--seed", str(job.request.seed)]
    return shlex.join(words)


def _parity_rows(base: Row, found: Gate) -> list[Row]:
    rows = []
    for metric, checks in (("parity", found.logits), ("state_parity", found.state)):
        if not checks:
            continue
        bad = next((check for check in checks if not check.passed), None)
        shown = bad or worst(checks)
        reason = str(shown)
        if metric == "parity" and found.loose:
            reason += "; the declared arithmetic is much looser than this error"
        rows.append(
            replace(
                base,
                metric=metric,
                unit="",
                value=None if shown.problem else shown.error,
                error=None if shown.problem else shown.error,
                bound=None if shown.problem else shown.bound,
                verdict="FAIL" if bad else "PASS",
                reason=reason,
                first_bad={"check": bad.name, "where": bad.where, "problem": bad.problem} if bad else None,
            )
        )
    return rows


def _timed_row(base: Row, metric: str, ns: Sequence[int], found: Gate, peak: int | None) -> Row:
    verdict = "PASS" if found.passed else "FAIL"
    row = replace(base, metric=metric, unit="", samples=tuple(ns), verdict=verdict, reason=None)
    return replace(derived(row), peak_bytes=peak, stopped="single call")


def _sampled(base: Row, metric: str, samples: Samples, span: MemorySpan) -> Row:
    if samples.non_finite_at is not None:
        return replace(base, metric=metric, unit="", verdict="FAIL", reason=str(samples.non_finite_at))
    row = replace(
        base,
        metric=metric,
        unit="",
        samples=samples.ns,
        steps=samples.steps or None,
        driver=samples.driver,
        stopped=samples.stopped,
        peak_bytes=span.peak().growth_bytes,
        verdict="PASS",
        reason="token ids varied between repeats" if samples.ids_varied else None,
    )
    return derived(row)


def _refused(refusal: Refused, job: Job) -> Row:
    return Row(
        kind="measured",
        run=job.run,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        hardware=refusal.hardware,
        backend=refusal.backend,
        model=refusal.model,
        scheme=refusal.scheme,
        metric="parity",
        verdict=refusal.verdict,
        reason=refusal.reason,
    )


def _weight_bytes(config: Config, scheme: str) -> int | None:
    """Stored size; None for a scheme that has no codec or does not fit the shapes, which loading then says."""
    try:
        return stored_bytes(config, scheme)
    except ConfigError:
        return None


def _arithmetic_text(opened: Opened) -> str:
    return str(opened.arithmetic) + ("" if opened.info.arithmetic_documented else " (declared, unverified)")


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
