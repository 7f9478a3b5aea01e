"""Another program's printed figures -> recorded rows: speeds without parity.

A row of a phone or a Mac that nobody can script is better than none, as long as it says where it comes from:
its kind is ``recorded``, it has no verdict, and ``printed`` keeps the line it was read from. Reading the same
file twice gives the same rows, which :func:`harness.store.duplicates` then finds.

    ImportProblem (InputError)    a file without a figure, or names that cannot be; one line
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from harness.printed import PARSERS, Figure, Reading, lines_of
from harness.recorded import known_workload
from harness.recorded_names import ImportProblem, Names, scheme_class
from harness.rows import Row

__all__ = ["ImportProblem", "checked_date", "imported"]

#: Format -> the backend whose figures it prints.
BACKENDS: Mapping[str, str] = {"mlc-chat": "mlc-llm", "faster-rwkv": "faster-rwkv", "llama-bench": "llama.cpp"}

#: What faster-rwkv's strategy "cuda fp16" is called: in its own words, and as a scheme of its backend here.
CUDA_SCHEMES = ("cuda fp16", "fp16")

#: Lines that are named one by one; the others are counted.
MOST_NAMED = 10

MOST_BYTES = 16 << 20


def imported(arguments: argparse.Namespace, names: Names, say: Callable[[str], None]) -> list[Row]:
    """Recorded rows of one file; ``say`` is told in a line each what could not be read.

    Raises :class:`ImportProblem` where nothing is recognised or a name cannot be, before anything is stored.
    """
    data = _read(arguments.file)
    label = "standard input" if arguments.file == "-" else Path(arguments.file).name
    reading = PARSERS[arguments.source](lines_of(data))
    if not reading.figures:
        raise ImportProblem(_nothing(label, arguments.source, reading))
    figures = _of_one_model(reading.figures, arguments.only)
    rows = [_row(figure, arguments, label, hashlib.sha256(data).hexdigest(), names) for figure in figures]
    for rejected in reading.rejected[:MOST_NAMED]:
        say(f"{label}, {rejected}; left out")
    if len(reading.rejected) > MOST_NAMED:
        say(f"{label}: {len(reading.rejected) - MOST_NAMED} more lines with a figure left out")
    return rows


def _read(name: str) -> bytes:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ImportProblem(f"cannot read {name}: {why}; FILE is what the program printed") from None
    if len(data) > MOST_BYTES:
        raise ImportProblem(f"{name} is larger than {MOST_BYTES >> 20} MiB; give the part of it that has the figures")
    return data


def _nothing(label: str, source: str, reading: Reading) -> str:
    """Why a file gave no row: its first bad line, else that it holds nothing of the kind."""
    if reading.rejected:
        more = f" (and {len(reading.rejected) - 1} more such lines)" if len(reading.rejected) > 1 else ""
        return f"{label}: no figure can be taken; {reading.rejected[0]}{more}"
    wanted = "a header and rows" if source == "csv" else f"a speed as {source} prints it"
    return f"{label}: none of its {reading.ignored} lines is {wanted}; is --from {source} right?"


def _of_one_model(figures: Sequence[Figure], only: str | None) -> list[Figure]:
    """Figures that may share one ``--model``. Raises :class:`ImportProblem` where the file names several models."""
    if only is not None:
        figures = [figure for figure in figures if any(only in name for name in _own_model(figure))]
        if not figures:
            raise ImportProblem(f"--only {only}: no test in the file has a model named so")
    found = list(dict.fromkeys(" ".join(_own_model(figure)) for figure in figures))
    if len(found) > 1:
        raise ImportProblem(
            f"the file has tests of {len(found)} models ({', '.join(found[:4])}); --only TEXT takes those of one"
        )
    return list(figures)


def _own_model(figure: Figure) -> list[str]:
    """What the program itself calls the model: its type and its file."""
    return [str(figure.facts[key]) for key in ("model", "model_type", "model_filename") if key in figure.facts]


def _row(figure: Figure, arguments: argparse.Namespace, label: str, digest: str, names: Names) -> Row:
    """Raises :class:`ImportProblem` naming the line for a name or a length that cannot be."""
    where = f"{label}, line {figure.line}"
    hardware, scheme, model = (
        _said(figure, key, option, getattr(arguments, option), where)
        for key, option in (("hardware", "hardware"), ("scheme", "quant"), ("model", "model"))
    )
    backend = _said(figure, "backend", "backend", arguments.backend or BACKENDS.get(arguments.source), where)
    names.check(where, hardware, scheme, model)
    if arguments.source == "faster-rwkv" and scheme in CUDA_SCHEMES:
        raise ImportProblem(
            f"{where}: one rate over prompt and output is neither prefill nor decode with {scheme}, which runs the "
            'whole prompt at once; time them apart and import a csv, or give --quant "ncnn fp16" if it was ncnn'
        )
    prompt, output = (figure.says.get(key, getattr(arguments, key)) for key in ("prompt_tokens", "decode_tokens"))
    if "tokens" in figure.facts:
        prompt, output = _split(figure.facts["tokens"], prompt, output, where)
    remark = f"; {figure.remark}" if figure.remark else ""
    lengths = {"prompt_tokens": prompt, "decode_tokens": output}
    workload = known_workload(figure.metric, prompt, output)
    note = figure.says.get("note", arguments.note)
    time = checked_date(figure.says["date"], where) if "date" in figure.says else arguments.date
    return Row(
        kind="recorded",
        run=f"import-{digest[:12]}-{figure.line}",
        time=time,
        hardware=hardware,
        backend=backend,
        backend_version=figure.says.get("backend_version"),
        model=model,
        scheme=scheme,
        scheme_class=scheme_class(scheme),
        threads=figure.says.get("threads", arguments.threads),
        workload=workload,
        metric=figure.metric,
        value=figure.value,
        reason=f"printed by {backend}; parity unknown{remark}",
        extra={
            "source": f"{arguments.source} output ({label})",
            "printed": {"line": figure.line, "text": figure.text, **figure.facts},
            **({} if workload else {key: length for key, length in lengths.items() if length is not None}),
            **({"note": note} if note else {}),
        },
    )


def _said(figure: Figure, key: str, option: str, default: str | None, where: str) -> str:
    """What the file says, else the option. Raises :class:`ImportProblem` where neither says it."""
    value = figure.says.get(key, default)
    if not value:
        raise ImportProblem(f"{where} does not say its {key}; give --{option}")
    return str(value)


def _split(total: int, prompt: int | None, output: int | None, where: str) -> tuple[int | None, int | None]:
    """Prompt and output of a count that covers both, if one of them is known."""
    if prompt is None and output is None:
        return None, None
    prompt = total - (output or 0) if prompt is None else prompt
    output = total - prompt if output is None else output
    if prompt < 1 or output < 1 or prompt + output != total:
        raise ImportProblem(
            f"{where}: {total} tokens, prompt and output together, are not {prompt} and {output}; give one of "
            "--prompt-tokens and --decode-tokens, or neither"
        )
    return prompt, output


def checked_date(text: str, where: str) -> str:
    """An ISO 8601 date, or date and time, as it was given. A day that is still to come is a slip."""
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ImportProblem(f"{where}: {text[:40]!r} is no date; 2023-09-01 or 2023-09-01T12:30:00Z is") from None
    now = datetime.now(timezone.utc)
    if (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).date() > now.date():
        raise ImportProblem(f"{where}: {text} is still to come")
    return text
