"""A real slowdown in a checkout: whether ``rwkv-bench ab`` finds it in every cell, and in what time.

    python -m suites.throughput.compare_slowed [--slowdown 5%] [--minutes 5] [--backend numpy,torch] [--quant fp32,fp16]
                                          [--threads N]

The repository is cloned and a commit added whose backends wait after every call, for that part of the call's own
time that makes the speed smaller by ``--slowdown``; ``ab`` then compares it with the commit before. With
``--slowdown 0%`` the commit changes nothing that matters, and no cell may be called slower or faster.

Exit status 1 where prefill or decode of any cell has another answer, or all of it took longer than ``--minutes``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: File -> the class in it whose calls are slowed.
SLOWED = {"backends/numpy_reference.py": "NumpySession", "backends/torch_eager/session.py": "TorchSession"}

PATCH = """

def _slowed(call):
    import time

    def run(*arguments):
        start = time.perf_counter_ns()
        found = call(*arguments)
        end = start + (time.perf_counter_ns() - start) / (1 - {slowdown})
        while time.perf_counter_ns() < end:
            pass
        return found

    return run


for _name in ("forward", "greedy"):
    if hasattr({session}, _name):
        setattr({session}, _name, _slowed(getattr({session}, _name)))
"""

_COMMAND = "import sys; from harness.cli import main; sys.exit(main())"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="slowed-") as folder:
        clone = Path(folder) / "repository"
        _commit(clone, arguments.slowdown)
        start = time.monotonic()
        document = _ab(clone, arguments)
        seconds = time.monotonic() - start
    wanted = ("SLOWER",) if arguments.slowdown else ("NO SLOWER", "UNDECIDED")
    cells = product(arguments.backend.split(","), arguments.quant.split(","), ("prefill", "decode"))
    found = {(line["backend"], line["scheme"], line["metric"]): line for line in document["cells"]}
    right = True
    for cell in cells:
        line = found.get(cell, {"decision": "not there"})
        right = right and line["decision"] in wanted
        print(f"{' '.join(cell)}: {line['decision']}{_figures(line)}")
    limit = 60 * arguments.minutes
    print(f"each to be {' or '.join(wanted)}; {seconds:.0f} s (bar {limit:.0f})")
    return 0 if right and seconds <= limit else 1


def _figures(line: dict[str, Any]) -> str:
    if line.get("ratio") is None:
        return ""
    interval = "" if line["interval"] is None else " ({:.4f}-{:.4f})".format(*line["interval"])
    return f", speed {line['ratio']:.4f}{interval} of the commit before, {line['blocks'][0]} pairs"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowdown", type=_part, default=0.05, metavar="P", help="of the speed (default 5%%)")
    parser.add_argument("--minutes", type=float, default=5.0, help="in all, parity of both sides too (default 5)")
    parser.add_argument("--backend", default="numpy,torch")
    parser.add_argument("--quant", default="fp32,fp16")
    parser.add_argument("--threads", default="1")
    return parser.parse_args(argv)


def _part(text: str) -> float:
    found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text}: from 0% to below 100%")
    return found


def _commit(clone: Path, slowdown: float) -> None:
    """A clone of this checkout's last commit, and one more commit that slows its backends."""
    _git("clone", "--quiet", "--shared", str(ROOT), str(clone))
    for name, session in SLOWED.items():
        with open(clone / name, "a", encoding="utf-8") as file:
            file.write(PATCH.format(slowdown=slowdown, session=session))
    who = ("-c", "user.name=slowed", "-c", "user.email=slowed@example.org", "-c", "commit.gpgsign=false")
    _git("-C", str(clone), *who, "commit", "--quiet", "--all", "--message", "slower")


def _git(*words: str) -> None:
    subprocess.run(["git", *words], check=True)


def _ab(clone: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The comparison as ``ab`` writes it."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("backend", "quant", "threads", "minutes")]
    command = [sys.executable, "-c", _COMMAND, "ab", "--base=HEAD~1", "--head=HEAD", *options, "--format=json"]
    done = subprocess.run(command, cwd=clone, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise SystemExit(f"ab ended with status {done.returncode} and printed nothing")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
