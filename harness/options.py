"""The command line: what can be asked, with examples; nothing here runs anything."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

COMMANDS = ("run", "parity", "list", "generate")
FORMATS = ("table", "md", "csv", "json", "jsonl")

EXIT_CODES = """\
exit status: 0 all that was asked for ran and passed; 1 parity failure or non-finite value;
2 bad usage or input; 3 something asked for by name is not available or not supported here;
4 a backend crashed; 130 interrupted. Of several, the first of 2, 4, 1, 3."""

TOP = """\
Is an RWKV-4 backend right, and how fast is it? Every speed stands beside the parity verdict of the same session.

examples:
  rwkv-bench                                          every backend usable here, embedded model
  rwkv-bench --model 169m --backend torch             a real shape with synthetic weights
  rwkv-bench --model RWKV-4-Pile-430M.pth --quant fp16,bf16
  rwkv-bench --hardware a800 --quant q4f16_1          measures there, else shows what is published
  rwkv-bench parity --format json                     verdicts only, for scripts
  rwkv-bench generate "The list" --tokens 100         text, with its speed
  rwkv-bench list                                     what is usable here and how to get the rest
"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that offer the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"rwkv-bench: {message}{self._nearest(message)}; see {self.prog} --help\n")

    def _nearest(self, message: str) -> str:
        prefix = "unrecognized arguments: "
        if not message.startswith(prefix):
            return ""
        wrong = message[len(prefix) :].split()[0].split("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(wrong, options, n=1, cutoff=0.6)
        return f" (did you mean {near[0]}?)" if near else ""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parsed arguments; a bare option list means ``run``."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["run", *argv]
    parser, commands = _top()
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        parser.error(f"no command {argv[0]!r}; {hint}commands: {', '.join(COMMANDS)}")
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        commands[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _top() -> tuple[Parser, dict[str, Parser]]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="rwkv-bench", description=TOP, epilog=EXIT_CODES, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="{run,parity,list,generate}")
    texts = {
        "run": "parity-gated prefill/decode table over backends × schemes (the default command)",
        "parity": "verdicts only",
        "list": "what is usable here and how to get the rest",
        "generate": "text from a prompt with one backend, with its speed",
    }
    build = {"run": _run, "parity": _parity, "list": _list, "generate": _generate}
    commands = {}
    for name, text in texts.items():
        commands[name] = subparsers.add_parser(
            name, help=text, description=text, epilog=EXIT_CODES, formatter_class=raw, allow_abbrev=False
        )
        build[name](commands[name])
    return parser, commands


def _run(parser: Parser) -> None:
    _selection(parser)
    group = parser.add_argument_group("what is timed")
    group.add_argument("--prompt-tokens", type=_count, metavar="N", help="prompt length of prefill (default 256)")
    group.add_argument("--decode-tokens", type=_count, metavar="N", help="single-token steps (default 64)")
    group.add_argument("--repeats", type=_count, metavar="N", help="timed runs (default 7; an interval needs 6)")
    group.add_argument("--quick", action="store_true", help="short prompt, 3 repeats, no interval: a first look")
    group.add_argument("--dry-run", action="store_true", help="show cells, estimated time and memory; run nothing")
    _output(parser)


def _parity(parser: Parser) -> None:
    _selection(parser)
    parser.add_argument("--dry-run", action="store_true", help="show cells, estimated time and memory; run nothing")
    _output(parser)


def _list(parser: Parser) -> None:
    parser.add_argument("what", nargs="?", choices=("backends", "schemes", "hardware", "models"), help="default: all")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="(default table)")


def _generate(parser: Parser) -> None:
    parser.add_argument("prompt", help="text to continue; - reads standard input")
    parser.add_argument("--model", default="tiny", metavar="NAME", help="tiny, a preset, or a checkpoint path")
    parser.add_argument("--backend", default="numpy", metavar="NAME", help="(default numpy)")
    parser.add_argument("--quant", default=None, metavar="SCHEME", help="default: the backend's first scheme")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="(default cpu)")
    parser.add_argument("--threads", type=_count, default=None, metavar="N", help="CPU threads")
    parser.add_argument("--tokens", type=_count, default=100, metavar="N", help="tokens to generate (default 100)")
    parser.add_argument("--temperature", type=_temperature, default=0.8, metavar="T", help="0: greedy (default 0.8)")
    parser.add_argument("--top-p", type=_fraction, default=0.9, metavar="P", help="nucleus sampling (default 0.9)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of sampling and weights (default 0)")


def _selection(parser: Parser) -> None:
    group = parser.add_argument_group("what to run (each takes a comma list or `all`)")
    group.add_argument("--model", type=_names, default=("tiny",), metavar="NAMES", help="tiny, presets, paths")
    group.add_argument("--backend", type=_names, default=("all",), metavar="NAMES", help="names or paths of .py files")
    group.add_argument("--quant", type=_names, default=("all",), metavar="NAMES", help="schemes or classes (int4)")
    group.add_argument("--hardware", type=_names, default=("local",), metavar="NAMES", help="local, cpu, a800, ...")
    group.add_argument("--device", type=_names, default=("all",), metavar="NAMES", help="cpu, cuda, cuda:1, mps")
    group.add_argument("--threads", type=_count, default=None, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="of prompts and weights (default 0)")


def _output(parser: Parser) -> None:
    group = parser.add_argument_group("where results go (data on stdout, progress on stderr)")
    group.add_argument("--format", choices=FORMATS, default="table", help="(default table)")
    group.add_argument("--output", metavar="FILE", help="write there instead of stdout")
    group.add_argument("--store", metavar="FILE", help="append every row to this JSONL file, as soon as it is measured")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("empty list")
    return names


def _count(text: str) -> int:
    return _number(text, 1, "a whole number of at least 1")


def _seed(text: str) -> int:
    return _number(text, 0, "a whole number of at least 0")


def _number(text: str, least: int, wanted: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


def _temperature(text: str) -> float:
    return _real(text, 0.0, 100.0)


def _fraction(text: str) -> float:
    return _real(text, 0.0, 1.0)


def _real(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
    return value
