"""How much memory the int4 backend needs above a bare interpreter, and how long it takes to load.

    python -m suites.throughput.memory_of_int4 [--model 1b5] [--quant ort_int4_g32_asym_int8act] [--threads 2]

Writes a checkpoint of the real shape, one block of random numbers over and over (zeros would do for the time, but a
system may keep pages of zeros without memory), exports it, and opens the graph in an interpreter of the backend's
environment, which runs one prompt and some single steps. Printed are the peak resident memory after each, pages of
the mapped file included, less what the interpreter had before its first import, against the bytes of all stored
weights; and the seconds from the exported files to a session, imports left out, with the files in the page cache.

Exit status 1 where a bar is missed; 3 where the environment or /proc is missing. The files take as much space in
the temporary folder as the weights in float16 and once more as they are stored; --folder names another.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backends import onnx_cpu
from backends.api import Unavailable
from harness.isolation import start
from reference import preset
from reference.config import Config
from reference.schemes import stored_bytes
from suites.throughput.memory_of_reference import write_sparse

#: Peak memory over the bytes of the weights, and seconds to load; each is judged at the shape that its bar is of.
BAR, BAR_SHAPE = 1.3, "1b5"
LOAD_BAR, LOAD_SHAPE = 1.0, "169m"

_ROOT = Path(__file__).parents[2]

_EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from backends import onnx_cpu
from reference import load_checkpoint
onnx_cpu.export(load_checkpoint(sys.argv[2], scan=False), sys.argv[3], Path(sys.argv[4]))
"""

_RUN = """
import sys, json
def peak():
    text = open("/proc/self/status").read()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))) * 1024
bare = peak()
import time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from backends.onnx_cpu.session import OnnxSession, open_graph
from reference import preset
config, found = preset(sys.argv[2]), {}
began = time.perf_counter()
session = OnnxSession(open_graph(Path(sys.argv[3]), int(sys.argv[4])), config)
found["seconds"] = time.perf_counter() - began
found["load"] = peak() - bare
_, state = session.forward(list(range(int(sys.argv[5]))), None)
found["prompt"] = peak() - bare
session.greedy(1, state, 16)
found["steps"] = peak() - bare
print(json.dumps(found))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of each scheme; whether a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b5")
    parser.add_argument("--quant", default="ort_int4_g32_asym_int8act,ort_int4_g128_asym_att8_int8act")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--folder", default=None, help="where the files go (default: temporary)")
    options = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        print("memory is read from /proc, which this system has not", file=sys.stderr)
        return 3
    try:
        environment = start.environment("onnx", onnx_cpu)
    except Unavailable as missing:
        print(missing, file=sys.stderr)
        return 3
    assert environment is not None  # the backend declares one
    missed = [_one(str(environment.python), scheme, options) for scheme in options.quant.split(",")]
    return int(any(missed))


def _one(python: str, scheme: str, options: argparse.Namespace) -> bool:
    """Export, run and print one scheme; whether it misses a bar."""
    config = preset(options.model)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoint, graph = Path(folder) / "sparse.safetensors", Path(folder) / "graph"
        _write(checkpoint, config)
        _run(python, _EXPORT, checkpoint, scheme, graph)
        runs = [_run(python, _RUN, options.model, graph, options.threads, options.prompt_tokens) for _ in range(3)]
    found = min((json.loads(run) for run in runs), key=lambda run: float(run["seconds"]))
    weights = stored_bytes(config, scheme)
    ratios = {when: found[when] / weights for when in ("load", "prompt", "steps")}
    over = options.model == BAR_SHAPE and not ratios["steps"] <= BAR
    slow = options.model == LOAD_SHAPE and not found["seconds"] <= LOAD_BAR
    print(
        f"{options.model} {scheme}: {weights / 2**20:.0f} MiB of weights; peak above the interpreter "
        f"{found['load'] / 2**20:.0f} MiB after loading ({ratios['load']:.2f}x), {ratios['prompt']:.2f}x after "
        f"{options.prompt_tokens} tokens, {ratios['steps']:.2f}x after 16 steps{' (MISSES the bar)' if over else ''}; "
        f"loaded in {found['seconds']:.2f} s{' (MISSES the bar)' if slow else ''}",
        flush=True,
    )
    return over or slow


def _write(path: Path, config: Config) -> None:
    """A checkpoint of float16 numbers near zero."""
    write_sparse(path, config, "f16")
    block = (0.02 * np.random.default_rng(0).standard_normal(1 << 23)).astype(np.float16).tobytes()
    size = path.stat().st_size
    with path.open("rb+") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        for at in range(file.seek(8 + header), size, len(block)):
            file.write(block[: size - at])


def _run(python: str, code: str, *arguments: object) -> str:
    command = [python, "-I", "-c", code, str(_ROOT), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
