"""What reaches the user's streams: data to stdout, everything else to stderr, a line at a time."""

from __future__ import annotations

import shutil
import sys

from harness import streams
from reference.errors import InputError


def out(text: str | bytes) -> None:
    """Data to stdout at once. Raises BrokenPipeError, or InputError where it cannot be written."""
    if isinstance(text, bytes) and sys.stdout.isatty():
        raise InputError("this is a picture, not text; --output FILE writes it to a file")
    try:
        if isinstance(text, bytes):
            sys.stdout.buffer.write(text)
        else:
            sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        streams.silence(sys.stdout)
        raise
    except OSError as error:
        streams.silence(sys.stdout)
        raise InputError(f"cannot write to standard output: {error.strerror}; --output writes to a file") from None


def say(text: str) -> None:
    """One line to stderr, whatever it holds: what would move the cursor or colour the screen is shown escaped."""
    line = "".join(c if c.isprintable() else " " if c == "\n" else c.encode("unicode_escape").decode() for c in text)
    try:
        sys.stderr.write(f"rwkv-bench: {line}\n")
        sys.stderr.flush()
    except OSError:
        streams.silence(sys.stderr)


def fail(text: str, code: int) -> int:
    say(text)
    return code


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"warning: {message}")


def columns() -> int | None:
    """Columns of the terminal; None where stdout is none, so that nothing is cut or wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
