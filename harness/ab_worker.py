"""Measures one block of one side of an A/B comparison, with the code of that side; run as a file, never imported.

    python ab_worker.py SPEC     SPEC: JSON; see ``main``

The result is written to a file, so that whatever a backend prints is nobody's concern.
"""

from __future__ import annotations

import json
import os
import sys


def main(spec: dict) -> dict:
    """Load the session, time what is asked, give raw nanoseconds.

    paths         where ``harness``, ``backends`` and the user's modules are looked for first
    backend, model, scheme, device, threads, seed, prompt_tokens, decode_tokens
    repeats       samples of each metric, after one that is thrown away
    metrics       ``prefill`` and ``decode``, or one of them
    """
    # Not the folder of this file, whose module names are no top-level ones.
    sys.path[:] = [*spec["paths"], *(path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__)))]
    import harness
    from harness.models import gate_tokens, open_model
    from harness.samples import Sampling
    from harness.session import open_session

    found_at = os.path.dirname(os.path.dirname(os.path.abspath(str(harness.__file__))))
    if os.path.realpath(found_at) != os.path.realpath(spec["harness"]):
        raise RuntimeError(f"harness was taken from {found_at}, not from {spec['harness']}")
    model = open_model(spec["model"], spec["seed"])
    prompt = gate_tokens(model, spec["prompt_tokens"], spec["seed"])
    sampling = Sampling(repeats=spec["repeats"], warmup=1)
    found: dict = {}
    with open_session(spec["backend"], model, spec["scheme"], spec["device"], spec["threads"]) as opened:
        if "prefill" in spec["metrics"]:
            taken = opened.meter.prefill(prompt, sampling, lambda text: None)
            found["prefill"] = {"ns": list(taken.ns), "driver": None}
        if "decode" in spec["metrics"]:
            taken = opened.meter.decode(prompt, spec["decode_tokens"], sampling, lambda text: None)
            found["decode"] = {"ns": list(taken.ns), "driver": taken.driver}
        return {"metrics": found, "version": opened.version}


if __name__ == "__main__":
    _spec = json.loads(sys.argv[1])
    _answer = json.dumps(main(_spec))
    with open(_spec["out"], "w", encoding="utf-8") as _file:
        _file.write(_answer)
