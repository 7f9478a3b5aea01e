"""``rwkv-bench``: the only place that prints or exits.

    arguments -> plan -> rows, stored as they come -> table

Nothing heavy is imported before the command is known, and no runtime before a cell needs it.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from harness import streams
from harness.console import columns, fail, out, say, show_warning
from harness.interrupt import Terminated, terminable
from harness.options import NotInThisVersion, TextWanted, UsageError, command_file, output_format, parse

if TYPE_CHECKING:
    from pathlib import Path

    from harness.cell_rows import Job
    from harness.collect import Collector
    from harness.conversation import Conversing
    from harness.inventory import Phone
    from harness.measure import Sampling
    from harness.plan import Cell, Plan, Request
    from harness.rows import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    streams.prepare()
    try:
        with terminable(), warnings.catch_warnings():
            warnings.showwarning = show_warning
            return _command(list(sys.argv[1:] if argv is None else argv))
    except Terminated as signal:
        return fail(f"ended by {signal}", 128 + signal.number)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def _command(argv: list[str]) -> int:
    from backends.api import Unavailable, Unsupported
    from backends.index import LIBRARIES
    from harness.status import BAD_INPUT, NOT_AVAILABLE, PASSED
    from reference.errors import InputError

    try:
        try:
            arguments = parse(argv)
        except TextWanted as wanted:
            out(str(wanted))
            return PASSED
        for name, file in getattr(arguments, "library", ()):
            if not os.path.exists(file):
                raise UsageError(f"--library {name}: {file}: no such file or folder")
            os.environ[LIBRARIES[name]] = file  # before the backend is imported: what it offers depends on it
        command = _COMMANDS.get(arguments.command) or _document(arguments.command)
        return command(arguments)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does
        return PASSED
    except (Unavailable, Unsupported, NotInThisVersion) as error:
        return fail(str(error), NOT_AVAILABLE)
    except (UsageError, InputError) as error:
        return fail(str(error), BAD_INPUT)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), BAD_INPUT)


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
        _write_rows([*collector.rows, *known], arguments)
    except BrokenPipeError:
        pass  # nobody reads the table any more; the exit status still counts
    finally:
        if added:
            say(f"{_rows(added)} added to {store}")
    if stopped is not None:
        raise stopped
    others = {row.hardware for row in known if row.kind in ("recorded", "published")}
    return _status(request, planned, collector, others)


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
    _write_rows(rows, arguments)
    say(f"{_rows(len(rows))} added to {store}")
    return exit_code([row_code(row, True) for row in rows])


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
            _deliver(formatted(collector.rows, output_format(arguments), *_shape(arguments)), arguments.output)
    except BrokenPipeError:
        pass  # nobody reads the table any more; the exit status still counts
    finally:
        if collector.rows:
            say(f"{_rows(len(collector.rows))} added to {store}")
    if stopped is not None:
        raise stopped
    return _status(request, planned, collector, set())


def list_what_is_here(arguments: Namespace) -> int:
    """``list``: backends, schemes, hardware, models."""
    from harness.listing import collect, measure_again
    from reports.records import as_json, as_text

    if arguments.probe:
        measure_again()
    found = collect(arguments.what)
    out(as_json(found) if arguments.format == "json" else as_text(found, columns()))
    return 0


def generate(arguments: Namespace) -> int:
    """``generate``: text to stdout as it comes, its speed to stderr."""
    from backends.index import load_backend
    from harness.asked import only_cell
    from harness.conversation import Conversing
    from harness.generate import NonFiniteLogits, Speed, speeds
    from harness.generate import generate as tokens_of
    from harness.models import open_model
    from harness.session import open_session
    from harness.status import FAILED
    from reference.errors import InputError

    data = sys.stdin.buffer.read() if arguments.prompt == "-" else os.fsencode(arguments.prompt)
    backend = load_backend(arguments.backend)
    if isinstance(backend, Conversing):
        return _converse(backend, data.decode("utf-8", "replace"), arguments)
    cell = only_cell(arguments)
    model = open_model(cell.model, arguments.seed)
    tokenizer = model.tokenizer()
    prompt = tokenizer.encode(data)
    if not prompt:
        raise InputError("the prompt is empty; at least one token is needed")
    speed, stream = Speed(), tokenizer.stream()
    problem = ""
    with open_session(cell.backend, model, cell.scheme, cell.hardware.device, cell.threads) as opened:
        options = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
        options["stop"] = tokenizer.end_of_text
        try:
            out(data.decode("utf-8", "replace"))
            for token in tokens_of(opened.session, prompt, arguments.tokens, speed=speed, **options):
                out(stream.feed(token))
        except NonFiniteLogits as error:
            problem = f"{cell.backend}: {error}; rwkv-bench parity shows where it begins"
        out(stream.flush() + "\n")
    if problem:
        return fail(problem, FAILED)
    say(f"{cell.backend} {cell.scheme}: {speeds(speed)} (one run, not checked for parity)")
    return 0


def _converse(backend: Conversing, prompt: str, arguments: Namespace) -> int:
    """``generate`` with a program that only talks: its answer, and recorded rows of the speeds it prints."""
    from harness.collect import store_path
    from harness.conversation import ConversationFailed, ask, unheard
    from harness.status import CRASHED
    from harness.store import append

    say(unheard(backend))
    try:
        answer, rows = ask(backend, prompt, arguments)
    except ConversationFailed as error:
        return fail(str(error), CRASHED)
    out(answer + "\n")
    store = store_path(None)
    for row in rows:
        append(store, row)
        say(f"{row.backend} {row.scheme}: {row.metric} {row.value:g} {row.unit}, as it printed it (parity unknown)")
    say(f"{_rows(len(rows))} added to {store}")
    return 0


def setup(arguments: Namespace) -> int:
    """``setup``: build environments; a line for each on stderr."""
    from harness.live import LiveLine

    with LiveLine(sys.stderr) as line:
        code: int = command_file("setup").run(arguments, line.show, line.done)
    return code


def _told(name: str) -> Callable[[Namespace], int]:
    """``convert``, ``compile``: a command that only says what it does, a line each on stderr."""

    def run_it(arguments: Namespace) -> int:
        code: int = command_file(name).run(arguments, say)
        return code

    return run_it


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
    _write_rows(rows, arguments)
    say(f"{_rows(len(rows))} added to {store}")
    return 0


def _document(name: str) -> Callable[[Namespace], int]:
    """A command that gives one document: an :class:`harness.outcome.Outcome`."""

    def run_it(arguments: Namespace) -> int:
        from harness.live import LiveLine

        _check_files(arguments.output)
        with LiveLine(sys.stderr) as line:
            outcome = command_file(name).run(arguments, line.show, output_format(arguments))
        _deliver(outcome.text, arguments.output)
        for text in outcome.said:
            say(text)
        code: int = outcome.code
        return code

    return run_it


def localize(arguments: Namespace) -> int:
    """``localize``: the report to stdout, and a picture where one is asked for."""
    from harness.live import LiveLine
    from harness.status import CRASHED

    command = command_file("localize")
    _check_files(arguments.output, arguments.heat_map)
    with LiveLine(sys.stderr) as line:
        try:
            found = command.run(arguments, line.show, output_format(arguments))
        except command.Broke as error:
            return fail(str(error), CRASHED)
    _deliver(found.document, arguments.output)
    if arguments.heat_map and found.grid is not None:
        from reports.heatmap import draw

        draw(arguments.heat_map, found.title, found.grid)
    for text in found.said:
        say(text)
    code: int = found.code
    return code


def headroom(arguments: Namespace) -> int:
    """``headroom``: the document to stdout."""
    from harness.live import LiveLine

    _check_files(arguments.output)
    with LiveLine(sys.stderr) as line:
        text, code = command_file("headroom").run(arguments, line.show, output_format(arguments))
    _deliver(text, arguments.output)
    found: int = code
    return found


def _check_files(*paths: str | None) -> None:
    """Raise StoreError now for a file that could not be written after the work."""
    from harness.collect import store_path
    from reports.output import check_output

    for path in paths:
        check_output(path, store_path(None, make=False))


def _rows(count: int) -> str:
    return f"{count} {'row' if count == 1 else 'rows'}"


_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "run": run,
    "parity": run,
    "list": list_what_is_here,
    "generate": generate,
    "setup": setup,
    "convert": _told("convert"),
    "compile": _told("compile"),
    "import": import_figures,
    "quality": quality,
    "localize": localize,
    "headroom": headroom,
}


def _write_rows(rows: Sequence[Row], arguments: Namespace) -> None:
    from reports.output import formatted

    _deliver(formatted(rows, output_format(arguments), *_shape(arguments)), arguments.output)


def _shape(arguments: Namespace) -> tuple[int | None, bool]:
    """Columns that a table may take, and whether it is in colour."""
    width = None if arguments.output else columns()
    return width, width is not None


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
    _deliver(as_json({"cells": found}) if kind == "json" else table, arguments.output)
    named = [NOT_AVAILABLE for refusal in planned.refused if refusal.by_name]
    missing = bool(planned.absent or unmet(request, would_run(cells)))
    return exit_code([*named, NOT_AVAILABLE] if missing else named)


def _deliver(text: str | bytes, output: str | None) -> None:
    """To the file that ``--output`` names, else to stdout."""
    from reports.output import write_output

    if output:
        write_output(output, text)
    else:
        out(text)
