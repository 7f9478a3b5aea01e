"""``rwkv-bench quality``: its options, and what they ask for. Light to import, as every module of options is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.cell_rows import Job
    from harness.plan import Cell, Plan, Request
    from harness.quality.asked import Asked

HELP = "perplexity, KL divergence, top-1 agreement against the fp32 weights"

EXAMPLES = """\
examples:
  rwkv-bench quality                     every usable cell, small model
  rwkv-bench quality --backend numpy --quant int4,int8
  rwkv-bench quality --model RWKV-4-169M.pth --text wiki.txt --tokens 16384
  rwkv-bench quality --model RWKV-4-169M.pth --data lambada_test.jsonl
  rwkv-bench quality --context 0         one run, state carried through
  rwkv-bench quality --backend onnx --quant int4 --against numpy:Q4_0

what is shown:
  KL       from the fp32 weights to the system, nat a token; of that
  weights  what storing the weights does, whoever computes
  kernel   how far the backend is from what those stored weights give
  against  KL less that of the cell that --against names, in % of it: no worse,
           worse or undecided (and why) by the interval of that difference;
           rwkv.cpp:Q4_0 needs --library rwkv.cpp=FILE, a current rwkv.cpp
Intervals are of 95 %, over blocks of the text; docs/quality.md says how.
"""

#: A segment below this has no context; fewer positions than two segments have no interval.
LEAST_CONTEXT, LEAST_TOKENS, MOST_TOKENS, MOST_DOCUMENTS = 16, 32, 1 << 24, 1 << 20


def options(parser: argparse.ArgumentParser) -> None:
    """What the command takes; what to run and where results go are added by :mod:`harness.options`."""
    group = parser.add_argument_group("on what")
    group.add_argument("--text", metavar="FILE", help="plain text (default: the embedded model's held-out text)")
    group.add_argument(
        "--tokens", type=_whole(LEAST_TOKENS, MOST_TOKENS), default=4096, metavar="N", help="positions (default 4096)"
    )
    group.add_argument(
        "--context",
        type=_context,
        default=128,
        metavar="N",
        help="in segments of N, spread over the text (default 128); 0: one run from its beginning",
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help='LAMBADA, {"text": ...} a line (default: lambada_test.jsonl beside the checkpoint)',
    )
    group.add_argument(
        "--documents", type=_whole(2, MOST_DOCUMENTS), default=500, metavar="N", help="of LAMBADA (default 500)"
    )
    group.add_argument("--tokenizer", metavar="FILE", help="bytes, world, pile or a file (default: beside the model)")
    group = parser.add_argument_group("compared with another cell, position by position")
    group.add_argument(
        "--against", type=_against, metavar="BACKEND:SCHEME", help="a cell that is run first, such as numpy:Q4_0"
    )
    group.add_argument("--no-worse", action="store_true", help="a cell whose divergence is worse than that one's fails")
    group.add_argument("--strict", action="store_true", help="with --no-worse: one that is undecided fails too")
    # What the request of `run` says of timing is not asked here.
    parser.set_defaults(quick=False, prompt_tokens=None, decode_tokens=None, repeats=None)


def asked(arguments: argparse.Namespace) -> Asked:
    """On what to measure. Raises InputError for files that are not there and sizes that do not go together."""
    from harness.quality.asked import Asked
    from reference.errors import InputError

    if arguments.context and arguments.tokens < 2 * arguments.context:
        raise InputError(
            f"--tokens {arguments.tokens} are fewer than two segments of {arguments.context}; "
            "use more --tokens or a shorter --context; an interval needs eight blocks"
        )
    lacking = next((name for name in ("no_worse", "strict") if getattr(arguments, name)), None)
    needed = "against" if lacking == "no_worse" else "no_worse"
    if lacking is not None and not getattr(arguments, needed):
        raise InputError(f"--{lacking.replace('_', '-')} needs --{needed.replace('_', '-')}")
    for option in ("text", "data"):
        path = getattr(arguments, option)
        if path is not None and not os.path.exists(path):
            raise InputError(f"--{option} {path}: no such file")
    return Asked(
        text=arguments.text,
        tokens=arguments.tokens,
        context=arguments.context,
        data=arguments.data,
        documents=arguments.documents,
        tokenizer=arguments.tokenizer,
        against=arguments.against,
        no_worse=arguments.no_worse,
        strict=arguments.strict,
    )


def requested(arguments: argparse.Namespace) -> Request:
    """The cells; their workload is one call over the text."""
    from harness.asked import requested as requested_cells
    from harness.measure import Workload
    from harness.quality.baseline import MOST_POSITIONS

    return replace(requested_cells(arguments), workload=Workload(min(arguments.tokens, MOST_POSITIONS), 0))


def job(request: Request, wanted: Asked) -> Job:
    """What to do with each cell, and how it is asked for again."""
    from harness.cell_rows import Job
    from harness.run import new_run_id

    words = ["--tokens", str(wanted.tokens), "--context", str(wanted.context), "--documents", str(wanted.documents)]
    for name, value in (("text", wanted.text), ("data", wanted.data), ("tokenizer", wanted.tokenizer)):
        words += [f"--{name}", value] if value is not None else []
    if wanted.against is not None:
        words += ["--against", ":".join(wanted.against), *(["--no-worse"] if wanted.no_worse else [])]
        words += ["--strict"] if wanted.strict else []
    return Job(request, None, new_run_id(), ("quality", *words))


def refuse_phones(arguments: argparse.Namespace) -> None:
    """Raise Unsupported for a phone: its program prints speeds and no logits."""
    from backends.api import Unsupported
    from harness.phone_runs import phones_of

    phones = phones_of(arguments.hardware)
    if phones:
        raise Unsupported(f"phone {phones[0].name}: its program shows no logits, so there is no quality to measure")


def planned(request: Request, wanted: Asked) -> Plan:
    """The cells, the one of ``--against`` before the others of its model."""
    from harness.quality.asked import planned as planned_cells

    return planned_cells(request, wanted)


def seconds(cells: Plan, wanted: Asked) -> Callable[[Cell], float]:
    """What a cell takes beyond its gate, predicted."""
    from harness.quality.asked import seconds as predicted

    return predicted(cells, wanted)


def _against(text: str) -> tuple[str, str]:
    backend, _, scheme = text.rpartition(":")  # the path of a backend's file may have a colon
    if not backend or not scheme or "all" in (backend, scheme):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no one cell; BACKEND:SCHEME, such as rwkv.cpp:Q4_0")
    return backend, scheme


def _context(text: str) -> int:
    if text == "0":
        return 0
    return _whole(LEAST_CONTEXT, MOST_TOKENS)(text)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    return check
