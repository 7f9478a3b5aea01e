"""``rwkv-bench headroom``: how close every operation comes to overflow in a float format, before it happens."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.names import did_you_mean
from harness.status import FAILED, PASSED
from reference.errors import InputError

if TYPE_CHECKING:
    from harness.headroom import Headroom, Plan
    from harness.localize.magnitudes import Peak
    from harness.models import Model

HELP = "how close every operation comes to overflow in a float format, before it does"

EXAMPLES = """\
examples:
  rwkv-bench headroom                                the embedded model, fp16
  rwkv-bench headroom --model RWKV-4-World-1.5B.pth --text chat.txt
  rwkv-bench headroom --model 1b5 --quant q4f16_1 --rescale-every 6
  rwkv-bench headroom --float fp8 --layers           every layer, fp8 e4m3
  rwkv-bench headroom --sums --format json           sums in fp16 as well

Headroom is the format's largest number over the largest value seen; below 1
the operation overflows there, and the exit status is 1.
"""

#: Formats that ``--float`` takes.
NARROW = ("fp16", "bf16", "fp8", "fp8_e5m2")

#: Tokens of the model's own prompt, where no text is given.
DEFAULT_TOKENS = 256

Say = Callable[[str], None]


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--format`` and ``--output`` are added by :mod:`harness.options`."""
    parser.add_argument("--model", default="tiny", metavar="NAME", help="tiny (default), a preset or a path")
    parser.add_argument("--text", metavar="FILE", help="a text to run; - reads standard input (default: the gate's)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help=f"at most so many (default: all of a text, {DEFAULT_TOKENS} without)"
    )
    parser.add_argument("--quant", default="fp32", metavar="SCHEME", help="weights as it stores them (default fp32)")
    parser.add_argument("--float", default="fp16", metavar="F", help="fp16 (default), bf16, fp8 (e4m3), fp8_e5m2")
    parser.add_argument("--sums", action="store_true", help="partial sums of products and WKV in that format too")
    parser.add_argument(
        "--rescale-every", type=int, default=6, metavar="N", help="also: the stream halved after every N layers (6)"
    )
    parser.add_argument("--layers", action="store_true", help="every layer in the table, not only the worst")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: numpy's own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompt and of synthetic weights")


def run(arguments: argparse.Namespace, say: Say, kind: str) -> tuple[str, int]:
    """The document of ``--format`` ``kind`` and the exit status. Raises InputError."""
    from threadpoolctl import threadpool_limits

    from harness.headroom import find
    from harness.models import open_model

    _check(arguments)
    arguments.quant = _scheme(arguments.quant)
    model = open_model(arguments.model, arguments.seed)
    tokens = _tokens(model, arguments)
    with threadpool_limits(arguments.threads, user_api="blas"):
        found = find(
            model.weights, tokens, arguments.quant, arguments.float, arguments.sums, arguments.rescale_every, say
        )
    about = {"model": model.name, "model_sha256": model.sha256, "scheme": arguments.quant, "text": arguments.text}
    return rendered(found, about, kind, arguments.layers), FAILED if found.overflows else PASSED


def _check(arguments: argparse.Namespace) -> None:
    if arguments.float not in NARROW:
        hint = did_you_mean(arguments.float, NARROW)
        raise InputError(f"--float: no format {arguments.float!r}; {hint}there are {', '.join(NARROW)}")
    if arguments.rescale_every < 1:
        raise InputError(f"--rescale-every is {arguments.rescale_every}; at least 1 is needed, 6 is usual")
    for name in ("tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; at least 1 is needed")
    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; 0 or more is needed")


def _scheme(name: str) -> str:
    """A scheme whose weights are known here, or the only such one of a class. Raises InputError."""
    from reference.schemes import SCHEME_CLASSES, SCHEMES, codec_of, scheme_names

    if name not in SCHEME_CLASSES or name in SCHEMES:
        codec_of(name)
        return name
    known = [scheme for scheme in scheme_names(name) if SCHEMES[scheme].codec is not None]
    if len(known) != 1:
        raise InputError(f"--quant {name} is a class of schemes; give one of {', '.join(known)}")
    return known[0]


def _tokens(model: Model, arguments: argparse.Namespace) -> list[int]:
    from harness.models import gate_tokens

    if arguments.text is None:
        return gate_tokens(model, arguments.tokens or DEFAULT_TOKENS, arguments.seed)
    tokenizer = model.tokenizer()
    ids = [int(i) for i in tokenizer.encode(_read(arguments.text))]
    if not ids:
        raise InputError(f"--text {arguments.text}: the text is empty; at least one token is needed")
    return ids[: arguments.tokens]


def _read(path: str) -> bytes:
    import sys

    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--text {path}: {error.strerror}") from None


def rendered(found: Headroom, about: dict[str, object], kind: str, layers: bool) -> str:
    """``table``, ``md``, ``csv`` (every layer), ``json`` or ``jsonl`` (a line for every operation of every layer)."""
    from harness.headroom import document

    if kind == "json":
        return json.dumps(document(found, **about), indent=1, allow_nan=False) + "\n"
    if kind == "jsonl":
        operations = document(found, **about)["operations"]
        return "".join(json.dumps(operation, allow_nan=False) + "\n" for operation in operations)
    if kind == "csv":
        return _csv(document(found)["operations"])
    header, lines = _table(found, found.peaks if layers else found.worst())
    title = f"{about['model']} · {about['scheme']} · {found.tokens} tokens · {found.format}, largest {found.limit:g}"
    if kind == "md":
        body = "".join("| " + " | ".join(line) + " |\n" for line in (header, ["---"] * len(header), *lines))
        return f"**{title}**\n\n{body}\n" + "".join(f"- {note}\n" for note in _notes(found))
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    left = 1 + layers
    rows = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in (header, *lines)
    ]
    return "\n".join([title, "", *(row.rstrip() for row in rows), "", *_notes(found)]) + "\n"


def _table(found: Headroom, peaks: Sequence[Peak]) -> tuple[list[str], list[list[str]]]:
    """One line per operation; headroom of 1e3 and more is room enough and needs no digits."""
    n = found.rescaled.rescale_every
    header = ["operation", "layer", "largest", "token", "channel", "headroom", f"rescaled/{n}"]
    lines = [
        [
            peak.name,
            "" if peak.layer is None else str(peak.layer),
            f"{peak.largest(found.sums):.3g}",
            str(peak.token),
            str(peak.channel),
            _ratio(found.headroom(peak)),
            _ratio(found.headroom(peak, n)),
        ]
        for peak in peaks
    ]
    return header, lines


def _ratio(value: float) -> str:
    mark = " !" if value < 1 else " ~" if not value > 2 else "  "
    return (f"{value:.2g}" if value < 1e3 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")) + mark


def _notes(found: Headroom) -> list[str]:
    """What follows from the table, in lines of at most 80 columns where names allow it."""
    notes = []
    near = found.near
    if near is None:
        notes.append(f"no operation comes within 2x of overflow in {found.format}")
    else:
        emulated = found.plain is not None and found.plain.point == near.point
        over = "overflows" if found.headroom(near) < 1 or emulated else "is within 2x of overflow"
        notes.append(f"first: {near.point} {over}, largest at token {near.token}, channel {near.channel}")
    if found.plain is None:
        notes.append(f"{found.format} is not emulated here: what follows is from magnitudes alone")
    else:
        notes.append(f"{found.format} everywhere, emulated: {_told(found.plain)}")
    for plan, what in ((found.kept, ""), (found.rescaled, f" with rescale_every {found.rescaled.rescale_every}")):
        notes += _plan_notes(plan, what, found)
    return notes


def _plan_notes(plan: Plan, what: str, found: Headroom) -> list[str]:
    from harness.localize.whatif import patterns

    if not plan.keep:
        confirmed = "" if plan.outcome is None else f"; emulated: {_told(plan.outcome)}"
        return [f"must stay fp32{what}: nothing{confirmed}"]
    count = f"{len(plan.keep)} of {len(found.peaks)} operations"
    lines = [f"must stay fp32{what}: {count}"]
    lines += [f"  {pattern}" for pattern in _by_name(patterns(plan.keep, found.config.n_layer))]
    if plan.outcome is not None:
        lines.append(f"  emulated with these: {_told(plan.outcome)}")
    return lines


def _by_name(shown: Sequence[str]) -> list[str]:
    """``att.residual in layers 3-11`` for the points that are listed one by one."""
    from harness.localize.whatif import layer_ranges

    layers: dict[str, list[int]] = {}
    for point in shown:
        parts = point.split(".", 2)
        alone = parts[0] == "blocks" and parts[1].isdigit()
        layers.setdefault(parts[2] if alone else point, []).extend([int(parts[1])] if alone else [])
    return [
        f"{name} in layer{'s' * (len(found) > 1)} {layer_ranges(found)}" if found else name
        for name, found in layers.items()
    ]


def _told(outcome: object) -> str:
    from harness.localize.whatif import Outcome

    assert isinstance(outcome, Outcome)
    if outcome.finite:
        return f"finite, logits off by {outcome.error:.1e} of their spread"
    return f"not finite from {outcome.point} on, token {outcome.token}"


def _csv(operations: Sequence[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(operations[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(operations)
    return out.getvalue()
