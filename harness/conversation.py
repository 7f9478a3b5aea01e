"""A program that answers text with text: what it says, and the speeds it prints as recorded rows.

Nobody sees its logits, so its figures are never measured ones and bear no verdict.
"""

from __future__ import annotations

import secrets
import shlex
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from backends.api import BackendInfo
from harness.hardware import local_hardware
from harness.printed import PARSERS, lines_of
from harness.recorded_names import scheme_class
from harness.rows import Row
from reference.errors import InputError


@runtime_checkable
class Conversing(Protocol):
    """A backend that has no session but talks: ``converse`` besides ``INFO``.

    ``PRINTED``, optional, names the program of :data:`harness.printed.PARSERS` whose speeds it prints; its own name
    is that of one otherwise.
    """

    INFO: BackendInfo

    def converse(self, folder: str, prompt: str, device: str, seconds: float) -> tuple[str, str]:
        """The answer to a prompt, and the statistics printed after it.

        Raises Unavailable, Unsupported, InputError, and RuntimeError where the program fails.
        """


class ConversationFailed(Exception):
    """The program failed, or took too long; one line."""


#: Seconds for loading, an answer and its statistics.
LONGEST = 600.0


def ask(backend: Conversing, prompt: str, arguments: Namespace) -> tuple[str, list[Row]]:
    """What ``generate`` asks for: the answer, and the rows of what was printed with it.

    Raises InputError, Unavailable, Unsupported, ConversationFailed.
    """
    if not arguments.quant:
        raise InputError(f"--quant: what {arguments.model} is compiled for; the program does not say it")
    printed_as = _parser(backend)
    try:
        answer, printed = backend.converse(arguments.model, prompt, arguments.device, LONGEST)
    except RuntimeError as error:
        raise ConversationFailed(str(error)) from None
    here = {item.device: item for item in local_hardware()}
    known = {
        "model": Path(arguments.model).resolve().name,
        "scheme": arguments.quant,
        "hardware": here[arguments.device].name if arguments.device in here else "unknown",
        "device": arguments.device,
        "command": _command(arguments, prompt),
    }
    return answer, recorded(printed, backend.INFO.name, known, printed_as)


def unheard(backend: Conversing) -> str:
    """What is to be said before an answer: which options of ``generate`` mean nothing to a program that samples."""
    options = ("--tokens", "--temperature", "--top-p", "--seed")
    return f"{backend.INFO.name} samples by itself: {', '.join(options)} do not apply to it"


def _parser(backend: Conversing) -> str:
    """Name of the parser of what it prints; raises InputError before anything runs where there is none."""
    name = str(getattr(backend, "PRINTED", backend.INFO.name))
    if name not in PARSERS:
        known = ", ".join(sorted(PARSERS))
        raise InputError(f"{backend.INFO.name}: no speeds of {name!r} can be read; its PRINTED may name one of {known}")
    return name


def _command(arguments: Namespace, prompt: str) -> str:
    """The command line that asks the same again."""
    words = ["rwkv-bench", "generate", "--model", arguments.model, "--backend", arguments.backend]
    words += ["--quant", arguments.quant, "--device", arguments.device]
    return shlex.join([*words, "--", prompt])


def recorded(printed: str, name: str, known: Mapping[str, Any], parser: str | None = None) -> list[Row]:
    """A recorded row for each speed in ``printed``, a text that ``rwkv-bench import --from PARSER`` reads.

    ``known`` has the fields model, scheme, hardware, hardware_detail, device, command; ``parser`` is ``name`` where
    it is not given.
    """
    fields = {
        **known,
        "kind": "recorded",
        "run": f"{name}-{secrets.token_hex(6)}",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": name,
        "scheme_class": scheme_class(known["scheme"]),
        "reason": f"printed by {name}; parity unknown",
    }
    figures = PARSERS[parser or name](lines_of(printed.encode())).figures
    return [
        Row(
            **fields,
            metric=figure.metric,
            value=figure.value,
            extra={"source": name, "printed": {"line": figure.line, "text": figure.text, **figure.facts}},
        )
        for figure in figures
    ]
