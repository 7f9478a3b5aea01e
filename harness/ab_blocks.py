"""One block of one side in a fresh process, and the verdicts of a side.

BlockFailed       the process ended without a result, with its last words; one line
  BlockWrong      what the timed calls returned is not finite or not right
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.ab_checkouts import Side
from harness.names import one_line

WORKER = Path(__file__).with_name("ab_worker.py")

#: Runs the command line of a side's own code.
_CLI = "import json, sys; sys.path[:0] = json.loads(sys.argv.pop(1)); from harness.cli import main; sys.exit(main())"

#: One sample of each metric: it is the checks of it that count.
_SHORT = ("--repeats", "1", "--time-budget", "0")

#: Seconds that a block or the parity of a side may take.
BLOCK_SECONDS, PARITY_SECONDS = 600.0, 3600.0


class BlockFailed(Exception):
    """A block that gave no times; one line."""

    verdict = "CRASHED"


class BlockWrong(BlockFailed):
    """A block that took its times from wrong results; one line."""

    verdict = "FAIL"


@dataclass(frozen=True)
class Block:
    """Nanoseconds of every sample of each metric, its driver, and the version of the runtime."""

    ns: Mapping[str, tuple[int, ...]]
    drivers: Mapping[str, str | None]
    version: str | None


def measure_block(side: Side, spec: Mapping[str, Any], timeout: float = BLOCK_SECONDS) -> Block:
    """Start a process on ``side``, measure, check, end it. Raises BlockFailed, BlockWrong."""
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-block-") as folder:
        out = Path(folder) / "block.json"
        whole = {**spec, "paths": side.paths, "harness": side.harness, "out": str(out)}
        _run([side.python, str(WORKER), json.dumps(whole)], side, timeout)
        try:
            found = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise BlockFailed("ended without an answer") from None
    if "wrong" in found:
        raise BlockWrong(one_line(found["wrong"]))
    metrics = found["metrics"]
    return Block(
        {name: tuple(it["ns"]) for name, it in metrics.items()},
        {name: it["driver"] for name, it in metrics.items()},
        found["version"],
    )


def parity_rows(side: Side, options: Sequence[str]) -> list[dict[str, Any]]:
    """Rows, as JSON has them, of a short ``rwkv-bench run`` with the code of ``side``. Raises BlockFailed.

    Not of ``parity``, which knows no workload: ``options`` name one, and its calls are judged as they are timed.
    """
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-parity-") as folder:
        out, store = Path(folder) / "parity.json", Path(folder) / "rows.jsonl"
        words = ["run", *options, *_SHORT, "--format", "json", "--output", str(out), "--store", str(store)]
        with suppress(_Status):  # a FAIL is a status too; the rows say which
            _run([side.python, "-c", _CLI, json.dumps(side.paths), *words], side, PARITY_SECONDS)
        if not out.exists():
            _run([side.python, "-c", _CLI, json.dumps(side.paths), *words], side, PARITY_SECONDS)
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        return [dict(row) for row in rows]


class _Status(BlockFailed):
    """Ended with a status other than 0."""


def _run(command: Sequence[str], side: Side, timeout: float) -> None:
    """In a process group of its own, killed with all it started, whatever happens."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=side.root, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BlockFailed(f"no end after {timeout:g} s; killed") from None
        finally:
            if process.poll() is None:  # not reaped: the number is still its own
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no output"]
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            raise _Status(one_line(f"{how}: {lines[0]}"))
