"""The far end of an ssh connection: answers for the machine, starts a worker, passes frames through to it.

Standard input and output are the channel; what anything else prints goes to stderr. When standard input
ends, however that comes, the worker and all it has started are killed and nothing stays but the cache.

Needs only the standard library, numpy and packaging, and Python 3.9.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import Unavailable
from harness import cuda_order
from harness.hardware import available_bytes, default_threads, describe, local_hardware
from harness.isolation.archive import BOOT, PATHS
from harness.isolation.child import Child
from harness.isolation.environments import Environment, build, find
from harness.isolation.frames import Channel, ChannelClosed
from harness.isolation.requirements import Requirements
from reference.cache import cache_folder

_PIECE = 1 << 18

Answer = dict


def main(archive: str) -> None:
    """Serve one connection."""
    cuda_order.settle()
    signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(1))  # so that what follows cleans up
    read_file, write_file = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    channel = Channel(read_file, write_file)
    far = Far(archive, channel)
    try:
        channel.greet()
        while far.child is None:
            far.serve_one()
        _pass_through(far.child, read_file, write_file, channel)
    except ChannelClosed:
        pass
    finally:
        if far.child is not None:
            far.child.kill()


class Far:
    """Requests that are answered here, until ``start`` has made a worker."""

    def __init__(self, archive: str, channel: Channel) -> None:
        self.child: Child | None = None
        self._archive, self._channel = archive, channel
        self._asked = 0

    def serve_one(self) -> None:
        """Receive a request, answer it."""
        request, arrays = self._channel.receive()
        self._asked = request.pop("id")
        request.pop("free", None)
        try:
            answer = getattr(self, f"do_{request.pop('do')}")(*arrays, **request)
        except Unavailable as error:
            self._refuse("Unavailable", error, error.reason, error.how_to_get_it)
        except Exception as error:  # noqa: BLE001 - the near side tells the user
            self._refuse("other", error, str(error), "")
        else:
            self._channel.send({"id": self._asked, "ok": answer})

    def _refuse(self, kind: str, error: Exception, text: str, how: str) -> None:
        told = {"kind": kind, "name": type(error).__name__, "text": text, "how": how, "traceback": ""}
        self._channel.send({"id": self._asked, "error": told})

    def do_facts(self) -> Answer:
        """Devices, and what bears on speed."""
        here = local_hardware()
        return {
            "hardware": [{"name": item.name, "device": item.device, "detail": item.detail} for item in here],
            "detail": describe(here[0]),
            "threads": default_threads(1 << 40),
            "free_bytes": available_bytes(),
        }

    def do_have(self, key: str, name: str, size: int, models: str | None) -> Answer:
        """Path of the model here, by content; ``None`` if it must be sent."""
        places = sorted(_models().glob(f"{key}.*"))
        places += [Path(models).expanduser() / name] if models else []
        for path in places:
            if path.is_file() and path.stat().st_size == size and (path.parent == _models() or _hash(path) == key):
                return {"path": str(path)}
        return {"path": None}

    def do_push(self, piece: np.ndarray, key: str, suffix: str, at: int, last: bool) -> Answer:
        """A piece of a model file; it is there when it is whole."""
        _models().mkdir(parents=True, exist_ok=True)
        part, path = _models() / f".{key}.part", _models() / f"{key}{suffix}"
        with open(part, "r+b" if at else "wb") as file:
            file.seek(at)
            file.write(piece.tobytes())
        if last:
            os.replace(part, path)
        return {"path": str(path)}

    def do_setup(self, backend: str, wanted: Mapping[str, Any], environments: str | None) -> Answer:
        """Build an environment."""
        _use(environments)

        def tell(line: str) -> None:
            self._channel.send({"id": self._asked, "event": "progress", "text": line})

        made = build(backend, _requirements(wanted), tell)
        return {"python": made.version, "packages": len(made.lock)}

    def do_start(
        self, backend: str, wanted: Mapping[str, Any] | None, environments: str | None, variables: Mapping[str, str]
    ) -> Answer:
        """Start the worker; what follows on the channel is between it and the near side."""
        _use(environments)
        found: Environment | None = None if wanted is None else find(backend, _requirements(wanted))
        python = sys.executable if found is None else str(found.python)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        cache = {"RWKV_BENCH_CACHE": str(cache_folder().absolute())}
        told = {**kept, **cache, **variables}
        if found is None:
            told[PATHS] = json.dumps(sys.path[1:])  # without the code, which the worker takes from its argument
        self.child = Child([python, "-I", "-c", BOOT, self._archive], told, timeout=1e9)
        return {}


def _pass_through(child: Child, read_file: int, write_file: int, channel: Channel) -> None:
    """Bytes both ways until either end closes; then say how the worker ended, as the answer that is still due."""
    near, worker = read_file, child.channel_file
    poll = select.poll()
    poll.register(near, select.POLLIN)
    poll.register(worker, select.POLLIN)
    with child.waiting("{doing}"):  # harness.isolation.remote.DOING
        while True:
            for file, _ in poll.poll(1000):
                try:
                    block = os.read(file, _PIECE)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    block = b""
                if not block and file == near:
                    return
                if not block:
                    text = child.how_it_ended()
                    child.kill()  # after that its last words are whole
                    text += child.last_words()
                    # Without the number of a request: those are read by the worker only.
                    channel.send({"died": text})
                    return
                if file == near:
                    child.channel.send_bytes(block)
                else:
                    _write_all(write_file, block)


def _write_all(file: int, block: bytes) -> None:
    while block:
        try:
            block = block[os.write(file, block) :]
        except OSError as error:
            raise ChannelClosed(str(error)) from None


def _requirements(wanted: Mapping[str, Any]) -> Requirements:
    return Requirements(wanted["python"], tuple(wanted["dependencies"]), tuple(wanted["no_deps"]))


def _use(environments: str | None) -> None:
    """Where the inventory wants environments: :mod:`harness.isolation.environments` asks this variable."""
    if environments:
        os.environ["RWKV_BENCH_ENVIRONMENTS"] = str(Path(environments).expanduser())


def _models() -> Path:
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    root = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir()) / "rwkv-bench"
    return root / "models"


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
