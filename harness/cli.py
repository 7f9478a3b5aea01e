"""``rwkv-bench``: the only place that prints or exits.

    arguments -> plan -> rows, stored as they come -> table

Nothing heavy is imported before the command is known, and no runtime before a cell needs it.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness import streams
from harness.interrupt import Terminated, terminable
from harness.options import NotInThisVersion, TextWanted, UsageError, output_format, parse

if TYPE_CHECKING:
    from pathlib import Path

    from harness.collect import Collector
    from harness.measure import Sampling
    from harness.plan import Plan, Request
    from harness.rows import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    streams.prepare()
    try:
        with terminable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _command(list(sys.argv[1:] if argv is None else argv))
    except Terminated as signal:
        return _fail(f"ended by {signal}", 128 + signal.number)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _command(argv: list[str]) -> int:
    from backends.api import Unavailable, Unsupported
    from harness.status import BAD_INPUT, NOT_AVAILABLE, PASSED
    from reference.errors import InputError

    try:
        try:
            arguments = parse(argv)
        except TextWanted as wanted:
            _out(str(wanted))
            return PASSED
        return _COMMANDS[arguments.command](arguments)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does
        return PASSED
    except (Unavailable, Unsupported, NotInThisVersion) as error:
        return _fail(str(error), NOT_AVAILABLE)
    except (UsageError, InputError) as error:
        return _fail(str(error), BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), BAD_INPUT)


def run(arguments: Namespace) -> int:
    """``run`` and ``parity``: measure every cell, then print the table."""
    from harness.asked import requested, sampling_of
    from harness.collect import store_path
    from harness.plan import plan
    from reports.output import check_output
    from reports.published import published_rows

    request, sampling = requested(arguments), sampling_of(arguments)
    planned = plan(request)
    if arguments.dry_run:
        return _dry_run(request, planned, sampling, arguments)
    store = store_path(arguments.store, make=bool(planned.cells or planned.refused))
    check_output(arguments.output, store)
    collector, stopped = _measure(request, planned, sampling, store)
    published = [row for name in planned.absent for row in published_rows(name, request.schemes)]
    try:
        _write_rows([*collector.rows, *published], arguments)
    except BrokenPipeError:
        pass  # nobody reads the table any more; the exit status still counts
    finally:
        if collector.rows:
            count = len(collector.rows)
            _say(f"{count} {'row' if count == 1 else 'rows'} added to {store}")
    if stopped is not None:
        raise stopped
    return _status(request, planned, collector, {row.hardware for row in published})


def _measure(
    request: Request, planned: Plan, sampling: Sampling | None, store: Path
) -> tuple[Collector, BaseException | None]:
    """Run the plan; what ended it early is returned, because what has been measured is printed first."""
    from harness.cell_rows import Job
    from harness.collect import Collector
    from harness.progress import Progress
    from harness.run import new_run_id
    from harness.run import run as run_plan
    from reference.errors import InputError
    from reports.tables import summary

    with Progress(sys.stderr, planned.cells, sys.stderr.isatty()) as progress:
        collector = Collector(store, progress, summary)
        stopped: BaseException | None = None
        try:
            run_plan(planned, Job(request, sampling, new_run_id()), collector.add, collector.tell)
        except (KeyboardInterrupt, InputError) as error:
            stopped = error
        collector.finish_cell()
    return collector, stopped


def _status(request: Request, planned: Plan, collector: Collector, published: set[str]) -> int:
    """Exit status of a finished run, with a line for what was asked by name and nothing ran for."""
    from harness.status import NOT_AVAILABLE, exit_code, ran, row_code, unmet
    from reports.published import published_rows

    codes = [row_code(row, named) for row, named in zip(collector.rows, collector.named, strict=True)]
    found = ran(collector.rows)
    missing = unmet(request, found, planned.absent) if collector.rows else []
    codes += [NOT_AVAILABLE] * bool(missing)
    if missing and found:
        _say(f"nothing ran for {', '.join(missing)}")
    for name in planned.absent:
        others = ", ".join(dict.fromkeys(row.scheme for row in published_rows(name)))
        lacking = f"its published figures are of {others}" if others else "and no figures of it are published here"
        what = "only published figures are shown" if name in published else lacking
        codes.append(_fail(f"{name} is not in this machine; nothing was measured on it, {what}", NOT_AVAILABLE))
    return exit_code(codes)


def list_what_is_here(arguments: Namespace) -> int:
    """``list``: backends, schemes, hardware, models."""
    from harness.listing import collect
    from reports.records import as_json, as_text

    found = collect(arguments.what)
    _out(as_json(found) if arguments.format == "json" else as_text(found, _columns()))
    return 0


def generate(arguments: Namespace) -> int:
    """``generate``: text to stdout as it comes, its speed to stderr."""
    from harness.asked import only_cell
    from harness.generate import NonFiniteLogits, Speed, speeds
    from harness.generate import generate as tokens_of
    from harness.models import open_model
    from harness.session import open_session
    from harness.status import FAILED
    from reference.errors import InputError

    cell = only_cell(arguments)
    data = sys.stdin.buffer.read() if arguments.prompt == "-" else os.fsencode(arguments.prompt)
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
            _out(data.decode("utf-8", "replace"))
            for token in tokens_of(opened.session, prompt, arguments.tokens, speed=speed, **options):
                _out(stream.feed(token))
        except NonFiniteLogits as error:
            problem = f"{cell.backend}: {error}; rwkv-bench parity shows where it begins"
        _out(stream.flush() + "\n")
    if problem:
        return _fail(problem, FAILED)
    _say(f"{cell.backend} {cell.scheme}: {speeds(speed)} (one run, not checked for parity)")
    return 0


def setup(arguments: Namespace) -> int:
    """``setup``: build environments; a line for each on stderr."""
    from harness.live import LiveLine
    from harness.options import command_file

    with LiveLine(sys.stderr) as line:
        code: int = command_file("setup").run(arguments, line.show, line.done)
    return code


_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "run": run,
    "parity": run,
    "list": list_what_is_here,
    "generate": generate,
    "setup": setup,
}


def _write_rows(rows: Sequence[Row], arguments: Namespace) -> None:
    from reports.output import formatted

    columns = None if arguments.output else _columns()
    _deliver(formatted(rows, output_format(arguments), columns, columns is not None), arguments.output)


def _dry_run(request: Request, planned: Plan, sampling: Sampling | None, arguments: Namespace) -> int:
    from harness.dry_run import for_people, foresee, records, total, would_run
    from harness.status import NOT_AVAILABLE, exit_code, unmet
    from reports.records import as_json, as_text

    kind = output_format(arguments)
    if kind not in ("table", "json"):
        raise UsageError(f"--dry-run has --format table or json, not {kind}")
    cells = foresee(planned, sampling)
    found = records(planned, cells)
    columns = None if arguments.output else _columns()
    table = (as_text({"cells": for_people(found)}, columns) if found else "") + total(cells) + "\n"
    _deliver(as_json({"cells": found}) if kind == "json" else table, arguments.output)
    named = [NOT_AVAILABLE for refusal in planned.refused if refusal.by_name]
    missing = bool(planned.absent or unmet(request, would_run(cells)))
    return exit_code([*named, NOT_AVAILABLE] if missing else named)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")


def _columns() -> int | None:
    """Columns of the terminal; None where stdout is none, so that nothing is cut or wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _deliver(text: str, output: str | None) -> None:
    """To the file that ``--output`` names, else to stdout."""
    from reports.output import write_output

    if output:
        write_output(output, text)
    else:
        _out(text)


def _out(text: str) -> None:
    """Data to stdout at once. Raises BrokenPipeError, or InputError where it cannot be written."""
    from reference.errors import InputError

    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        streams.silence(sys.stdout)
        raise
    except OSError as error:
        streams.silence(sys.stdout)
        raise InputError(f"cannot write to standard output: {error.strerror}; --output writes to a file") from None


def _say(text: str) -> None:
    """One line to stderr, whatever it holds: what would move the cursor or colour the screen is shown escaped."""
    line = "".join(c if c.isprintable() else " " if c == "\n" else c.encode("unicode_escape").decode() for c in text)
    try:
        sys.stderr.write(f"rwkv-bench: {line}\n")
        sys.stderr.flush()
    except OSError:
        streams.silence(sys.stderr)


def _fail(text: str, code: int) -> int:
    _say(text)
    return code
