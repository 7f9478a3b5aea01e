"""Commands that measure or read rows: stored as they come, then shown as a table."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from harness.commands.deliver import counted, deliver, shape, write_rows
from harness.console import columns, fail, say
from harness.options import UsageError, command_file, output_format

if TYPE_CHECKING:
    from pathlib import Path

    from harness.cell_rows import Job
    from harness.collect import Collector
    from harness.inventory import Phone
    from harness.measure import Sampling
    from harness.plan import Cell, Plan, Request
    from harness.rows import Row


def run(arguments: Namespace) -> int:
    """``run`` and ``parity``: measure every cell, then print the table."""
    from harness.asked import requested, sampling_of
    from harness.cell_rows import Job
    from harness.collect import store_path
    from harness.length_rows import length_rows
    from harness.phone_runs import phones_of
    from harness.plan import plan
    from harness.recorded import every_recorded, measured_rows, recorded_rows
    from harness.run import new_run_id
    from harness.run import run as run_plan
    from harness.sweep import swept
    from reports.output import check_output
    from reports.prediction import predicted_rows
    from reports.published import claims_of, published_rows
    from reports.tables import summary

    phones = phones_of(arguments.hardware)
    if phones:
        return _run_phones(phones, arguments)
    request, sampling = requested(arguments), sampling_of(arguments)
    planned = swept(plan(request), getattr(arguments, "sweep", None))
    if arguments.dry_run:
        return _dry_run(request, planned, sampling, arguments)
    store = store_path(arguments.store, make=bool(planned.cells or planned.refused))
    check_output(arguments.output, store)
    job = Job(request, sampling, new_run_id())
    left, taken = _left_of(planned, store, job) if getattr(arguments, "resume", False) else (planned, ())
    collector, stopped = _collect(left, store, partial(run_plan, left, job), summary)
    added = len(collector.rows)
    collector.take_over(taken, request.explicit)
    slopes = length_rows(collector.rows)
    if stopped is None and added:
        added += _store_all(store, slopes)
    known = [row for name in planned.absent for row in recorded_rows(store, name, request.schemes)]
    for name in planned.absent:
        known += published_rows(name, request.schemes, measured_rows(store, name))
        known += predicted_rows(name, request.models, request.schemes, every_recorded(store))
    known += [*claims_of(collector.rows), *slopes]
    try:
        write_rows([*collector.rows, *known], arguments)
    except BrokenPipeError:
        pass  # nobody reads the table any more; the exit status still counts
    finally:
        if added:
            say(f"{counted(added)} added to {store}")
    if stopped is not None:
        raise stopped
    others = {row.hardware for row in known if row.kind in ("recorded", "published")}
    return _status(request, planned, collector, others)


def quality(arguments: Namespace) -> int:
    """``quality``: how far every cell is from the fp32 weights on a text, then the table."""
    from harness.collect import store_path
    from harness.quality import work
    from reports.output import check_output
    from reports.quality_table import formatted, summary

    command = command_file("quality")
    command.refuse_phones(arguments)
    asked, request = command.asked(arguments), command.requested(arguments)
    planned = command.planned(request, asked)
    if arguments.dry_run:
        return _dry_run(request, planned, None, arguments, command.seconds(planned, asked))
    store = store_path(arguments.store, make=bool(planned.cells or planned.refused))
    check_output(arguments.output, store)
    job = command.job(request, asked)
    collector, stopped = _collect(planned, store, partial(work.run, planned, job, asked), summary)
    try:
        if collector.rows or stopped is None:
            deliver(formatted(collector.rows, output_format(arguments), *shape(arguments)), arguments.output)
    except BrokenPipeError:
        pass  # nobody reads the table any more; the exit status still counts
    finally:
        if collector.rows:
            say(f"{counted(len(collector.rows))} added to {store}")
    if stopped is not None:
        raise stopped
    return _status(request, planned, collector, set())


def import_figures(arguments: Namespace) -> int:
    """``import``: another program's figures, stored and shown."""
    from harness.collect import store_path
    from harness.store import append
    from reports.output import check_output

    rows = command_file("import").run(arguments, say)
    store = store_path(arguments.store)
    check_output(arguments.output, store)
    for row in rows:
        append(store, row)
    write_rows(rows, arguments)
    say(f"{counted(len(rows))} added to {store}")
    return 0


def _run_phones(phones: Sequence[Phone], arguments: Namespace) -> int:
    """What programs on phones print, as recorded rows."""
    from harness.collect import store_path
    from harness.live import LiveLine
    from harness.phone_runs import run_phones
    from harness.status import exit_code, row_code
    from harness.store import append
    from reports.output import check_output

    store = store_path(arguments.store)
    check_output(arguments.output, store)
    rows: list[Row] = []
    with LiveLine(sys.stderr) as line:
        for row in run_phones(phones, arguments, line.show):
            append(store, row)
            rows.append(row)
            line.done(f"{row.hardware} {row.scheme}: {row.verdict or row.metric} {row.reason or ''}")
    write_rows(rows, arguments)
    say(f"{counted(len(rows))} added to {store}")
    return exit_code([row_code(row, True) for row in rows])


def _store_all(store: Path, rows: Sequence[Row]) -> int:
    """Append them; how many there were."""
    from harness.store import append

    for row in rows:
        append(store, row)
    return len(rows)


def _left_of(planned: Plan, store: Path, job: Job) -> tuple[Plan, tuple[Row, ...]]:
    """The plan without the cells that the store has finished, and their rows; says which those are."""
    from harness.models import open_model
    from harness.resume import earlier, session

    assert job.sampling is not None
    contents = {cell.model: open_model(cell.model, job.request.seed).sha256 for cell in planned.cells}
    asked = partial(session, request=job.request, sampling=job.sampling)
    found = earlier(store, planned.cells, lambda cell: asked(cell, contents[cell.model]))
    say(found.message)
    return replace(planned, cells=found.left), found.rows


def _collect(
    planned: Plan, store: Path, work: Callable[..., None], summary: Callable[[Sequence[Row]], str]
) -> tuple[Collector, BaseException | None]:
    """``work(add, tell)`` over the plan; what ended it early is returned: what has been measured is printed first."""
    from harness.collect import Collector
    from harness.progress import Progress
    from reference.errors import InputError

    with Progress(sys.stderr, planned.cells, sys.stderr.isatty()) as progress:
        collector = Collector(store, progress, summary)
        stopped: BaseException | None = None
        try:
            work(collector.add, collector.tell)
        except (KeyboardInterrupt, InputError) as error:
            stopped = error
        collector.finish()
    return collector, stopped


def _status(request: Request, planned: Plan, collector: Collector, known: set[str]) -> int:
    """Exit status of a finished run, with a line for what was asked by name and nothing ran for."""
    from harness.status import NOT_AVAILABLE, exit_code, ran, row_code, unmet
    from reports.published import published_rows

    codes = [row_code(row, named) for row, named in zip(collector.rows, collector.named, strict=True)]
    found = ran(collector.rows)
    missing = unmet(request, found, planned.absent) if collector.rows else []
    codes += [NOT_AVAILABLE] * bool(missing)
    if missing and found:
        say(f"nothing ran for {', '.join(missing)}")
    for name in planned.absent:
        others = ", ".join(dict.fromkeys(row.scheme for row in published_rows(name)))
        lacking = f"its published figures are of {others}" if others else "and no figures of it are published here"
        what = "only recorded, published and predicted figures are shown" if name in known else lacking
        codes.append(fail(f"{name} is not in this machine; nothing was measured on it, {what}", NOT_AVAILABLE))
    return exit_code(codes)


def _dry_run(
    request: Request,
    planned: Plan,
    sampling: Sampling | None,
    arguments: Namespace,
    more: Callable[[Cell], float] = lambda cell: 0.0,
) -> int:
    """``more``: seconds of a cell beyond what ``run`` does with it."""
    from harness.dry_run import for_people, foresee, records, total, would_run
    from harness.status import NOT_AVAILABLE, exit_code, unmet
    from reports.records import as_json, as_text

    kind = output_format(arguments)
    if kind not in ("table", "json"):
        raise UsageError(f"--dry-run has --format table or json, not {kind}")
    cells = [replace(it, seconds=it.seconds + more(it.cell)) for it in foresee(planned, sampling)]
    found = records(planned, cells)
    width = None if arguments.output else columns()
    table = (as_text({"cells": for_people(found)}, width) if found else "") + total(cells) + "\n"
    deliver(as_json({"cells": found}) if kind == "json" else table, arguments.output)
    named = [NOT_AVAILABLE for refusal in planned.refused if refusal.by_name]
    missing = bool(planned.absent or unmet(request, would_run(cells)))
    return exit_code([*named, NOT_AVAILABLE] if missing else named)
