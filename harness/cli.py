"""``rwkv-bench``: the entry point.

    arguments -> plan -> rows, stored as they come -> table

Nothing heavy is imported before the command is known, and no runtime before a cell needs it.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence

from harness import cuda_order, streams
from harness.commands.documents import document, headroom, localize, setup, told
from harness.commands.rows import import_figures, quality, run
from harness.commands.text import generate, list_what_is_here
from harness.console import fail, out, show_warning
from harness.interrupt import Terminated, terminable
from harness.options import NotInThisVersion, TextWanted, UsageError, parse

#: Command -> what it does, to an exit status. Every other one gives one document.
_COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "run": run,
    "parity": run,
    "list": list_what_is_here,
    "generate": generate,
    "setup": setup,
    "convert": told("convert"),
    "compile": told("compile"),
    "import": import_figures,
    "quality": quality,
    "localize": localize,
    "headroom": headroom,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    streams.prepare()
    cuda_order.settle()
    try:
        with terminable(), warnings.catch_warnings():
            warnings.showwarning = show_warning
            return _command(list(sys.argv[1:] if argv is None else argv))
    except Terminated as signal:
        return fail(f"ended by {signal}", 128 + signal.number)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def _command(argv: list[str]) -> int:
    from backends.api import Unavailable, Unsupported
    from backends.index import LIBRARIES
    from harness.status import BAD_INPUT, NOT_AVAILABLE, PASSED
    from reference.errors import InputError

    try:
        try:
            arguments = parse(argv)
        except TextWanted as wanted:
            out(str(wanted))
            return PASSED
        for name, file in getattr(arguments, "library", ()):
            if not os.path.exists(file):
                raise UsageError(f"--library {name}: {file}: no such file or folder")
            os.environ[LIBRARIES[name]] = file  # before the backend is imported: what it offers depends on it
        command = _COMMANDS.get(arguments.command) or document(arguments.command)
        return command(arguments)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does
        return PASSED
    except (Unavailable, Unsupported, NotInThisVersion) as error:
        return fail(str(error), NOT_AVAILABLE)
    except (UsageError, InputError) as error:
        return fail(str(error), BAD_INPUT)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), BAD_INPUT)
