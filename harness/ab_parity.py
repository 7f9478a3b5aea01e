"""The verdicts of a side on its cells, with its own code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.ab_checkouts import Side
from harness.ab_workers import Ended, Running

#: Runs the command line of a side's own code.
_CLI = "import json, sys; sys.path[:0] = json.loads(sys.argv.pop(1)); from harness.cli import main; sys.exit(main())"

#: One sample of each metric: it is the checks of it that count.
_SHORT = ("--repeats", "1", "--time-budget", "0")

#: Seconds that the parity of a side may take.
PARITY_SECONDS = 3600.0


def parity_rows(side: Side, options: Sequence[str]) -> list[dict[str, Any]]:
    """Rows, as JSON has them, of a short ``rwkv-bench run`` with the code of ``side``. Raises BlockFailed.

    Not of ``parity``, which knows no workload: ``options`` name one, and its calls are judged as they are timed.
    """
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-parity-") as folder:
        out, store = Path(folder) / "parity.json", Path(folder) / "rows.jsonl"
        words = ["run", *options, *_SHORT, "--format", "json", "--output", str(out), "--store", str(store)]
        with suppress(Ended):  # a FAIL is a status too; the rows say which
            _run([side.python, "-c", _CLI, json.dumps(side.paths), *words], side, PARITY_SECONDS)
        if not out.exists():
            _run([side.python, "-c", _CLI, json.dumps(side.paths), *words], side, PARITY_SECONDS)
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        return [dict(row) for row in rows]


def _run(command: Sequence[str], side: Side, timeout: float) -> None:
    with Running(command, side) as running:
        running.end(timeout, timeout)
