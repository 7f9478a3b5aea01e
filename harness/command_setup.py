"""``setup``: build the environments of backends that need their own, and see that each one answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from backends.api import Unavailable
from backends.index import backend_names, load_backend, place
from harness.names import did_you_mean
from harness.status import NOT_AVAILABLE, PASSED
from reference.errors import InputError

if TYPE_CHECKING:
    from harness.inventory import Host

HELP = "build the environment of a backend that needs its own"
EXAMPLES = """\
examples:
  rwkv-bench setup rwkv.cpp
  rwkv-bench setup all                  every backend that needs an environment
  rwkv-bench setup rwkv.cpp --hardware box   on a host of rwkv-bench.toml
  rwkv-bench setup mine.py              a file of yours with a PEP 723 header
pip's own settings apply; CPU wheels of torch on Linux:
  export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
"""

Say = Callable[[str], None]


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("backends", nargs="+", metavar="BACKEND", help="names or .py files, or all")
    parser.add_argument("--hardware", metavar="HOST", help="on a host of rwkv-bench.toml instead of here")


def run(arguments: argparse.Namespace, show: Say, done: Say) -> int:
    """Build what is asked; ``show`` gets what is happening, ``done`` one line per backend. The exit status."""
    from harness.isolation.environments import build
    from harness.isolation.hosts import setup_there
    from harness.isolation.start import requirements

    named = "all" not in arguments.backends
    host = None if arguments.hardware is None else _host(arguments.hardware)
    failed = False
    for name in dict.fromkeys(backend_names() if not named else arguments.backends):
        try:
            wanted = requirements(load_backend(name))
        except InputError as error:  # an installed package that is broken does not keep the others waiting
            if named:
                raise
            done(f"{name}: not available: {error}")
            continue
        if wanted is None:
            if named:
                done(f"{name}: needs no environment of its own")
            continue

        def tell(line: str, name: str = name) -> None:
            show(f"{name}: {line}")

        try:
            if host is not None:
                done(f"{name}: {setup_there(host, name, wanted, tell)}")
                continue
            environment = build(name, wanted, tell)
            show(f"{name}: first start")
            done(f"{name}: ready, {_first_start(name)}, Python {environment.version}, {len(environment.lock)} packages")
        except Unavailable as error:
            failed = True
            done(f"{name}: not available: {error}")
    return NOT_AVAILABLE if failed else PASSED


def _host(name: str) -> Host:
    from harness import inventory

    found = inventory.find(name)
    if not isinstance(found, inventory.Host):
        known = list(inventory.load().hosts)
        hint = did_you_mean(name, known)
        raise InputError(f"no host {name!r} in rwkv-bench.toml; {hint}hosts: {', '.join(known) or 'none'}")
    return found


def _first_start(name: str) -> str:
    """Start the backend's worker in its environment once: what it says of its version. Raises Unavailable."""
    from harness.isolation.child import ChildDied, ChildTimedOut
    from harness.isolation.remote import RemoteError
    from harness.isolation.start import start

    try:
        line = start(name, load_backend(name))
        try:
            answer, _ = line.ask("check", backend=place(name))
        finally:
            line.child.kill()
    except (ChildDied, ChildTimedOut, RemoteError) as error:
        raise Unavailable(f"its environment was built, but it does not start: {error}") from None
    return str(answer["version"] or "version unknown")
