"""A program that answers text with text: what it says, and the speeds it prints as recorded rows.

Nobody sees its logits, so its figures are never measured ones and bear no verdict.
"""

from __future__ import annotations

import secrets
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from harness.hardware import local_hardware
from harness.printed import PARSERS, lines_of
from harness.recorded_names import scheme_class
from harness.rows import Row
from reference.errors import InputError


@runtime_checkable
class Conversing(Protocol):
    """A backend that has no session but talks: ``converse`` besides ``INFO``.

    Raises Unavailable, Unsupported, InputError, and RuntimeError where the program fails.
    """

    def converse(self, folder: str, prompt: str, device: str, seconds: float) -> tuple[str, str]:
        """The answer to a prompt, and the statistics printed after it."""


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
    try:
        answer, printed = backend.converse(arguments.model, prompt, arguments.device, LONGEST)
    except RuntimeError as error:
        raise ConversationFailed(str(error)) from None
    here = {item.device: item for item in local_hardware()}
    known = {
        "model": Path(arguments.model).name,
        "scheme": arguments.quant,
        "hardware": here[arguments.device].name if arguments.device in here else "unknown",
        "device": arguments.device,
    }
    return answer, recorded(printed, arguments.backend, known)


def recorded(printed: str, name: str, known: Mapping[str, Any]) -> list[Row]:
    """A recorded row for each speed in ``printed``, a text that ``rwkv-bench import --from NAME`` reads.

    ``known`` has the fields model, scheme, hardware, hardware_detail, device.
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
    figures = PARSERS[name](lines_of(printed.encode())).figures
    return [
        Row(
            **fields,
            metric=figure.metric,
            value=figure.value,
            extra={"source": name, "printed": {"line": figure.line, "text": figure.text, **figure.facts}},
        )
        for figure in figures
    ]
