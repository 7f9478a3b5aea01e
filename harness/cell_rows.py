"""What a cell found -> its rows."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from backends.index import LIBRARIES, load_backend
from harness.blocks import Blocks, Kept
from harness.checks import Check, worst
from harness.hardware import describe
from harness.measure import Samples, Sampling
from harness.models import Model
from harness.non_finite import checkpoint_holds
from harness.parity import Gate
from harness.plan import Cell, Refused, Request
from harness.resume import session
from harness.revision import revision
from harness.roofline import weight_bytes
from harness.rows import Row
from harness.samples import BUDGET_SECONDS, UNLIMITED
from harness.session import Opened, needs_isolation
from harness.stats import derived
from harness.timed_check import AGAINST_ITSELF
from harness.tolerance import Truth
from harness.without_codec import Quality
from reference.schemes import SCHEMES
from reference.weights import Weights


@dataclass(frozen=True)
class Job:
    """What to do with each cell.

    sampling  ``None`` where nothing is timed
    command   the name of a command other than ``run`` and ``parity``, and its own options
    """

    request: Request
    sampling: Sampling | None
    run: str
    command: tuple[str, ...] = ()


def base_row(cell: Cell, model: Model, job: Job) -> Row:
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
        threads=cell.threads if load_backend(cell.backend).INFO.thread_control else None,
        isolated=cell.hardware.host is not None or runs_apart(cell.backend, job.request),
        workload=cell.workload,
        metric="parity",
        weight_bytes=weight_bytes(config, cell.scheme, model.weights["emb.weight"].stored),
        command=reproduce(cell, job),
        reason="not run",
        session=None if job.sampling is None else session(cell, model.sha256, job.request, job.sampling),
        extra={"revision": commit} if (commit := revision()) else {},
    )


def runs_apart(backend: str, request: Request) -> bool:
    """Whether a backend's cells run in a process of their own."""
    if request.isolate is not None:
        return request.isolate
    return request.timeout is not None or request.placement is not None or needs_isolation(backend)


def reproduce(cell: Cell, job: Job) -> str:
    """The command line that runs this one cell again."""
    work = cell.workload
    name, *own = job.command or ("run" if job.sampling else "parity",)
    words = ["rwkv-bench", name, "--model", cell.model, "--backend", cell.backend]
    if cell.hardware.host:
        words += ["--hardware", cell.hardware.host]
    words += ["--quant", cell.scheme, "--device", cell.hardware.device, "--threads", str(cell.threads)]
    if job.sampling:
        words += ["--prompt-tokens", str(work.prompt_tokens), "--decode-tokens", str(work.decode_tokens)]
        words += _sampling_words(job.sampling)
    if work.batch > 1:
        words += ["--batch", str(work.batch)]
    library = os.environ.get(LIBRARIES.get(cell.backend, ""))
    if library:
        words += ["--library", f"{cell.backend}={library}"]
    if job.request.isolate is not None:
        words.append("--isolate" if job.request.isolate else "--in-process")
    if job.request.timeout is not None:
        words += ["--timeout", f"{job.request.timeout:g}"]
    if job.request.placement is not None:
        words += ["--cpus", str(job.request.placement)]
    if job.request.seed:
        words += ["--seed", str(job.request.seed)]
    return shlex.join([*words, *own])


def _sampling_words(asked: Sampling) -> list[str]:
    """Sampling as options."""
    words = [] if asked.repeats == UNLIMITED else ["--repeats", str(asked.repeats)]
    if asked.precision is not None:
        words += ["--precision", f"{100 * asked.precision:g}%"]
    if asked.budget_s not in (None, BUDGET_SECONDS):
        words += ["--time-budget", f"{2 * (asked.budget_s or 0):g}"]
    return [*words, "--fresh"] if asked.fresh else words


def parity_rows(base: Row, found: Gate, truth: Truth, weights: Weights) -> list[Row]:
    """The verdict on the logits and, where the backend shows it, on the state: the first bad check or the worst.

    weights  the model's own, which are named where they are what is not finite
    """
    rows = []
    for metric, checks in (("parity", found.logits), ("state_parity", found.state)):
        if not checks:
            continue
        bad = next((check for check in checks if not check.passed), None)
        shown = bad or worst(checks)
        reason = str(shown)
        if metric == "parity" and found.loose:
            reason += "; the declared arithmetic is much looser than this error"
        if metric == "parity" and truth.coarse:
            share = f"{100 * truth.e_rms:.0f} % of their spread"
            reason += f"; the declared arithmetic alone moves logits by {share}: only gross faults show"
        if any(check.where.endswith(AGAINST_ITSELF) for check in checks):
            reason += "; the timed length is too long for the reference and is checked against the backend itself only"
        if bad and truth.overflows:
            reason += f"; {checkpoint_holds(weights) or 'the declared arithmetic itself overflows on this model'}"
        rows.append(
            replace(
                base,
                metric=metric,
                unit="",
                value=None if shown.problem else shown.error,
                statistic=None if shown.problem else shown.statistic,
                error=None if shown.problem else shown.error,
                bound=None if shown.problem else shown.bound,
                verdict="FAIL" if bad else "PASS",
                reason=reason,
                first_bad={"check": bad.name, "where": bad.where, "problem": bad.problem} if bad else None,
                checks=[_check_record(check) for check in checks],
            )
        )
    return rows


def _check_record(check: Check) -> dict[str, Any]:
    """One check as JSON; without figures where there were none to take."""
    figures = {"statistic": check.statistic, "error": check.error, "bound": check.bound}
    known = figures if check.problem is None and math.isfinite(check.error) else dict.fromkeys(figures)
    return {"check": check.name, "passed": check.passed, "where": check.where, "problem": check.problem, **known}


def itself_rows(base: Row, found: Gate) -> list[Row]:
    """The verdict of a session whose scheme has no codec here: it was held against itself only."""
    row = replace(base, metric="parity", unit="")
    if found.first_bad is not None:
        bad = found.first_bad
        first_bad = {"check": bad.name, "where": bad.where, "problem": bad.problem}
        return [replace(row, verdict="FAIL", reason=f"against its own single steps, {bad}", first_bad=first_bad)]
    reason = (
        f"no codec for {base.scheme} here, so no kernel parity; against its own single steps, {worst(found.logits)}"
    )
    return [replace(row, verdict="UNSUPPORTED", reason=reason)]


def quality_rows(base: Row, found: Quality) -> list[Row]:
    """Distance from the fp32 weights, scheme and kernel together; the divergence fails beyond its limit."""
    verdict = "PASS" if found.kl_divergence <= found.limit else "FAIL"
    reason = f"divergence {found.kl_divergence:.2g} from the fp32 weights over {found.positions} positions"
    reason += f", limit {found.limit:.2g}"
    metrics = ("kl_divergence", "top1_agreement", "top5_agreement")
    return [
        replace(base, metric=metric, unit="", value=getattr(found, metric), verdict=verdict, reason=reason)
        for metric in metrics
    ]


def unjudged(row: Row) -> Row:
    """A figure of a session whose kernel could not be judged: it stands, without a PASS."""
    if row.verdict != "PASS":
        return row
    return replace(row, verdict="UNSUPPORTED", reason=f"no codec for {row.scheme} here: not judged")


def timed_row(base: Row, metric: str, ns: Sequence[int], found: Gate, peak: int | None) -> Row:
    """A time that cannot be repeated, in ns: load, first call."""
    verdict = "PASS" if found.passed else "FAIL"
    row = replace(base, metric=metric, unit="", samples=tuple(ns), verdict=verdict, reason=None)
    return replace(derived(row), peak_bytes=peak, stopped="single call")


def sampled_row(base: Row, metric: str, samples: Samples, peak: int | None) -> Row:
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
        peak_bytes=peak,
        verdict="PASS",
        reason="token ids varied between repeats" if samples.ids_varied else None,
    )
    return derived(row)


def measured_row(base: Row, metric: str, samples: Samples, found: Blocks, stopped: str, peak: int | None = None) -> Row:
    """The row of a quantity that was measured in turns; ``samples`` are those of the last session only."""
    kept = Kept.of(found)
    samples = replace(
        samples,
        ns=kept.first_token_ns if metric == "time_to_first_token" else kept.ns,
        steps=kept.steps if metric == "decode" else (),
        stopped=stopped,
        non_finite_at=found.non_finite_at or samples.non_finite_at,
    )
    row = sampled_row(base, metric, samples, peak)
    if row.verdict != "PASS":
        return row
    warmup, sampling = kept.warmup_ns or None, found.sampling.to_dict()
    row = replace(row, blocks=kept.blocks, sampling=sampling)
    if metric != "time_to_first_token":
        row = replace(row, warmup=warmup)
    reasons = [text for text in (row.reason, _disturbed(kept)) if text]
    return derived(replace(row, reason="; ".join(reasons) or None))


def _disturbed(kept: Kept) -> str | None:
    """How many blocks were disturbed, by what, and whether they count."""
    why = [reason for reason in kept.why if reason is not None]
    if not why:
        return None
    out = any(block.get("left_out") for block in kept.blocks)
    fate = "left out" if out else "none left out, since too few would remain"
    return f"{len(why)} of {len(kept.why)} blocks disturbed, {fate}: {why[0]}"


def arithmetic_text(opened: Opened) -> str:
    return str(opened.arithmetic) + ("" if opened.info.arithmetic_documented else " (declared, unverified)")


def no_speed_row(base: Row, metric: str, reason: str) -> Row:
    """A wrong backend has no speed: the verdict where the figure would be."""
    return replace(base, metric=metric, unit="", verdict="FAIL", reason=reason)


def refused_row(refusal: Refused, job: Job) -> Row:
    """The row of something that could not be a cell."""
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
