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
from typing import TYPE_CHECKING

from harness.options import parse
from reference.errors import InputError

if TYPE_CHECKING:
    from harness.measure import Sampling
    from harness.plan import Plan, Request
    from harness.rows import Row

PASSED, FAILED, BAD_INPUT, NOT_AVAILABLE, CRASHED, INTERRUPTED = 0, 1, 2, 3, 4, 130

#: Prompt tokens, decode tokens, repeats.
DEFAULT = (256, 64, 7)
QUICK = (64, 16, 3)

#: Measuring one metric of one cell stops after this long, with no fewer samples than an interval needs.
BUDGET_SECONDS = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from backends.api import Unavailable, Unsupported

    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    warnings.showwarning = _show_warning
    try:
        return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PASSED
    except (Unavailable, Unsupported) as error:
        return _fail(str(error), NOT_AVAILABLE)
    except InputError as error:
        return _fail(str(error), BAD_INPUT)


def run(arguments: Namespace) -> int:
    """``run`` and ``parity``: measure every cell, then print the table."""
    from harness.collect import Collector, store_path
    from harness.models import model_config
    from harness.plan import plan
    from harness.progress import Progress
    from harness.run import Job, new_run_id
    from harness.run import run as run_plan
    from reports.output import check_output
    from reports.published import published_rows
    from reports.tables import summary

    request, sampling = _request(arguments), _sampling(arguments)
    for model in request.models:
        model_config(model)
    planned = plan(request)
    if arguments.dry_run:
        return _dry_run(planned, sampling)
    check_output(arguments.output)
    with Progress(sys.stderr, len(planned.cells), sys.stderr.isatty()) as progress:
        collector = Collector(store_path(arguments.store), progress, summary)
        stopped: BaseException | None = None
        try:
            run_plan(planned, Job(request, sampling, new_run_id()), collector.add, collector.tell)
        except (KeyboardInterrupt, InputError) as error:
            stopped = error  # what has been measured is printed first
        collector.finish_cell()
    published = [row for name in planned.absent for row in published_rows(name, request.schemes)]
    _write_rows([*collector.rows, *published], arguments)
    if collector.rows:
        _say(f"{len(collector.rows)} rows added to {collector.store}")
    if stopped is not None:
        raise stopped
    codes = [_code(row, named) for row, named in zip(collector.rows, collector.named, strict=True)]
    for name in planned.absent:
        shown = any(row.hardware == name for row in published)
        what = "only published figures are shown" if shown else "and no figures of it are published here"
        codes.append(_fail(f"{name} is not in this machine; nothing was measured on it, {what}", NOT_AVAILABLE))
    return exit_code(codes)


def list_what_is_here(arguments: Namespace) -> int:
    """``list``: backends, schemes, hardware, models."""
    from harness.listing import as_json, as_text, collect

    found = collect(arguments.what)
    sys.stdout.write(as_json(found) if arguments.format == "json" else as_text(found))
    return PASSED


def generate(arguments: Namespace) -> int:
    """``generate``: text to stdout as it comes, its speed to stderr."""
    from harness.generate import NonFiniteLogits, Speed
    from harness.generate import generate as tokens_of
    from harness.hardware import default_threads
    from harness.models import open_model
    from harness.session import open_session

    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    model = open_model(arguments.model, arguments.seed)
    tokenizer = model.tokenizer()
    prompt = tokenizer.encode(text)
    if not prompt:
        raise InputError("the prompt has no tokens; at least one is needed")
    speed, stream = Speed(), tokenizer.stream()
    threads = arguments.threads or default_threads()
    with open_session(arguments.backend, model, arguments.quant, arguments.device, threads) as opened:
        options = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
        try:
            sys.stdout.write(text)
            for token in tokens_of(opened.session, prompt, arguments.tokens, speed=speed, **options):
                sys.stdout.write(stream.feed(token))
                sys.stdout.flush()
        except NonFiniteLogits as error:
            sys.stdout.write(stream.flush() + "\n")
            return _fail(f"{arguments.backend}: {error}; run rwkv-bench parity to see where it begins", FAILED)
        sys.stdout.write(stream.flush() + "\n")
    for name, count, ns in (
        ("prefill", speed.prompt_tokens, speed.prompt_ns),
        ("decode", speed.decode_tokens, speed.decode_ns),
    ):
        if count:
            _say(f"{name}: {count} tokens, {count * 1e9 / max(ns, 1):.1f} tok/s (one run, not checked for parity)")
    return PASSED


_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "run": run,
    "parity": run,
    "list": list_what_is_here,
    "generate": generate,
}


def exit_code(codes: Sequence[int]) -> int:
    """Of several, the first of 2, 4, 1, 3; 0 if there is none."""
    return next((code for code in (BAD_INPUT, CRASHED, FAILED, NOT_AVAILABLE) if code in codes), PASSED)


def _code(row: Row, named: bool) -> int:
    if row.verdict in ("CRASHED", "TIMEOUT"):
        return CRASHED
    if row.verdict == "FAIL":
        return FAILED
    return NOT_AVAILABLE if named and row.verdict in ("UNAVAILABLE", "UNSUPPORTED") else PASSED


def _request(arguments: Namespace) -> Request:
    from harness.measure import Workload
    from harness.plan import Request

    prompt, decode, _ = _sizes(arguments)
    return Request(
        models=arguments.model,
        backends=arguments.backend,
        schemes=arguments.quant,
        hardware=arguments.hardware,
        devices=arguments.device,
        threads=arguments.threads,
        workload=Workload(prompt, decode),
        seed=arguments.seed,
    )


def _sampling(arguments: Namespace) -> Sampling | None:
    from harness.measure import Sampling

    if arguments.command == "parity":
        return None
    repeats = _sizes(arguments)[2]
    return Sampling(repeats=repeats, warmup=1, budget_s=BUDGET_SECONDS, minimum=min(repeats, 6))


def _sizes(arguments: Namespace) -> tuple[int, int, int]:
    if arguments.command == "parity":
        return DEFAULT
    default = QUICK if arguments.quick else DEFAULT
    return (
        arguments.prompt_tokens or default[0],
        arguments.decode_tokens or default[1],
        arguments.repeats or default[2],
    )


def _write_rows(rows: Sequence[Row], arguments: Namespace) -> None:
    from reports.output import formatted, write_output
    from reports.tables import tables
    from reports.terminal import draw

    if arguments.format == "table" and not arguments.output:
        for table in tables(rows):
            draw(table, sys.stdout)
    elif arguments.output:
        write_output(arguments.output, formatted(rows, arguments.format))
    else:
        sys.stdout.write(formatted(rows, arguments.format))
    sys.stdout.flush()


def _dry_run(planned: Plan, sampling: Sampling | None) -> int:
    from harness.estimate import estimate

    total = 0.0
    for cell in planned.cells:
        guess = estimate(cell, sampling)
        total += guess.seconds
        sys.stdout.write(f"{cell}: about {guess.seconds:.1f} s, {guess.bytes / 2**30:.1f} GiB\n")
    for refusal in planned.refused:
        sys.stdout.write(f"{refusal.backend} {refusal.scheme}: {refusal.verdict}: {refusal.reason}\n")
    sys.stdout.write(f"{len(planned.cells)} cells, about {total:.0f} s (predicted); nothing was run\n")
    codes = [NOT_AVAILABLE for refusal in planned.refused if refusal.by_name]
    return exit_code(codes + [NOT_AVAILABLE for _ in planned.absent])


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    sys.stderr.write(f"rwkv-bench: {text}\n")
    sys.stderr.flush()


def _fail(text: str, code: int) -> int:
    _say(" ".join(text.split()))
    return code
