"""Blocks of one cell measured together: a process for each side, loaded at once, that take turns at single samples.

What a machine does for a second or two falls on both sides of a pair alike where their samples alternate, A B B A, and
not where one block follows the other. While one is measured the other is stopped, spinning threads and all. How many
samples there are follows from how long the processes took to start, not from what is measured.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.ab_checkouts import Side
from harness.isolation import lifeline
from harness.names import one_line

WORKER = Path(__file__).with_name("ab_worker.py")

#: Samples of a block where none are asked for: as many as take half as long as starting did, within these. An answer
#: needs a dozen pairs at least, however quiet the machine is, and starting them is most of what they cost.
LEAST, MOST = 4, 40

#: Milliseconds after which a process that is waited for is looked at.
_LOOK_MS = 200


class BlockFailed(Exception):
    """A block that gave no times; one line."""

    verdict = "CRASHED"


class BlockWrong(BlockFailed):
    """A block that took its times from wrong results; one line."""

    verdict = "FAIL"


class Ended(BlockFailed):
    """Ended with a status other than 0."""


@dataclass(frozen=True)
class Block:
    """Nanoseconds of every sample of each metric, its driver, and the version of the runtime."""

    ns: Mapping[str, tuple[int, ...]]
    drivers: Mapping[str, str | None]
    version: str | None


def measure(
    asked: Sequence[tuple[Side, Mapping[str, Any]]], timeout: float = 600.0
) -> list[Block | BlockFailed | None]:
    """Start a process for each, let them take turns in the order given and back again, check, end them.

    asked    sides with what :mod:`harness.ab_worker` is told, ``repeats`` among it: samples, or ``None`` for enough
    timeout  seconds that each may take

    ``None`` stands for a block that came to nothing because another one failed.
    """
    with ExitStack() as stack:
        began, timeout = time.monotonic(), timeout * len(asked)
        workers = [_Worker(side, spec, stack, began + timeout, timeout) for side, spec in asked]
        try:
            for worker in workers:  # they load side by side, and are warmed up one by one
                worker.reply()
                worker.stop()
            start_s = time.monotonic() - began
            for worker in workers:
                worker.turn(b"b")
            _turns(workers, asked[0][1].get("repeats"), start_s, began + timeout)
            for worker in workers:
                worker.finish()
        except _Failed as failed:
            return [failed.why if worker is failed.worker else None for worker in workers]
        return [worker.block() for worker in workers]


def _turns(workers: Sequence[_Worker], samples: int | None, start_s: float, deadline: float) -> None:
    """``samples`` of each worker; ``None``: as many as take half as long as starting them all did, and half of the time
    that is left at most."""
    taken, began = 0, time.monotonic()
    while samples is None or taken < samples:
        for worker in workers if taken % 2 == 0 else reversed(workers):
            worker.turn()
        taken += 1
        if samples is None and taken == 2:
            each = (time.monotonic() - began) / taken
            samples = min(MOST, max(LEAST, 2 * math.ceil(start_s / each / 4)))
            samples = max(2, min(samples, 2 * int((deadline - time.monotonic()) / each / 4)))


class _Failed(Exception):
    """A worker will give no block, and why."""

    def __init__(self, worker: _Worker, why: BlockFailed) -> None:
        super().__init__(str(why))
        self.worker, self.why = worker, why


class _Worker:
    """One side's process, killed with all that it started when ``stack`` ends, however that is."""

    def __init__(self, side: Side, spec: Mapping[str, Any], stack: ExitStack, deadline: float, timeout: float) -> None:
        self._deadline, self._timeout = deadline, timeout
        self._out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rwkv-bench-block-"))) / "block.json"
        with ExitStack() as theirs:  # their ends, which only the process keeps
            go, self._go = _pipe(theirs, stack)
            life, _ = _pipe(theirs, stack)
            done, self._done = _pipe(theirs, stack, reads=False)
            about = {"paths": side.paths, "harness": side.harness, "out": str(self._out), "go": go, "done": done}
            command = [side.python, str(WORKER), json.dumps({**spec, **about})]
            self._process = stack.enter_context(Running(command, side, (go, done), life))

    def turn(self, what: bytes = b"t") -> None:
        """One sample of each metric; it is stopped before and after."""
        self._tell(what)
        self.reply()
        self.stop()

    def finish(self) -> None:
        """From here on it checks its results and ends."""
        self._tell(b"e")

    def stop(self) -> None:
        """Its threads too, some of which spin while they wait."""
        self._process.stop()

    def reply(self) -> None:
        """Wait until it is ready for the next turn."""
        poll = select.poll()
        poll.register(self._done, select.POLLIN)
        while not poll.poll(_LOOK_MS):  # what it has forked may hold the pipe open when it is gone itself
            if time.monotonic() > self._deadline or not self._process.running:
                raise _Failed(self, self._last_words())
        if not os.read(self._done, 1):
            raise _Failed(self, self._last_words())

    def block(self) -> Block | BlockFailed:
        """What it found, once it has ended."""
        try:
            self._process.end(max(0.0, self._deadline - time.monotonic()), self._timeout)
        except BlockFailed as failed:
            return failed
        try:
            found = json.loads(self._out.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return BlockFailed("ended without an answer")
        if "wrong" in found:
            return BlockWrong(one_line(found["wrong"]))
        metrics = found["metrics"]
        return Block(
            {name: tuple(it["ns"]) for name, it in metrics.items()},
            {name: it["driver"] for name, it in metrics.items()},
            found["version"],
        )

    def _tell(self, what: bytes) -> None:
        self._process.signal(signal.SIGCONT)
        try:
            os.write(self._go, what)
        except BrokenPipeError:
            raise _Failed(self, self._last_words()) from None

    def _last_words(self) -> BlockFailed:
        try:
            self._process.end(max(0.0, self._deadline - time.monotonic()), self._timeout)
        except BlockFailed as failed:
            return failed
        return BlockFailed("ended without an answer")


def _pipe(theirs: ExitStack, ours: ExitStack, reads: bool = True) -> tuple[int, int]:
    """The other process's end, closed when ``theirs`` is, and this one's, closed when ``ours`` is."""
    read, write = os.pipe()
    far, near = (read, write) if reads else (write, read)
    theirs.callback(os.close, far)
    ours.callback(os.close, near)
    return far, near


class Running:
    """A command of a side in a process group of its own, killed on leaving.

    life  read end of a pipe; when this process is gone, even by SIGKILL, so is the other (:mod:`lifeline`)
    """

    def __init__(
        self, command: Sequence[str], side: Side, pass_fds: Sequence[int] = (), life: int | None = None
    ) -> None:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if life is not None:
            environment[lifeline.VARIABLE], pass_fds = str(life), (*pass_fds, life)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed on leaving
        self._process = subprocess.Popen(
            command, cwd=side.root, env=environment, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
            start_new_session=True, pass_fds=pass_fds,
        )  # fmt: skip

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()
        self._said.close()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To all of the group, while there is one."""
        if self._process.poll() is None:  # not reaped: the number is still its own
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Stop all of the group, and wait until it is."""
        self.signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):  # not on macOS before Python 3.13
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def end(self, left: float, timeout: float) -> None:
        """Wait ``left`` seconds of ``timeout`` for a status of 0. Raises BlockFailed, and Ended with its last words."""
        try:
            code = self._process.wait(left)
        except subprocess.TimeoutExpired:
            raise BlockFailed(f"no end after {timeout:g} s; killed") from None
        if code:
            self._said.seek(0)
            lines = self._said.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no output"]
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            raise Ended(one_line(f"{how}: {lines[0]}"))
