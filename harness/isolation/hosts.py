"""Cells on another machine: our code and the model pushed over ssh, the same frames over its standard input and output.

Nothing has to be installed there but an interpreter with numpy and packaging. Whatever happens to the
connection, the far side ends when its standard input does (:mod:`harness.isolation.far`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from backends.api import Unavailable
from backends.index import place
from harness.inventory import Host
from harness.isolation.archive import code_archive
from harness.isolation.child import TIMEOUT_SECONDS, Child, ChildDied, ChildTimedOut
from harness.isolation.remote import Line, RemoteError
from harness.isolation.requirements import Requirements
from harness.isolation.start import our_variables, requirements
from reference.converted import content_key, converted
from reference.weights import Weights

#: Seconds until a host that says nothing counts as unreachable.
CONNECT_SECONDS = 60.0

_PIECE = 8 << 20

#: Run by the host's interpreter: takes as many bytes of code as its argument says, and runs them.
BOOT = """\
import os, sys, tempfile
folder = tempfile.TemporaryDirectory(prefix="rwkv-bench-code-")
path, left = os.path.join(folder.name, "code.zip"), int(sys.argv[1])
with open(path, "wb") as file:
    while left:
        block = os.read(0, min(left, 65536))
        if not block:
            sys.exit("the connection was lost while the code was sent")
        left -= file.write(block)
sys.path.insert(0, path)
sys.dont_write_bytecode = True
from harness.isolation.far import main
main(path)
"""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Facts:
    """What a host says of itself: its devices as :class:`harness.hardware.Hardware` fields, and the row's detail."""

    hardware: tuple[Mapping[str, str], ...]
    detail: Mapping[str, str | int]
    threads: int
    free_bytes: int


@contextmanager
def connected(host: Host, timeout: float | None = None) -> Iterator[Line]:
    """A line to a host on which nothing runs yet. Raises Unavailable where it cannot be reached."""
    code = code_archive().read_bytes()
    command = shlex.join([host.interpreter, "-I", "-c", BOOT, str(len(code))])
    try:
        child = Child([*host.ssh, command], {**os.environ}, CONNECT_SECONDS, over_stdio=True)
    except OSError as error:
        raise Unavailable(f"{host.name} cannot be reached: {host.ssh[0]}: {error.strerror}") from None
    try:
        try:
            with child.waiting("connecting"):
                child.channel.send_bytes(code)
            line = Line(child)
        except (ChildDied, ChildTimedOut) as error:
            raise Unavailable(f"{host.name} cannot be reached: {error}", f"try {shlex.join(host.ssh)} true") from None
        child.timeout = CONNECT_SECONDS if timeout is None else timeout
        yield line
    finally:
        child.kill()


def facts(host: Host) -> Facts:
    """What a host has. Raises Unavailable where it cannot be reached."""
    with connected(host) as line:
        answer, _ = line.ask("facts")
    return Facts(tuple(answer["hardware"]), answer["detail"], answer["threads"], answer["free_bytes"])


def start_there(
    line: Line, host: Host, name: str, backend: ModuleType, threads: int | None, timeout: float | None
) -> None:
    """Start a backend's worker on the host; from then on the line speaks to it. Raises Unavailable."""
    wanted = requirements(backend)
    try:
        line.ask(
            "start",
            backend=name,
            wanted=None if wanted is None else asdict(wanted),
            environments=host.environments,
            variables=our_variables(threads),
        )
    except Unavailable as error:
        cure = f"{error.how_to_get_it} --hardware {host.name}" if error.how_to_get_it.startswith("rwkv-bench") else ""
        raise Unavailable(f"{host.name}: {error.reason}", cure or error.how_to_get_it) from None
    line.child.timeout = TIMEOUT_SECONDS if timeout is None else timeout
    line.greeted()


def backend_there(name: str) -> dict[str, str]:
    """How a worker there finds the backend: in the code that was pushed, or as source, sent along."""
    found = place(name)
    if "file" not in found:
        return found
    path = Path(found["file"])
    return {"source": path.read_text(encoding="utf-8"), "name": path.name}


def setup_there(host: Host, name: str, wanted: Requirements, tell: Tell) -> str:
    """Build a backend's environment on the host; what is installed. Raises Unavailable."""
    with connected(host, timeout=3600) as line:
        try:
            answer, _ = line.ask(
                "setup",
                event=lambda header, arrays: tell(header["text"]),
                backend=name,
                wanted=asdict(wanted),
                environments=host.environments,
            )
        except (ChildDied, ChildTimedOut, RemoteError) as error:
            raise Unavailable(f"{host.name}: {error}") from None
    return f"ready on {host.name}, Python {answer['python']}, {answer['packages']} packages"


def model_there(line: Line, host: Host, weights: Weights, seed: int | None, name: str, tell: Tell) -> Mapping[str, Any]:
    """How the worker there gets the weights; a file it has not is pushed into its cache, named by content."""
    if seed is not None and weights.synthetic and weights.key:
        return {"preset": name, "seed": seed, "key": weights.key}
    path = Path(weights.source)
    if not (weights.key and path.is_file()):
        path = converted(weights, "safetensors")
    key = content_key(weights)
    answer, _ = line.ask("have", key=key, name=path.name, size=path.stat().st_size, models=host.models)
    if answer["path"] is None:
        answer = _push(line, path, key, tell)
    return {"path": answer["path"], "key": key}


def _push(line: Line, path: Path, key: str, tell: Tell) -> dict[str, Any]:
    size, sent = path.stat().st_size, 0
    answer: dict[str, Any] = {}
    with path.open("rb") as file:
        while sent < size or not size:
            piece = np.frombuffer(file.read(_PIECE), np.uint8)
            answer, _ = line.ask("push", [piece], key=key, suffix=path.suffix, at=sent, last=sent + piece.size >= size)
            sent += piece.size
            tell(f"sending the model, {100 * sent // max(1, size)} %")
            if not piece.size:
                break
    return answer
