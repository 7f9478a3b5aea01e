"""``rwkv-bench ab``: two checkouts of a repository measured in one job, in pairs of blocks."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.outcome import Outcome
from harness.status import CRASHED, INTERRUPTED
from reference.errors import InputError
from reports.command_compare import check_also, outcome, rule_options, rules_of

if TYPE_CHECKING:
    from harness.plan import Plan, Request
    from harness.rows import Row

HELP = "two checkouts of a repository measured in one job, paired"

EXAMPLES = """\
examples:
  rwkv-bench ab --base main                      the working tree against main
  rwkv-bench ab --base v1.2 --head HEAD --backend torch --quant fp16,bf16
  rwkv-bench ab --base main --backend mine.py    your repository, your adapter
  rwkv-bench ab --base main --setup "make -C kernels"   run in both checkouts

Every block is a fresh process; one of BASE and one of HEAD take turns,
a coin deciding which is first. Measuring goes on until every cell has an
answer or the time is over. BASE is a git worktree in a temporary folder.
"""

FORMATS = ("table", "md", "json", "junit")

#: Prompt tokens, decode tokens: short, since each block pays for a process.
DEFAULT = (64, 32)

Tell = Callable[[str], None]


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command, beside those that choose cells."""
    group = parser.add_argument_group("what is compared")
    group.add_argument("--base", required=True, metavar="REV", help="git revision to compare with")
    group.add_argument("--head", metavar="REV", help="git revision that is judged (default: the working tree)")
    group.add_argument("--repository", default=".", metavar="DIR", help="where it is (default: this folder)")
    group.add_argument("--setup", metavar="COMMAND", help="run in each checkout first, as a build")
    group.add_argument("--base-python", metavar="FILE", help="interpreter of BASE (default: this one)")
    group.add_argument("--head-python", metavar="FILE", help="interpreter of HEAD (default: this one)")
    group.add_argument("--minutes", type=float, default=10.0, metavar="M", help="measure no longer (default 10)")
    group.add_argument("--prompt-tokens", type=int, default=DEFAULT[0], metavar="N", help=f"(default {DEFAULT[0]})")
    group.add_argument("--decode-tokens", type=int, default=DEFAULT[1], metavar="N", help=f"(default {DEFAULT[1]})")
    text = "samples of a block (default: as many as take half as long as starting it)"
    group.add_argument("--repeats", type=int, metavar="N", help=text)
    group.add_argument("--store", metavar="FILE", help="append the measured rows to this JSONL file")
    rule_options(parser)
    parser.set_defaults(looks=4)


def run(arguments: argparse.Namespace, tell: Tell, kind: str) -> Outcome:
    """Measure both and judge. Raises InputError; after Ctrl-C, what has been measured is judged and returned."""
    from harness.ab_checkouts import checkouts, prepare
    from harness.collect import store_path
    from reports.ab_work import Work

    rules = rules_of(arguments)
    check_also(arguments)
    _check(arguments)
    if arguments.store:
        store_path(arguments.store)  # refused now if it could not be written after the work
    request, planned = _planned(arguments)
    pythons = (_python(arguments.base_python), _python(arguments.head_python))
    with checkouts(Path(arguments.repository), arguments.base, arguments.head, pythons) as sides:
        for side in sides:
            if arguments.setup:
                tell(f"--setup in {side.name}")
                prepare(side, arguments.setup)
        work = Work(arguments, rules, request, planned, sides, tell)
        stopped = work.go()
        found, rows = work.comparison(), work.rows()
    _store(arguments.store, rows)
    done = outcome(found, kind, arguments)
    said = (*work.said, *done.said)
    if stopped:
        return Outcome(done.text, INTERRUPTED, (*said, "interrupted; this is what had been measured"))
    if not found.lines and not found.regression:
        return Outcome(done.text, CRASHED, said)
    return Outcome(done.text, done.code, said)


def _planned(arguments: argparse.Namespace) -> tuple[Request, Plan]:
    from harness.plan import Request, plan
    from harness.samples import Workload

    request = Request(
        models=arguments.model,
        backends=arguments.backend,
        schemes=arguments.quant,
        hardware=arguments.hardware,
        devices=arguments.device,
        threads=arguments.threads,
        workload=Workload(arguments.prompt_tokens, arguments.decode_tokens),
        seed=arguments.seed,
        isolate=arguments.isolate,
    )
    found = plan(request)
    if any(cell.hardware.host for cell in found.cells) or found.absent:
        raise InputError("ab: both sides run on this machine; leave out --hardware, or give cpu")
    if not found.cells:
        why = found.refused[0].reason if found.refused else "nothing was asked for"
        raise InputError(f"ab: no cell to measure: {why}")
    return request, found


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.minutes > 0:
        raise InputError(f"--minutes is {arguments.minutes:g}; more than 0 is needed")
    for name in ("prompt_tokens", "decode_tokens", "repeats"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; at least 1 is needed")
    if arguments.timeout is not None or arguments.cpus is not None or arguments.dry_run:
        raise InputError("ab takes no --timeout, --cpus or --dry-run; use `taskset` around it, and --minutes")


def _python(given: str | None) -> str:
    if given is None:
        return sys.executable
    found = shutil.which(given)
    if found is None:
        raise InputError(f"no interpreter {given}; give the path of a Python that has what the checkout needs")
    return os.path.abspath(found)


def _store(path: str | None, rows: Sequence[Row]) -> None:
    from harness.store import append

    for row in rows if path else ():
        append(path or "", row)
