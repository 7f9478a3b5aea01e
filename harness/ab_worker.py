"""Measures one block of one side of an A/B comparison, with the code of that side; run as a file, never imported.

    python ab_worker.py SPEC     SPEC: JSON; see ``main``

The result is written to a file, so that whatever a backend prints is nobody's concern. What the timed calls returned
is checked in the same session after the last of them: a block that is wrong has no times, and says what is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any


class Wrong(Exception):
    """A block whose logits are not finite or not right; one line."""


def main(spec: dict) -> dict:
    """Load the session, time what is asked, give raw nanoseconds. Raises Wrong.

    paths         where ``harness``, ``backends`` and the user's modules are looked for first
    backend, model, scheme, device, threads, seed, prompt_tokens, decode_tokens
    metrics       ``prefill`` and ``decode``, or one of them
    go, done      pipes: ``b`` asks for one sample of each metric that is thrown away, ``t`` for one that is kept, ``e``
                  for the end; a byte comes back when it has loaded, and after each of these
    """
    # Not the folder of this file, whose module names are no top-level ones.
    sys.path[:] = [*spec["paths"], *(path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__)))]
    import numpy as np

    import harness
    from harness.isolation import lifeline
    from harness.models import gate_tokens, open_model
    from harness.session import open_session

    lifeline.hold()
    for file in (spec["go"], spec["done"]):
        os.set_inheritable(file, False)
    found_at = os.path.dirname(os.path.dirname(os.path.abspath(str(harness.__file__))))
    if os.path.realpath(found_at) != os.path.realpath(spec["harness"]):
        raise RuntimeError(f"harness was taken from {found_at}, not from {spec['harness']}")
    model = open_model(spec["model"], spec["seed"])
    prompt = gate_tokens(model, spec["prompt_tokens"], spec["seed"])
    timed: dict = {}
    with open_session(spec["backend"], model, spec["scheme"], spec["device"], spec["threads"]) as opened:
        meter = opened.meter
        while (asked := _waited(spec)) != b"e":
            for metric in spec["metrics"]:
                if asked == b"b":
                    meter.begin(metric, prompt, spec["decode_tokens"], spec["device"])
                    continue
                meter.turn(metric, 1, True)
                if metric == "prefill":  # a session may use its buffer again
                    taken = meter.end(metric)
                    timed[metric] = replace(taken, last_logits=np.array(taken.last_logits))
        if "decode" in spec["metrics"]:
            timed["decode"] = meter.end("decode")
        _check(opened, model, prompt, spec, timed)
        found = {name: {"ns": list(taken.ns), "driver": taken.driver} for name, taken in timed.items()}
        return {"metrics": found, "version": opened.version}


def _waited(spec: dict) -> bytes:
    """What is asked for next; until then a backend in a process of its own is stopped too."""
    from harness.isolation.child import alone

    with alone(None):
        os.write(spec["done"], b"d")
        return os.read(spec["go"], 1) or b"e"


def _check(opened: Any, model: Any, prompt: list, spec: dict, timed: dict) -> None:
    """As ``run`` checks its timed calls. Raises Wrong.

    Truth is what judging parity of this side has derived and kept.
    """
    from harness.models import gate_tokens
    from harness.run import GATE_TOKENS
    from harness.timed_check import decode_checks, prefill_checks, returned_check
    from harness.without_codec import truth_for

    for name, taken in timed.items():
        if taken.non_finite_at is not None:
            raise Wrong(f"{name}: {taken.non_finite_at}")
    gate = gate_tokens(model, max(GATE_TOKENS, len(prompt)), spec["seed"])[:GATE_TOKENS]
    session = opened.session
    truth = truth_for(session, model.weights, spec["scheme"], opened.arithmetic, gate, model.sha256)
    if "decode" not in timed:
        checks = prefill_checks(session, truth, timed["prefill"])
    else:
        checks = decode_checks(session, prompt, truth, timed["decode"])
        if "prefill" in timed:
            checks = [returned_check("timed prefill", session, truth, timed["prefill"]), *checks]
    for check in checks:
        if not check.passed:
            raise Wrong(str(check))


if __name__ == "__main__":
    _spec = json.loads(sys.argv[1])
    try:
        _answer = main(_spec)
    except Wrong as _wrong:
        _answer = {"wrong": str(_wrong)}
    with open(_spec["out"], "w", encoding="utf-8") as _file:
        _file.write(json.dumps(_answer))
