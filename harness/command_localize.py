"""``rwkv-bench localize``: where a backend goes wrong, why, and what helps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from harness.status import CRASHED, FAILED, PASSED
from reference.errors import InputError

if TYPE_CHECKING:
    from backends.api import BackendInfo
    from harness.localize.bench import Bench
    from harness.localize.drift import Drift
    from harness.localize.finding import Finding
    from harness.localize.heatmap import Grid
    from harness.models import Model
    from harness.plan import Cell
    from reference.numerics import Arithmetic

HELP = "first wrong result of a backend, its cause, and a fix that was tried"

EXAMPLES = """\
examples:
  rwkv-bench localize --backend torch --quant fp16 --model RWKV-4-World-1.5B.pth
  rwkv-bench localize --backend torch --quant fp16 --prompt "Hello, world"
  rwkv-bench localize --backend rwkv.cpp --quant Q4_0 --method state
  rwkv-bench localize --backend mine.py --heat-map where.png
  rwkv-bench localize --backend torch --quant bf16 --drift 10000

Methods: trace compares what the backend shows of every operation, state its
recurrent state, truncation the logits of the first k layers. The backend
runs in a process of its own, so that one that crashes loses nothing.
"""

FORMATS = ("table", "json")

#: Endings of ``--heat-map``.
PICTURES = (".png", ".svg", ".pdf")

#: Length of the prompt where none is given; the bound needs at least 32 positions.
DEFAULT_TOKENS = 48

Say = Callable[[str], None]
Result = TypeVar("Result")


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; processes and output are added by :mod:`harness.options`."""
    group = parser.add_argument_group("what to look at")
    group.add_argument("--backend", required=True, metavar="NAME", help="a name or a .py file")
    group.add_argument("--model", default="tiny", metavar="NAME", help="tiny (default), a preset or a path")
    group.add_argument("--quant", metavar="NAME", help="scheme or class (default: the backend's first)")
    group.add_argument("--device", default="cpu", metavar="NAME", help="(default cpu)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per core; 1 if small)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompt and of synthetic weights")
    prompt = parser.add_argument_group("on which prompt (default: the parity gate's)").add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="a text; - reads standard input")
    prompt.add_argument("--tokens", metavar="IDS", help="token ids, 510,46,17")
    prompt.add_argument(
        "--prompt-tokens", type=int, metavar="N", help=f"length of the gate's (default {DEFAULT_TOKENS})"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=("trace", "state", "truncation"), help="(default: the best there is)")
    how.add_argument("--no-fix", dest="fix", action="store_false", help="do not look for a fix")
    how.add_argument("--drift", type=int, metavar="N", help="instead: errors against position, up to N tokens")
    how.add_argument("--heat-map", metavar="FILE.png", help="also: depth x operation as a picture (matplotlib)")


class Broke(Exception):
    """The backend crashed, hung or raised where nobody watched it; one line."""


class Report(NamedTuple):
    """The document of ``--format``, the exit status, what a picture is drawn of, and lines for stderr."""

    document: str
    code: int
    title: str
    grid: Grid | None
    said: tuple[str, ...] = ()


def run(arguments: argparse.Namespace, say: Say, kind: str) -> Report:
    """Localize in one backend. Raises InputError, Unavailable, Unsupported, and Broke."""
    from harness.asked import only_cell
    from harness.localize.heatmap import grid
    from harness.localize.report import as_json, as_text
    from harness.models import open_model

    _check(arguments, kind)
    cell = only_cell(argparse.Namespace(**{**vars(arguments), "tokens": 1}))
    model = open_model(cell.model, arguments.seed)
    if arguments.drift is not None:
        return _drifted(cell, model, arguments, say, kind)
    tokens = _tokens(model, arguments)
    finding = _localized(cell, model, tokens, arguments, say)
    about = {**_about(cell, model), "prompt_tokens": len(tokens)}
    document = as_json(finding, about) if kind == "json" else as_text(finding, about, _text(model, finding.prompt))
    title = f"{cell.backend} {cell.scheme}, {model.name}: {finding.verdict}"
    drawn = grid(finding.history)
    said = (f"no picture: {finding.method} shows no operations",) if arguments.heat_map and drawn is None else ()
    return Report(document, _code(finding), title, drawn, said)


def _code(finding: Finding) -> int:
    """A finding is one even where the backend broke on the way to it; one that broke is not clean."""
    if finding.verdict != "clean":
        return FAILED
    return CRASHED if finding.broke else PASSED


def _localized(cell: Cell, model: Model, tokens: list[int], arguments: argparse.Namespace, say: Say) -> Finding:
    from harness.localize import localize

    what = (bench(cell, model, arguments), model.weights, cell.scheme, _arithmetic(cell), tokens)
    return _watched(
        cell,
        lambda: localize(*what, method=arguments.method, fix=arguments.fix, cache_key=model.sha256, tell=say),
    )


def _drifted(cell: Cell, model: Model, arguments: argparse.Namespace, say: Say, kind: str) -> Report:
    """``--drift``: errors against position."""
    from harness.localize.drift import drift
    from harness.localize.report import plain_json

    given = arguments.prompt is not None or arguments.tokens is not None
    tokens = _tokens(model, arguments) if given else None

    def look() -> Drift:
        with bench(cell, model, arguments).open(model.weights) as opened:
            what = (model.weights, cell.scheme, opened.arithmetic, arguments.drift, say, tokens, arguments.seed)
            return drift(opened.session, *what)

    found = _watched(cell, look)
    code = PASSED if found.passed else FAILED
    title = f"{cell.backend} {cell.scheme} on {cell.hardware.device} · {model.name}"
    if kind == "json":
        document = plain_json(_about(cell, model) | {"verdict": found.verdict, "drift": asdict(found)})
        return Report(document, code, title, None)
    return Report(f"{title}\n{found.text()}\n", code, title, None)


def _arithmetic(cell: Cell) -> Arithmetic:
    from backends.index import load_backend

    info: BackendInfo = load_backend(cell.backend).INFO
    return info.arithmetic(cell.scheme, cell.hardware.device)


def _about(cell: Cell, model: Model) -> dict[str, Any]:
    where = {"backend": cell.backend, "scheme": cell.scheme, "device": cell.hardware.device, "threads": cell.threads}
    return {**where, "model": model.name, "model_sha256": model.sha256}


def _watched(cell: Cell, work: Callable[[], Result]) -> Result:
    """What ``work`` gives; what comes out of the backend is raised as Broke."""
    from backends.api import Unavailable, Unsupported
    from harness.localize.held import from_backend
    from harness.names import one_line

    try:
        return work()
    except (InputError, Unavailable, Unsupported):
        raise
    except Exception as error:
        if not from_backend(error):
            raise
        raise Broke(f"{cell.backend} {cell.scheme}: {type(error).__name__}: {one_line(str(error))}") from error


def bench(cell: Cell, model: Model, arguments: argparse.Namespace) -> Bench:
    """Opens the cell's backend over any weights, in a process of its own unless ``--in-process``."""
    from harness.localize.bench import Bench
    from harness.session import Apart

    isolate = arguments.isolate is not False
    apart = Apart(arguments.timeout, arguments.cpus) if isolate else None
    return Bench(cell.backend, cell.scheme, cell.hardware.device, cell.threads, isolate, apart, model)


def _check(arguments: argparse.Namespace, kind: str) -> None:
    from backends.api import Unavailable

    if kind not in FORMATS:
        raise InputError(f"localize has --format {' or '.join(FORMATS)}, not {kind}")
    _check_together(arguments)
    if arguments.heat_map and find_spec("matplotlib") is None:
        raise Unavailable("--heat-map needs matplotlib, which is not installed", "pip install matplotlib")
    for name, least in (("threads", 1), ("prompt_tokens", 1), ("drift", 2), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; at least {least} is needed")


def _check_together(arguments: argparse.Namespace) -> None:
    """What ``--drift`` would ignore, and a picture of an unknown kind. Raises InputError."""
    ignored = {"heat_map": "draws no picture", "method": "has one method", "prompt_tokens": "says how many tokens"}
    for name, why in ignored.items() if arguments.drift is not None else ():
        if getattr(arguments, name) is not None:
            raise InputError(f"--drift {why}; leave out --{name.replace('_', '-')}")
    if arguments.drift is not None and not arguments.fix:
        raise InputError("--drift looks for no fix; leave out --no-fix")
    if arguments.heat_map is not None and not arguments.heat_map.lower().endswith(PICTURES):
        raise InputError(f"--heat-map {arguments.heat_map}: give a file that ends in {', '.join(PICTURES)}")


def _tokens(model: Model, arguments: argparse.Namespace) -> list[int]:
    from harness.models import gate_tokens

    if arguments.tokens is not None:
        words = [word.strip() for word in arguments.tokens.split(",") if word.strip()]
        if not all(word.isascii() and word.isdigit() for word in words):
            raise InputError(f"--tokens {arguments.tokens[:40]!r}: token ids such as 510,46,17 are needed")
        beyond = next((word for word in words if len(word.lstrip("0")) > 18), None)  # no integer of 64 bits
        if beyond is not None:
            raise InputError(f"--tokens: {beyond[:40]} is outside the vocabulary of {model.config.n_vocab}")
        ids = [int(word) for word in words]
    elif arguments.prompt is not None:
        data = sys.stdin.buffer.read() if arguments.prompt == "-" else arguments.prompt.encode()
        ids = [int(i) for i in model.tokenizer().encode(data)]
    else:
        return gate_tokens(model, arguments.prompt_tokens or DEFAULT_TOKENS, arguments.seed)
    if not ids:
        raise InputError("the prompt is empty; at least one token is needed")
    return ids


def _text(model: Model, ids: tuple[int, ...]) -> str:
    """The prompt as text, where the tokenizer is at hand."""
    try:
        return model.tokenizer().decode(ids) if ids else ""
    except InputError:
        return ""
