"""What a command that gives one document ends in; the entry point prints it and exits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The document, the exit status (:mod:`harness.status`), and lines for stderr after it.

    ``text`` goes to ``--output`` or to stdout; bytes (a picture) need ``--output`` or a stdout that is no terminal.
    """

    text: str | bytes
    code: int
    said: tuple[str, ...] = ()
