"""``rwkv-bench compare``: two result files -> what got slower, faster, wrong or lost, with known error rates."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.outcome import Outcome
from harness.status import FAILED, PASSED
from reference.errors import InputError

if TYPE_CHECKING:
    from reports.verdict.comparison import Comparison
    from reports.verdict.decision import Rules

HELP = "two result files -> CI verdict (prefill and decode), with error rates"

EXAMPLES = """\
examples:
  rwkv-bench compare base.jsonl head.jsonl
  rwkv-bench compare base.jsonl head.jsonl --margin 2% --output verdict.md
  rwkv-bench compare base.jsonl head.jsonl --strict --output verdict.xml
  rwkv-bench compare --self-test                 its error rates, measured here

Runs are what is independent: `run --store base.jsonl` adds one, as often as is
asked for. Those less than 5 minutes apart count as one, so do blocks of
--fresh: what disturbs a machine is in all of them. One run a side decides
nothing about speed; ab measures two checkouts in pairs, without any pause.
Exit status 1: something is slower, or wrong where it was right; with --strict
also what is undecided or missing.
"""

FORMATS = ("table", "md", "json", "junit")

#: What a file's name ends in -> its format.
ENDINGS = {".md": "md", ".xml": "junit", ".json": "json"}

#: Recorded blocks from which reports can be drawn.
FEWEST_RECORDED = 50

Tell = Callable[[str], None]


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--format`` and ``--output`` are added by :mod:`harness.options`."""
    parser.add_argument("base", nargs="?", metavar="BASE", help="result file (JSON or JSONL) to compare with")
    parser.add_argument("head", nargs="?", metavar="HEAD", help="result file that is judged")
    rule_options(parser)
    parser.add_argument("--metric", metavar="NAMES", default="prefill,decode", help="(default prefill,decode)")
    group = parser.add_argument_group("error rates of the verdict itself")
    group.add_argument("--self-test", action="store_true", help="measure them here: records decode blocks, resamples")
    group.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of recording (default 60)")
    group.add_argument("--reports", type=_reports, default=2000, metavar="N", help="drawn (default 2000)")


def rule_options(parser: argparse.ArgumentParser) -> None:
    """Arguments that ``compare`` and ``ab`` share."""
    group = parser.add_argument_group("what counts as slower")
    group.add_argument("--margin", type=part, default=0.01, metavar="P", help="loss that is allowed (default 1%%)")
    group.add_argument("--effect", type=part, default=0.05, metavar="P", help="loss not to be missed (default 5%%)")
    group.add_argument("--alpha", type=part, default=0.01, metavar="P", help="false alarms, of reports (default 1%%)")
    group.add_argument("--looks", type=_looks, default=2, metavar="N", help="readings of one comparison (default 2)")
    group.add_argument("--strict", action="store_true", help="exit 1 also for what is undecided or missing")
    more = "write it there as well, in the format its name ends in: .md, .xml, .json"
    parser.add_argument("--also", action="append", default=[], metavar="FILE", type=_also, help=more)


def run(arguments: argparse.Namespace, tell: Tell, kind: str) -> Outcome:
    """The verdict in the format ``kind``. Raises InputError."""
    rules = rules_of(arguments)
    check_also(arguments)
    if arguments.self_test:
        if arguments.base or arguments.head:
            raise InputError("compare --self-test: takes no files; leave them out")
        return _self_test(arguments, rules, tell, kind)
    if not (arguments.base and arguments.head):
        raise InputError("compare: two result files are needed, BASE and HEAD; or --self-test")
    found = compared(arguments.base, arguments.head, rules, _metrics(arguments.metric))
    return outcome(found, kind, arguments)


def _self_test(arguments: argparse.Namespace, rules: Rules, tell: Tell, kind: str) -> Outcome:
    """Record decode blocks here, then draw reports from them."""
    from harness.block_trace import record
    from harness.console import columns
    from reports.verdict.resample import from_dict
    from reports.verdict.selftest import concluded, formatted, kept, measured

    if kind == "junit":
        raise InputError("compare --self-test: --format is table, md or json, not junit")
    if not 1 <= arguments.seconds <= 86400:
        raise InputError(f"--seconds is {arguments.seconds:g}; 1 to 86400 are needed")
    trace = record(seconds=arguments.seconds, tell=tell)
    taken = from_dict(trace.to_dict(), "here")
    if len(taken.logs) < FEWEST_RECORDED:
        raise InputError(f"--seconds {arguments.seconds:g}: only {len(taken.logs)} blocks; give it more time")
    rates = measured(taken, rules, reports=arguments.reports, tell=tell)
    width = None if arguments.output else columns()
    text = formatted(taken, rates, rules, kind, width, width is not None)
    said = () if kind == "table" and not arguments.output else (concluded(rates),)
    return Outcome(text, PASSED if kept(rates) else FAILED, said)


def compared(base: str, head: str, rules: Rules, metrics: Sequence[str]) -> Comparison:
    """Two files compared. Raises InputError for files that cannot be."""
    from harness.store import read
    from reports.verdict.blocks import read_rows
    from reports.verdict.comparison import compare

    if os.path.exists(base) and os.path.exists(head) and os.path.samefile(base, head):
        raise InputError(f"compare: {base} and {head} are the same file; give two")
    files = [read_rows(read(path), metrics) for path in (base, head)]
    for file, path in zip(files, (base, head), strict=True):
        if not file.rows:
            raise InputError(f"compare: {path} has no measured rows; `rwkv-bench run --store {path}` adds some")
    return compare(files[0], files[1], rules, (base, head))


def outcome(found: Comparison, kind: str, arguments: argparse.Namespace) -> Outcome:
    """A comparison as the document asked for, and what it means for the exit status; ``--also`` is written."""
    from harness.console import columns
    from reports.output import write_output

    strict, output = arguments.strict, arguments.output
    for path in arguments.also:
        write_output(path, _text(found, ENDINGS[_ending(path)], strict, None))
    code = FAILED if found.regression or (strict and found.open) else PASSED
    said = () if kind == "table" and not output else (found.conclusion,)
    return Outcome(_text(found, kind, strict, None if output else columns()), code, said)


def check_also(arguments: argparse.Namespace) -> None:
    """Raise StoreError now if a file of ``--also`` could not be written after the work."""
    from reports.output import check_output

    for path in arguments.also:
        check_output(path, Path(getattr(arguments, "store", None) or ""))


def _text(found: Comparison, kind: str, strict: bool, width: int | None) -> str:
    from reports.verdict.junit import as_junit
    from reports.verdict.render import as_json, as_markdown, as_table

    if kind == "json":
        return as_json(found)
    if kind == "junit":
        return as_junit(found, strict)
    return as_markdown(found) if kind == "md" else as_table(found, width, width is not None)


def rules_of(arguments: argparse.Namespace) -> Rules:
    """What counts as slower. Raises InputError for rules that contradict each other."""
    from reports.verdict.decision import Rules

    if not arguments.margin < arguments.effect:
        raise InputError(
            f"--margin {100 * arguments.margin:g}% is not below --effect {100 * arguments.effect:g}%: "
            "a loss that is allowed cannot be one not to be missed"
        )
    if not arguments.alpha > 0:
        raise InputError("--alpha is 0; nothing is ever certain, give more than 0")
    return Rules(arguments.margin, arguments.effect, arguments.alpha, arguments.looks)


def part(text: str) -> float:
    """``1%`` or ``0.01``."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 0.9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1% or 0.01 (below 90%)")
    return value


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _also(text: str) -> str:
    if _ending(text) not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(ENDINGS)}, which says its format")
    return text


def _reports(text: str) -> int:
    if not text.isdigit() or not 300 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of reports from 300 to 1000000")
    return int(text)


def _looks(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of readings from 1 to 100")
    return int(text)


def _metrics(text: str) -> tuple[str, ...]:
    from harness.names import did_you_mean
    from reports.verdict.blocks import METRICS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METRICS:
            raise InputError(f"--metric: no {name!r}; {did_you_mean(name, METRICS)}there are {', '.join(METRICS)}")
    return names or METRICS[:2]
