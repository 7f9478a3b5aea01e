"""Commands that give one document, or only say what they do."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable

from harness.commands.deliver import check_files, deliver
from harness.console import fail, say
from harness.options import command_file, output_format


def document(name: str) -> Callable[[Namespace], int]:
    """A command that gives one document: an :class:`harness.outcome.Outcome`."""

    def run_it(arguments: Namespace) -> int:
        from harness.live import LiveLine

        check_files(arguments.output)
        with LiveLine(sys.stderr) as line:
            outcome = command_file(name).run(arguments, line.show, output_format(arguments))
        deliver(outcome.text, arguments.output)
        for text in outcome.said:
            say(text)
        code: int = outcome.code
        return code

    return run_it


def localize(arguments: Namespace) -> int:
    """``localize``: the report to stdout, and a picture where one is asked for."""
    from harness.live import LiveLine
    from harness.status import CRASHED

    command = command_file("localize")
    check_files(arguments.output, arguments.heat_map)
    with LiveLine(sys.stderr) as line:
        try:
            found = command.run(arguments, line.show, output_format(arguments))
        except command.Broke as error:
            return fail(str(error), CRASHED)
    deliver(found.document, arguments.output)
    if arguments.heat_map and found.grid is not None:
        from reports.heatmap import draw

        draw(arguments.heat_map, found.title, found.grid)
    for text in found.said:
        say(text)
    code: int = found.code
    return code


def headroom(arguments: Namespace) -> int:
    """``headroom``: the document to stdout."""
    from harness.live import LiveLine

    check_files(arguments.output)
    with LiveLine(sys.stderr) as line:
        text, code = command_file("headroom").run(arguments, line.show, output_format(arguments))
    deliver(text, arguments.output)
    found: int = code
    return found


def setup(arguments: Namespace) -> int:
    """``setup``: build environments; a line for each on stderr."""
    from harness.live import LiveLine

    with LiveLine(sys.stderr) as line:
        code: int = command_file("setup").run(arguments, line.show, line.done)
    return code


def told(name: str) -> Callable[[Namespace], int]:
    """``convert``, ``compile``: a command that only says what it does, a line each on stderr."""

    def run_it(arguments: Namespace) -> int:
        code: int = command_file(name).run(arguments, say)
        return code

    return run_it
