"""``rwkv-bench import``: its options, and what it does. Light to import, as every module of options is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness.names import did_you_mean

if TYPE_CHECKING:
    from harness.rows import Row

HELP = "another program's printed figures -> recorded rows"

EXAMPLES = """\
examples:
  rwkv-bench import log --from mlc-chat --hardware m2 --model 3b --quant q4f16_1
  rwkv-bench import - --from faster-rwkv --hardware m2 --model 3b --quant Q4_0
  rwkv-bench import x --from llama-bench --hardware m2 --model 3b --quant Q8_0
  rwkv-bench import figures.csv --from csv

what is read:
  mlc-chat     what /stats and /metrics print, and the phone applications show
  faster-rwkv  what chat prints with FR_SHOW_SPEED=1: one rate over prompt
               and output, taken as decode
  llama-bench  its table, csv, json or jsonl (-o); pp is prefill, tg decode
  csv          a header with metric and value, and any of hardware, backend,
               backend_version, model, scheme, threads, prompt_tokens,
               decode_tokens, unit, sd, date, note
  What FILE says of itself wins over an option. A line with a speed that
  cannot be read is named.

names: a --hardware or --model close to a known one is taken for a slip;
--as-named takes it as it is.
"""

#: What ``--from`` takes: the names of :data:`harness.printed.PARSERS`.
FORMATS = ("mlc-chat", "faster-rwkv", "llama-bench", "csv")

MOST_TOKENS, MOST_THREADS = 1 << 20, 4096


def options(parser: argparse.ArgumentParser) -> None:
    """What the command takes, output options apart."""
    parser.add_argument("file", metavar="FILE", help="what the program printed; - reads standard input")
    parser.add_argument("--from", dest="source", required=True, type=_format, metavar="F", help=", ".join(FORMATS))
    group = parser.add_argument_group("what the figures are of")
    name: dict[str, Any] = {"type": _name, "metavar": "NAME"}
    group.add_argument("--hardware", **name, help="where they were taken: m2, snapdragon865, ...")
    group.add_argument("--quant", **name, help="scheme, or a class such as int4")
    group.add_argument("--model", **name, help="a preset such as 1b5-world, or any other name")
    group.add_argument("--backend", **name, help="(default: the program's own name)")
    group.add_argument("--as-named", action="store_true", help="take names as they are, though close to known ones")
    group.add_argument("--threads", type=_whole(1, MOST_THREADS), metavar="N", help="CPU threads")
    group.add_argument("--prompt-tokens", type=_whole(1, MOST_TOKENS), metavar="N", help="length of the prompt")
    group.add_argument("--decode-tokens", type=_whole(0, MOST_TOKENS), metavar="N", help="length of the output")
    group.add_argument("--only", metavar="TEXT", help="llama-bench: tests whose model's name or file holds TEXT")
    group.add_argument("--date", type=_date, metavar="D", help="when they were taken: 2023-09-01, or with a time")
    group.add_argument("--note", metavar="TEXT", help="kept with every row")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """Recorded rows of one file; ``say`` is told in a line each what could not be read.

    Raises :class:`harness.imported.ImportProblem` where nothing is recognised or a name cannot be.
    """
    from harness.collect import store_path
    from harness.imported import imported
    from harness.recorded_names import Names

    names = Names(store_path(arguments.store, make=False), as_named=arguments.as_named)
    return imported(arguments, names, say)


def _format(text: str) -> str:
    if text not in FORMATS:
        hint = did_you_mean(text, FORMATS)
        raise argparse.ArgumentTypeError(f"no format {text!r}; {hint}there are {', '.join(FORMATS)}")
    return text


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable() or text == "all":
        raise argparse.ArgumentTypeError(f"one name is needed, not {text!r}")
    return text


def _date(text: str) -> str:
    from harness.imported import ImportProblem, checked_date

    try:
        return checked_date(text, "--date")
    except ImportProblem as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return check
