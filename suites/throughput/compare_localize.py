"""How long localizing a planted overflow takes, how much memory, and whether it beats counting NaN by hand.

    python -m suites.throughput.compare_localize [--model tiny,169m] [--backend torch] [--quant fp16] [--threads N]
                                                [--method truncation]

Each model is planted to overflow fp16 at ffn.k2 of its middle layer, saved, and localized by ``rwkv-bench localize``
in a process of its own, whose peak memory is read when it ends; with it that of one traced run of the same checkpoint
by the same backend, in which nothing is kept. Beside it stands the time of what people do: a traced run with a count
of NaN at each point. Printed: seconds, MiB, what was found.

Exit status 1 where a bar of BARS is not met, or the place, the cause or the fix is wrong; 3 where something is missing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.api import Traceable, Unavailable, Unsupported
from harness.localize.bench import Bench
from harness.models import gate_tokens, open_model
from reference.checkpoint import save_checkpoint
from reference.config import Config
from reference.errors import InputError
from suites.nan.instrument import counts
from suites.nan.planted import plant

#: Model -> seconds that localizing may take, cause and fix and its cost included.
BARS = {"tiny": 20.0, "169m": 90.0}

TOKENS = 48

#: ``rwkv-bench`` by this interpreter.
_COMMAND = "import sys; from harness.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Measured:
    """One model: seconds and peak bytes of the whole command and of a plain count of NaN; seconds without a fix."""

    model: str
    seconds: float
    cpu_seconds: float
    without_fix: float
    peak: int
    plain_seconds: float
    plain_peak: int
    found: dict[str, Any]
    right: bool
    layer_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.count is not None:
        return _count(arguments)
    try:
        measured = [_measure(name, arguments) for name in arguments.model.split(",")]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (Unavailable, Unsupported) as error:
        print(error, file=sys.stderr)
        return 3
    return max(_print(one) for one in measured)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_localize", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny,169m", help="models, a comma list (default tiny,169m)")
    parser.add_argument("--backend", default="torch", help="name or .py file (default torch)")
    parser.add_argument("--quant", default="fp16", help="scheme (default fp16)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: rwkv-bench's own, 1 for small models)")
    parser.add_argument("--method", help="trace, state or truncation (default: the best that the backend allows)")
    parser.add_argument("--count", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measure(name: str, arguments: argparse.Namespace) -> Measured:
    model = open_model(name)
    tokens = gate_tokens(model, TOKENS)
    layer = model.config.n_layer // 2
    planted, point = plant(model.weights, tokens, "ffn.k2", layer)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "planted.safetensors"))
        save_checkpoint(planted, path, "safetensors", "fp32")
        ids = ",".join(map(str, tokens))
        same = ["--backend", arguments.backend, "--quant", arguments.quant]
        same += ["--threads", str(arguments.threads)] if arguments.threads else []
        command = ["-c", _COMMAND, "localize", *same, "--model", path, "--tokens", ids, "--format", "json"]
        command += ["--in-process"]  # one process, so that its memory is all there is
        command += ["--method", arguments.method] if arguments.method else []
        seconds, used, out = _run(command, (1,))
        without_fix, _, _ = _run([*command, "--no-fix"], (1,))
        plain = ["-m", "suites.throughput.compare_localize", *same, "--model", path, "--count", ids]
        plain_seconds, plain_used, counted = _run(plain, (0,))
    found = json.loads(out)
    place = (found["verdict"], found["point"], found["layer"]) == ("non-finite", point, layer)
    fixed = found["fix"] is not None and found["fix"]["verified"]
    right = place and fixed and "overflow" in found["cause"] and json.loads(counted)[0] == point
    size = layer_bytes(model.config)
    cpu_seconds = used.ru_utime + used.ru_stime
    peaks = _peak(used), _peak(plain_used)
    return Measured(name, seconds, cpu_seconds, without_fix, peaks[0], plain_seconds, peaks[1], found, right, size)


def _peak(used: resource.struct_rusage) -> int:
    """Bytes of resident memory; Linux tells KiB."""
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def layer_bytes(config: Config) -> int:
    """One layer's activations on the prompt, float64: what localizing may hold beside the backend and the weights."""
    return 8 * TOKENS * (17 * config.n_embd + 2 * config.n_ffn)


def _run(command: list[str], codes: tuple[int, ...]) -> tuple[float, resource.struct_rusage, str]:
    """Seconds, what was used, and standard output of a Python command of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err)
        _, status, used = _wait(child)
        seconds = time.perf_counter() - start
        out.seek(0), err.seek(0)
        if status not in codes:
            raise InputError(f"{' '.join(command[:3])} ended with {status}: {err.read()[-500:]}")
        return seconds, used, out.read()


def _wait(child: subprocess.Popen[bytes]) -> tuple[int, int, resource.struct_rusage]:
    import os

    pid, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return pid, child.returncode, used


def _count(arguments: argparse.Namespace) -> int:
    """The plain instrument, in this process: JSON of the first bad point and its counts."""
    model = open_model(arguments.model)
    bench = Bench(arguments.backend, arguments.quant, threads=arguments.threads, isolate=False)
    with bench(model.weights) as session:
        if not isinstance(session, Traceable):
            print(f"{arguments.backend} shows no trace", file=sys.stderr)
            return 3
        found = counts(session, [int(token) for token in arguments.count.split(",")])
    print(json.dumps(found[0]))
    return 0


def _print(one: Measured) -> int:
    fix = one.found["fix"] or {}
    bar = BARS.get(one.model)
    print(f"{one.model}: {one.found['verdict']} at {one.found['point']}: {one.found['cause']}")
    print(f"  fix: {fix.get('what')}, verified {fix.get('verified')}, decode x{fix.get('cost') or float('nan'):.2f}")
    limit = "" if bar is None else f" (bar {bar:.0f} s: {'met' if one.seconds < bar else 'NOT MET'})"
    print(
        f"  localize {one.seconds:.1f} s{limit}, {one.cpu_seconds:.1f} s of CPU, without a fix {one.without_fix:.1f} s"
    )
    print(f"  count of NaN over a trace {one.plain_seconds:.1f} s")
    over = one.peak - one.plain_peak
    print(f"  peak {one.peak >> 20} MiB, {over >> 20} MiB beyond the backend's; a layer is {one.layer_bytes >> 20} MiB")
    print(f"  {'right' if one.right else 'WRONG'}: place, cause, fix, and the same first point as the count")
    return int(not one.right or (bar is not None and not one.seconds < bar))


if __name__ == "__main__":
    sys.exit(main())
