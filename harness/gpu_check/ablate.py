"""Decode of one cell with one thing changed, judged like any other: ``python -m harness.gpu_check.ablate``.

Prints one row: what was changed is under ``ablation``. The bound is that of the changed arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backends.api import Generating, Unavailable, Unsupported
from harness.cell_rows import Job, arithmetic_text, base_row
from harness.failures import out_of_memory
from harness.hardware import Hardware, local_hardware
from harness.isolation.remote import RemoteError
from harness.measure import Sampling, Workload
from harness.models import gate_tokens, open_model
from harness.parity import gate
from harness.plan import Cell, Request
from harness.rows import Row, line
from harness.run import new_run_id
from harness.samples import GREEDY, LOOP
from harness.session import open_session
from harness.stats import derived
from harness.status import BAD_INPUT, FAILED, NOT_AVAILABLE, PASSED
from harness.tolerance import derive
from reference.errors import InputError
from reference.mixed import Mixed

GATE_TOKENS, REPEATS = 40, 7


def measured(arguments: argparse.Namespace) -> Row:
    """The row. Raises Unavailable, Unsupported or InputError."""
    model = open_model(arguments.model)
    cell = Cell(
        model.name,
        arguments.backend,
        arguments.quant,
        place(arguments.device),
        1,
        Workload(GATE_TOKENS, arguments.decode_tokens),
    )
    job = Job(Request(), None, new_run_id())
    change = {"rescale_every": arguments.rescale_every} if arguments.rescale_every else None
    prompt = gate_tokens(model, GATE_TOKENS)
    with open_session(cell.backend, model, cell.scheme, cell.hardware.device, None, change=change) as opened:
        arithmetic = Mixed(opened.arithmetic, rescale_every=arguments.rescale_every) if change else opened.arithmetic
        driver = arguments.driver or (GREEDY if isinstance(opened.session, Generating) else LOOP)
        base = replace(
            base_row(cell, model, job),
            metric="decode",
            unit="",
            reason="not timed",
            backend_version=opened.version,
            arithmetic=str(arithmetic) if change else arithmetic_text(opened),
            driver=driver,
            command=None,
            extra={"ablation": {"driver": driver, **(change or {})}},
        )
        found = gate(opened.session, derive(model.weights, cell.scheme, arithmetic, prompt, model.sha256))
        if not found.passed:
            return replace(base, verdict="FAIL", reason=f"not timed: {found.first_bad}")
        sampling = Sampling(REPEATS, budget_s=20.0)
        taken = opened.meter.decode(prompt, arguments.decode_tokens, sampling, lambda text: None, driver)
    if taken.non_finite_at is not None:
        return replace(base, verdict="FAIL", reason=str(taken.non_finite_at))
    timed = replace(base, samples=taken.ns, steps=taken.steps or None, stopped=taken.stopped)
    return derived(replace(timed, verdict="PASS", reason=None))


def place(device: str) -> Hardware:
    """This machine's hardware of a device; of one that nobody detected the backend says why not."""
    kind = device.split(":")[0]
    here = [item for item in local_hardware() if device in (item.device, item.device.split(":")[0])]
    return here[0] if here else Hardware(kind, device, device)


def main(words: Sequence[str]) -> int:
    """The exit status; the row goes to stdout, what went wrong to stderr."""
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_check.ablate", description=__doc__)
    for option in ("--model", "--backend", "--quant", "--device"):
        parser.add_argument(option, required=True)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--driver", choices=(LOOP, GREEDY))
    parser.add_argument("--rescale-every", type=int, default=0)
    try:
        row = measured(parser.parse_args(words))
    except (Unavailable, Unsupported) as error:
        return _said(error, NOT_AVAILABLE)
    except InputError as error:
        return _said(error, BAD_INPUT)
    except (RuntimeError, RemoteError) as error:
        short = out_of_memory(error)
        if short is None:
            raise
        return _said(f"it ran out of device memory: {short}", NOT_AVAILABLE)
    sys.stdout.write(line(row))
    return FAILED if row.verdict == "FAIL" else PASSED


def _said(error: Any, status: int) -> int:
    sys.stderr.write(f"{error}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
