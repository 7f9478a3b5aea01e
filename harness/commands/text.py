"""``list`` and ``generate``: what is here, and text as it comes."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from harness.commands.deliver import counted
from harness.console import columns, fail, out, say

if TYPE_CHECKING:
    from harness.conversation import Conversing


def list_what_is_here(arguments: Namespace) -> int:
    """``list``: backends, schemes, hardware, models."""
    from harness.listing import collect, measure_again
    from reports.records import as_json, as_text

    if arguments.probe:
        measure_again()
    found = collect(arguments.what)
    out(as_json(found) if arguments.format == "json" else as_text(found, columns()))
    return 0


def generate(arguments: Namespace) -> int:
    """``generate``: text to stdout as it comes, its speed to stderr."""
    from backends.index import load_backend
    from harness.asked import only_cell
    from harness.conversation import Conversing
    from harness.generate import NonFiniteLogits, Speed, speeds
    from harness.generate import generate as tokens_of
    from harness.models import open_model
    from harness.session import open_session
    from harness.status import FAILED
    from reference.errors import InputError

    data = sys.stdin.buffer.read() if arguments.prompt == "-" else os.fsencode(arguments.prompt)
    backend = load_backend(arguments.backend)
    if isinstance(backend, Conversing):
        return _converse(backend, data.decode("utf-8", "replace"), arguments)
    cell = only_cell(arguments)
    model = open_model(cell.model, arguments.seed)
    tokenizer = model.tokenizer()
    prompt = tokenizer.encode(data)
    if not prompt:
        raise InputError("the prompt is empty; at least one token is needed")
    speed, stream = Speed(), tokenizer.stream()
    problem = ""
    with open_session(cell.backend, model, cell.scheme, cell.hardware.device, cell.threads) as opened:
        options = {"temperature": arguments.temperature, "top_p": arguments.top_p, "seed": arguments.seed}
        options["stop"] = tokenizer.end_of_text
        try:
            out(data.decode("utf-8", "replace"))
            for token in tokens_of(opened.session, prompt, arguments.tokens, speed=speed, **options):
                out(stream.feed(token))
        except NonFiniteLogits as error:
            problem = f"{cell.backend}: {error}; rwkv-bench parity shows where it begins"
        out(stream.flush() + "\n")
    if problem:
        return fail(problem, FAILED)
    say(f"{cell.backend} {cell.scheme}: {speeds(speed)} (one run, not checked for parity)")
    return 0


def _converse(backend: Conversing, prompt: str, arguments: Namespace) -> int:
    """``generate`` with a program that only talks: its answer, and recorded rows of the speeds it prints."""
    from harness.collect import store_path
    from harness.conversation import ConversationFailed, ask, unheard
    from harness.status import CRASHED
    from harness.store import append

    say(unheard(backend))
    try:
        answer, rows = ask(backend, prompt, arguments)
    except ConversationFailed as error:
        return fail(str(error), CRASHED)
    out(answer + "\n")
    store = store_path(None)
    for row in rows:
        append(store, row)
        say(f"{row.backend} {row.scheme}: {row.metric} {row.value:g} {row.unit}, as it printed it (parity unknown)")
    say(f"{counted(len(rows))} added to {store}")
    return 0
