"""Decode of the onnx backend beside the same codes in OpenVINO, interleaved, each in a process of its own.

    python -m suites.throughput.compare_openvino --python /path/to/venv/bin/python [--model 169m] [--threads 2]

``--python`` is an interpreter with openvino and numpy: ``python3.11 -m venv DIR && DIR/bin/pip install
openvino==2026.4.1 numpy safetensors``. OpenVINO is not a backend here; this is how it was judged. Both compute with the
same stored weights and int8 activations in groups of the same size, so that the KL divergence to fp32 is the scheme's
in both, as far as the last columns show: the error of three steps' logits against the reference on those weights.

Exit status 3 where something is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from backends.api import Unavailable, Unsupported
from harness import open_session
from harness.compare import logits_error
from harness.models import Model, gate_tokens, open_model
from harness.samples import LOOP, Sampling
from reference import save_checkpoint
from reference.errors import InputError
from reference.forward import forward
from reference.schemes import apply
from suites.throughput import openvino_step

DEFAULT = ("ort_int4_g32_asym_int8act", "ort_int4_g128_asym_att8_int8act")

_ROOT = Path(__file__).parents[2]
_ONCE = Sampling(repeats=1, warmup=0)

#: Runs single steps; their microseconds, the median.
Timed = Callable[[int], float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter with openvino and numpy")
    parser.add_argument("--model", default="169m")
    parser.add_argument("--schemes", default=",".join(DEFAULT))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round")
    options = parser.parse_args(argv)
    try:
        has = subprocess.run([options.python, "-c", "import openvino, numpy"], capture_output=True, check=False)
    except OSError as error:
        print(f"{options.python}: {error.strerror}", file=sys.stderr)
        return 3
    if has.returncode:
        print(f"{options.python} has no openvino; pip install openvino==2026.4.1 numpy safetensors", file=sys.stderr)
        return 3
    try:
        model = open_model(options.model)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint.safetensors"
            save_checkpoint(model.weights, checkpoint, "safetensors")
            for scheme in options.schemes.split(","):
                _compare(model, checkpoint, scheme, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (Unavailable, Unsupported) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def _compare(model: Model, checkpoint: Path, scheme: str, options: argparse.Namespace) -> None:
    """Measure and print one scheme."""
    truth, _ = forward(apply(model.weights, scheme), openvino_step.CHECK)
    with ExitStack() as stack:
        opened = stack.enter_context(open_session("onnx", model, scheme, threads=options.threads, isolate=True))
        theirs, version, their_logits = _openvino(stack, checkpoint, scheme, options)
        our_logits, _ = opened.session.forward(list(openvino_step.CHECK), None)
        prompt = gate_tokens(model, 16)

        def ours(steps: int) -> float:
            run = opened.meter.decode(prompt, steps, _ONCE, lambda text: None, driver=LOOP)
            return statistics.median(run.steps[0]) / 1e3

        times: dict[str, list[float]] = {"onnx": [], "openvino": []}
        for number in range(options.rounds + 1):
            turns: list[tuple[str, Timed]] = [("onnx", ours), ("openvino", theirs)]
            for name, timed in turns[:: 1 if number % 2 else -1]:
                times[name].append(timed(options.tokens))
    rates = {name: [1e6 / one for one in of[1:]] for name, of in times.items()}  # the first round warms up
    ratio = statistics.median(theirs / ours for ours, theirs in zip(rates["onnx"], rates["openvino"], strict=True))
    print(f"{model.name} {scheme}, {options.threads} threads: openvino/onnx {ratio:.2f}x (median of {options.rounds})")
    for name, of, logits in ((f"onnx {opened.version}", "onnx", our_logits), (version, "openvino", their_logits)):
        rate = rates[of]
        error = logits_error(logits[None], truth[None], None).rms
        print(
            f"  {name}: {statistics.median(rate):.0f} ({min(rate):.0f}-{max(rate):.0f}) tok/s, "
            f"logits off by {100 * error:.2f} %",
            flush=True,
        )


def _openvino(
    stack: ExitStack, checkpoint: Path, scheme: str, options: argparse.Namespace
) -> tuple[Timed, str, np.ndarray]:
    """The clock of the other process, its version, and its logits after CHECK."""
    command = [options.python, "-I", openvino_step.__file__, str(_ROOT), str(checkpoint), scheme, str(options.threads)]
    child = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(child.terminate)
    sent, received = child.stdin, child.stdout
    assert sent is not None
    assert received is not None
    first = received.readline()
    if not first:
        raise Unavailable("the OpenVINO process ended before it had loaded", "its last words are above")
    loaded = json.loads(first)

    def timed(steps: int) -> float:
        sent.write(f"{steps}\n")
        sent.flush()
        return float(statistics.median(json.loads(received.readline())))

    return timed, f"openvino {loaded['version']}", np.array(loaded["logits"], dtype=np.float32)


if __name__ == "__main__":
    sys.exit(main())
