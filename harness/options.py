"""The command line: what can be asked, with examples; nothing here runs, prints or exits."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import PurePath
from types import ModuleType
from typing import Any, NoReturn

from harness.help_texts import COMMANDS, EXAMPLES, EXIT_CODES, TOP
from harness.names import did_you_mean

FORMATS = ("table", "md", "csv", "json", "jsonl")
SECTIONS = ("backends", "schemes", "hardware", "models")

#: Upper limits far beyond sense, so that a slip of the finger is told at once and not by the system.
MOST_TOKENS, MOST_REPEATS, MOST_THREADS, MOST_SEED = 1 << 20, 10_000, 4096, 2**63 - 1


class UsageError(Exception):
    """A command line that cannot be understood, in one line."""


class NotInThisVersion(Exception):
    """Something the design has and this version has not, in one line."""


class TextWanted(Exception):
    """``--help`` or ``--version`` was asked for; the text is its argument."""


class Parser(argparse.ArgumentParser):
    """argparse that raises: :class:`UsageError` with the nearest valid word, or :class:`TextWanted`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise UsageError(f"{message}{self._nearest(message)}; see {self.prog} --help")

    def print_help(self, file: object = None) -> None:
        """Raise instead of printing."""
        raise TextWanted(self.format_help())

    def _nearest(self, message: str) -> str:
        prefix = "unrecognized arguments: "
        words = message[len(prefix) :].split() if message.startswith(prefix) else []
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        hint = did_you_mean(words[0].split("=")[0], options) if words else ""
        return f"; {hint.strip()}" if hint else ""


#: Commands and options of the design that this version answers by name instead of guessing another.
LATER_COMMANDS: tuple[str, ...] = ()
LATER_OPTIONS: tuple[str, ...] = ()

#: Commands with a file of their own: HELP, EXAMPLES, ``options(parser)`` and ``run``.
COMMAND_FILES = {
    "setup": "harness.command_setup",
    "convert": "harness.command_convert",
    "import": "harness.command_import",
    "compile": "harness.command_compile",
    "quality": "harness.command_quality",
    "localize": "harness.command_localize",
    "headroom": "harness.command_headroom",
    "gpu-check": "harness.command_gpu_check",
    "compare": "reports.command_compare",
    "ab": "reports.command_ab",
    "report": "reports.command_report",
    "recommend": "reports.command_recommend",
}


_GIVES_ROWS = ("import", "quality")

#: Of those, the commands that run cells, chosen with the options of ``run``.
_RUNS_CELLS = ("quality", "ab")

#: Commands that give one document of their own, in the formats they know (``run`` returns an Outcome), and those that
#: open one backend for it.
_VERDICT = ("table", "md", "json", "junit")
_GIVES_DOCUMENT = {
    "localize": ("table", "json"),
    "headroom": FORMATS,
    "report": (*FORMATS, "html", "png"),
    "recommend": ("table", "md", "json"),
    "compare": _VERDICT,
    "ab": _VERDICT,
}
_OPENS_ONE = ("localize",)


def command_file(name: str) -> ModuleType:
    """The module of a command of :data:`COMMAND_FILES`."""
    return importlib.import_module(COMMAND_FILES[name])


def parse(argv: list[str]) -> argparse.Namespace:
    """Parsed arguments; a bare option list means ``run``. Raises UsageError, NotInThisVersion or TextWanted."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["run", *argv]
    if argv[0] == "--version":
        raise TextWanted(_version())
    parser, commands = _top()
    known = [*COMMANDS, *COMMAND_FILES]
    if argv[0] in LATER_COMMANDS:
        raise NotInThisVersion(f"the command {argv[0]} is not in this version; commands: {', '.join(known)}")
    if not argv[0].startswith("-") and argv[0] not in known:
        parser.error(f"no command {argv[0]!r}; {did_you_mean(argv[0], known)}commands: {', '.join(known)}")
    arguments, rest = parser.parse_known_args(argv)
    later = next((word.split("=")[0] for word in rest if word.split("=")[0] in LATER_OPTIONS), None)
    if later:
        raise NotInThisVersion(f"{later} is not in this version")
    if rest:
        commands[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def output_format(arguments: argparse.Namespace) -> str:
    """``--format``, else what the name of ``--output`` ends in, else ``table``."""
    ending = PurePath(arguments.output or "").suffix.lstrip(".").lower()
    meant = {"xml": "junit"}.get(ending, ending)
    known = _GIVES_DOCUMENT.get(arguments.command, FORMATS)
    return str(arguments.format or (meant if meant in known else "table"))


def _version() -> str:
    from importlib.metadata import version

    return f"rwkv-bench {version('rwkv-bench')}\n"


def _top() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="rwkv-bench", description=TOP, epilog=EXIT_CODES)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    build = {"run": _run, "parity": _parity, "list": _list, "generate": _generate}
    commands = {}
    for name, text in COMMANDS.items():
        epilog = f"{EXAMPLES[name]}\n{EXIT_CODES}"
        commands[name] = subparsers.add_parser(name, help=text, description=text, epilog=epilog)
        build[name](commands[name])
    for name in COMMAND_FILES:
        file = command_file(name)
        epilog = f"{file.EXAMPLES}\n{EXIT_CODES}"
        commands[name] = subparsers.add_parser(name, help=file.HELP, description=file.HELP, epilog=epilog)
        if name in _RUNS_CELLS:
            _selection(commands[name])
        file.options(commands[name])
        if name in _OPENS_ONE:
            _apart(commands[name])
        if name in _GIVES_ROWS:
            _output(commands[name])
        if name in _GIVES_DOCUMENT:
            _document(commands[name], _GIVES_DOCUMENT[name])
    return parser, commands


def _run(parser: Parser) -> None:
    _selection(parser)
    group = parser.add_argument_group("what is timed")
    tokens = _whole(1, MOST_TOKENS)
    group.add_argument("--prompt-tokens", type=tokens, metavar="N", help="prompt length of prefill (default 256)")
    group.add_argument("--decode-tokens", type=tokens, metavar="N", help="single-token steps (default 64)")
    group.add_argument(
        "--repeats", type=_whole(1, MOST_REPEATS), metavar="N", help="timed runs (default 7; an interval needs 6)"
    )
    group.add_argument(
        "--precision", type=_percent, metavar="P", help="measure until the median is known to +-P, such as 2%%"
    )
    group.add_argument(
        "--time-budget",
        type=_real(0, 1e7),
        metavar="S",
        help="seconds of measuring for one cell, half for prefill and half for decode (default 40)",
    )
    group.add_argument("--fresh", action="store_true", help="a new process for each block of samples")
    group.add_argument("--resume", action="store_true", help="take over the cells that a broken run has finished")
    group.add_argument("--quick", action="store_true", help="prompt 64, decode 16, 3 repeats: a first look")
    group.add_argument(
        "--batch", type=_whole(1, 4096), default=1, metavar="N", help="sequences side by side (default 1)"
    )
    text = "every cell at several points: prompt=64..2048, threads=1..4, batch=1,3,8"
    group.add_argument("--sweep", type=_sweep, metavar="AXIS=RANGE", help=text)
    _output(parser)


def _parity(parser: Parser) -> None:
    _selection(parser)
    _output(parser)


def _list(parser: Parser) -> None:
    sections, formats = _one_of("section", SECTIONS), _one_of("format", ("table", "json"))
    text = f"{', '.join(SECTIONS)} (default: all)"
    parser.add_argument("what", nargs="?", type=sections, metavar="SECTION", help=text)
    parser.add_argument("--probe", action="store_true", help="measure this processor's bandwidth and matrix rate anew")
    parser.add_argument("--format", type=formats, default="table", metavar="F", help="table (default) or json")


def _generate(parser: Parser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads standard input")
    name: dict[str, Any] = {"type": _name, "metavar": "NAME"}
    parser.add_argument("--model", **name, default="tiny", help="tiny (default), a preset or a path")
    parser.add_argument("--backend", **name, default="numpy", help="(default numpy)")
    parser.add_argument("--quant", **name, help="scheme or class (default: the backend's first)")
    parser.add_argument("--device", **name, default="cpu", help="(default cpu)")
    _threads(parser)
    tokens = _whole(1, MOST_TOKENS)
    parser.add_argument("--tokens", type=tokens, default=100, metavar="N", help="at most this many (default 100)")
    parser.add_argument("--temperature", type=_real(0, 100), default=0.8, metavar="T", help="0: greedy (default 0.8)")
    parser.add_argument("--top-p", type=_real(0, 1), default=0.9, metavar="P", help="nucleus sampling (default 0.9)")
    _seed(parser, "of sampling and of synthetic weights")


def _selection(parser: Parser) -> None:
    group = parser.add_argument_group("what to run (NAMES: a comma list, or `all`)")
    names: dict[str, Any] = {"type": _names, "metavar": "NAMES"}
    group.add_argument("--model", **names, default=("tiny",), help="tiny (default), presets, paths")
    group.add_argument("--backend", **names, default=("all",), help="names or .py files (default all)")
    group.add_argument("--quant", **names, default=("all",), help="schemes or classes: fp16, int4 (default all)")
    group.add_argument("--hardware", **names, default=("local",), help="local (default), cpu, a800, ...")
    group.add_argument("--device", **names, default=("all",), help="cpu, cuda, cuda:1, mps (default all)")
    _threads(group)
    _seed(group, "of prompts and of synthetic weights")
    _apart(parser)
    group.add_argument("--dry-run", action="store_true", help="cells, estimated time and memory; nothing is run")


def _apart(parser: Parser) -> None:
    group = parser.add_argument_group("processes (a backend with an environment of its own always has one)")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--isolate", action="store_true", default=None, help="run each cell in a process of its own, whatever backend"
    )
    where.add_argument("--in-process", dest="isolate", action="store_false", help="run every cell in this process")
    group.add_argument(
        "--timeout", type=_real(0.1, 1e6), metavar="S", help="seconds without a sign of life (default 600); isolates"
    )
    group.add_argument(
        "--library",
        type=_library,
        action="append",
        default=[],
        metavar="BACKEND=FILE",
        help="a library of yours for a backend, such as rwkv.cpp=librwkv.so",
    )
    group.add_argument("--cpus", type=_cpus, metavar="LIST", help="CPUs such as 0-3,6, or node:0; isolates")


def _output(parser: Parser) -> None:
    group = parser.add_argument_group("where results go (data to stdout, progress to stderr)")
    formats = _one_of("format", FORMATS)
    group.add_argument("--format", type=formats, metavar="F", help=f"{', '.join(FORMATS)} (default table)")
    group.add_argument("--output", type=_path, metavar="FILE", help="write there instead, by default as its name ends")
    group.add_argument("--store", type=_path, metavar="FILE", help="append each row to this JSONL file when measured")


def _document(parser: Parser, known: tuple[str, ...]) -> None:
    group = parser.add_argument_group("where the result goes (data to stdout, progress to stderr)")
    text = f"{', '.join(known)} (default table)"
    group.add_argument("--format", type=_one_of("format", known), metavar="F", help=text)
    group.add_argument("--output", type=_path, metavar="FILE", help="write there instead, by default as its name ends")


def _threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--threads", type=_whole(1, MOST_THREADS), metavar="N", help="CPU threads (default: one per core; 1 if small)"
    )


def _seed(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument("--seed", type=_whole(0, MOST_SEED), default=0, metavar="N", help=f"{what} (default 0)")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("no name is given")
    return names


def _name(text: str) -> str:
    if not text.strip() or text == "all":
        raise argparse.ArgumentTypeError(f"one name is needed, not {text!r}")
    return text


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the path of a file is needed")
    return text


def _library(text: str) -> tuple[str, str]:
    from backends.index import LIBRARIES

    name, _, file = text.partition("=")
    if name not in LIBRARIES:
        hint = did_you_mean(name, LIBRARIES)
        raise argparse.ArgumentTypeError(f"{name!r} takes no library; {hint}these do: {', '.join(LIBRARIES)}")
    if not file:
        raise argparse.ArgumentTypeError(f"{text!r} names no file; BACKEND=FILE is needed")
    return name, os.path.abspath(file)


def _cpus(text: str) -> Any:
    from harness.isolation.placement import BadPlacement, parse

    try:
        return parse(text)
    except BadPlacement as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--cpus ")) from None


def _sweep(text: str) -> Any:
    from harness.sweep import BadSweep, parse

    try:
        return parse(text)
    except BadSweep as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _one_of(what: str, known: tuple[str, ...]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"no {what} {text!r}; {did_you_mean(text, known)}there are {', '.join(known)}"
            )
        return text

    return check


def _whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return check


def _percent(text: str) -> float:
    """``2%`` -> 0.02; a number without the sign could be meant either way."""
    found = _real(0.01, 99)(text[:-1]) if text.endswith("%") else None
    if found is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no percentage; write it such as 2%")
    return found / 100


def _real(least: float, most: float) -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from {least:g} to {most:g}")
        return value

    return check
