"""``rwkv-bench recommend``: the best cell under limits of memory, speed and quality, from rows already measured."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reports.command_report import chosen, results_and_filters

if TYPE_CHECKING:
    from harness.outcome import Outcome
    from reports.recommend import Advice, Candidate, Limits
    from reports.tables import Table

HELP = "the best cell under limits of memory, speed and quality"

EXAMPLES = """\
examples:
  rwkv-bench recommend --max-memory 4GiB --min-speed 20 --max-kl 0.05
  rwkv-bench recommend --max-memory 600MB --for quality --hardware cpu
  rwkv-bench recommend ci/*.jsonl --model 169m --quant int4 --format json

A limit holds where the whole 95 % interval does. What is unknown meets no
limit; a cell without a PASS verdict is never recommended. Exit status 3:
nothing meets the limits.
"""

FORMATS = ("table", "md", "json")

#: Reasons told one by one below a table; more are counted.
_TOLD = 12

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--format`` and ``--output`` are added by :mod:`harness.options`."""
    group = parser.add_argument_group("limits")
    group.add_argument("--max-memory", type=_bytes, metavar="SIZE", help="peak memory, such as 4GiB or 600MB")
    group.add_argument("--min-speed", type=_positive, metavar="N", help="decode, tok/s")
    group.add_argument("--max-kl", type=_positive, metavar="N", help="KL from the fp32 weights, nat a token")
    aims = ("decode", "prefill", "memory", "quality")
    group.add_argument("--for", dest="aim", choices=aims, default="decode", help="best in what (default decode)")
    results_and_filters(parser)


def run(arguments: argparse.Namespace, tell: Callable[[str], None], kind: str) -> Outcome:
    """The advice for each model on each machine at each workload. Raises InputError for files that cannot be read."""
    from harness.outcome import Outcome
    from harness.status import NOT_AVAILABLE, PASSED
    from reports.cells import cells
    from reports.recommend import Limits, recommend

    tell("reading")
    found = chosen(arguments)
    limits = Limits(arguments.max_memory, arguments.min_speed, arguments.max_kl)
    advice = recommend(cells(found.rows), limits, arguments.aim)
    met = any(each.best is not None for each in advice)
    said = found.said if met else (*found.said, _nothing(advice, limits))
    return Outcome(_rendered(advice, limits, arguments.aim, kind), PASSED if met else NOT_AVAILABLE, said)


def _nothing(advice: Sequence[Advice], limits: Limits) -> str:
    n = sum(len(each.candidates) for each in advice)
    asked = _asked(limits)
    return f"nothing is recommended: of {n} cells none passes" + (f" and is known to have {asked}" if asked else "")


def _asked(limits: Limits) -> str:
    from reports.recommend import size
    from reports.tables import number

    words = [
        "" if limits.memory is None else f"memory up to {size(limits.memory)}",
        "" if limits.speed is None else f"decode of {number(limits.speed)} tok/s or more",
        "" if limits.kl is None else f"KL up to {limits.kl:g}",
    ]
    return ", ".join(word for word in words if word)


def _rendered(advice: Sequence[Advice], limits: Limits, aim: str, kind: str) -> str:
    if kind == "json":
        limits_ = {"max_memory": limits.memory, "min_speed": limits.speed, "max_kl": limits.kl, "for": aim}
        document = {"schema": 1, "limits": limits_, "recommended": [_record(each) for each in advice]}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    tables = [_table(each, limits, aim) for each in advice]
    if kind == "md":
        from reports.report_md import escaped
        from reports.tables import markdown

        return "\n".join(markdown(escaped(table)) for table in tables)
    from harness.console import columns
    from reports.terminal import render

    return "\n".join(render(table, columns()) for table in tables)


def _table(advice: Advice, limits: Limits, aim: str) -> Table:
    """The cells that pass, the best one first; below it why, and why the others fall out."""
    from reports.tables import Table

    passed = [each for each in advice.candidates if each.cell.verdict == "PASS"]
    points = any(each.point for each in passed)
    header = (
        "",
        "backend",
        "scheme",
        *(("at",) if points else ()),
        "decode tok/s",
        "prefill tok/s",
        "memory",
        "KL",
        "frontier",
    )
    lines = tuple(_line(each, advice, points) for each in passed)
    best = advice.best
    verdict = "nothing meets the limits" if best is None else f"use {best.name}, best in {aim}"
    asked = _asked(limits)
    work = f", {advice.workload} tokens" if advice.workload else ""
    title = f"{advice.model} on {advice.hardware}{work}: {verdict}" + (f" ({asked})" if asked else "")
    return Table(
        title,
        header,
        lines,
        tuple(_notes(advice)),
        left=("", "backend", "scheme", "at"),
        spare=("prefill tok/s", "frontier"),
    )


def _line(each: Candidate, advice: Advice, points: bool) -> tuple[str, ...]:
    from reports.recommend import size
    from reports.tables import small, speed

    row = each.cell.first
    mark = "best" if each is advice.best else "meets" if not each.why else "-"
    return (
        *(mark, row.backend, row.scheme, *((each.point,) if points else ()), speed(each.decode), speed(each.prefill)),
        "unknown" if each.memory is None else size(each.memory),
        "unknown" if each.kl is None or each.kl.value is None else small(each.kl.value),
        "yes" if each.on_frontier else "",
    )


def _notes(advice: Advice) -> list[str]:
    notes = []
    best = advice.best
    if best is not None:
        if best.decode is not None and best.decode.interval is None:
            notes.append(f"{best.name}: no interval (fewer than six samples): its speed is one figure, not a range")
        if best.cell.first.kind == "recorded":
            notes.append(f"{best.name}: recorded elsewhere, not measured by this machine")
        if advice.alike:
            notes.append(f"not told apart from it: {', '.join(each.name for each in advice.alike)} (intervals overlap)")
        if best.cell.first.command:
            notes.append(f"measured by: {best.cell.first.command}")
    out: dict[str, list[str]] = {}
    for each in advice.candidates:
        if each.why:
            out.setdefault("; ".join(each.why), []).append(each.name)
    told = [f"out: {', '.join(names)}: {why}" for why, names in out.items()]
    more = [f"and {len(told) - _TOLD} more reasons; --format json has them all"] if len(told) > _TOLD else []
    return [*notes, advice.aside, *told[:_TOLD], *more]


def _record(advice: Advice) -> dict[str, Any]:
    return {
        "hardware": advice.hardware,
        "model": advice.model,
        "workload": advice.workload or None,
        "best": None if advice.best is None else _candidate(advice.best),
        "not_told_apart": [_candidate(each) for each in advice.alike],
        "frontier": [_candidate(each) for each in advice.candidates if each.on_frontier],
        "frontier_over": advice.aside,
        "cells": [_candidate(each) for each in advice.candidates],
    }


def _candidate(each: Candidate) -> dict[str, Any]:
    row = each.cell.first
    work = None if row.workload is None else dict(vars(row.workload))
    return {
        "kind": row.kind,
        "backend": row.backend,
        "scheme": row.scheme,
        "threads": row.threads,
        "workload": work,
        "verdict": each.cell.verdict or None,
        "decode": None if each.decode is None else each.decode.value,
        "decode_interval": None if each.decode is None else each.decode.interval,
        "prefill": None if each.prefill is None else each.prefill.value,
        "memory_bytes": each.memory,
        "kl_divergence": None if each.kl is None else each.kl.value,
        "on_frontier": each.on_frontier,
        "meets": not each.why,
        "why_not": list(each.why),
        "command": row.command,
    }


def _bytes(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text, re.IGNORECASE)
    unit = "" if found is None else found[2].lower()
    unit = unit if unit in _UNITS else f"{unit}b"
    if found is None or unit not in _UNITS or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size; 4GiB, 600MB and 2147483648 are")
    return float(found[1]) * _UNITS[unit]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number above 0")
    return value
