"""What the options ask for, in the terms of the plan and of measuring."""

from __future__ import annotations

from argparse import Namespace

from backends.api import Unavailable, Unsupported
from harness.budget import shortage
from harness.measure import Sampling, Workload
from harness.models import model_config
from harness.options import UsageError
from harness.plan import ALL, Cell, Request, memory_needed, plan
from harness.samples import BUDGET_SECONDS, UNLIMITED

#: Prompt tokens, decode tokens, repeats.
DEFAULT = (256, 64, 7)
QUICK = (64, 16, 3)

#: However little time there is, no fewer samples than an interval needs.
INTERVAL_SAMPLES = 6

#: Blocks that are taken again for disturbed ones and for warm-up, where nobody said how many samples to take.
AGAIN = 3


def requested(arguments: Namespace) -> Request:
    """The request of ``run`` or ``parity``."""
    prompt, decode, _ = _sizes(arguments)
    if arguments.isolate is False and (arguments.timeout is not None or arguments.cpus is not None):
        option = "--timeout" if arguments.timeout is not None else "--cpus"
        raise UsageError(f"{option} needs a process of its own for each cell; leave out --in-process")
    if arguments.isolate is False and arguments.command == "run" and arguments.fresh:
        raise UsageError("--fresh needs a process of its own for each block; leave out --in-process")
    return Request(
        models=arguments.model,
        backends=arguments.backend,
        schemes=arguments.quant,
        hardware=arguments.hardware,
        devices=arguments.device,
        threads=arguments.threads,
        workload=Workload(prompt, decode, getattr(arguments, "batch", 1)),
        seed=arguments.seed,
        isolate=True if arguments.command == "run" and arguments.fresh else arguments.isolate,
        timeout=arguments.timeout,
        placement=arguments.cpus,
    )


def sampling_of(arguments: Namespace) -> Sampling | None:
    """How to time; ``None`` for ``parity``, which does not."""
    if arguments.command == "parity":
        return None
    repeats = _sizes(arguments)[2]
    fixed = arguments.repeats is not None or arguments.quick
    if arguments.precision is not None and arguments.repeats is None:
        repeats = UNLIMITED
    return Sampling(
        repeats,
        warmup=1,
        budget_s=BUDGET_SECONDS if arguments.time_budget is None else arguments.time_budget / 2,
        minimum=min(repeats, INTERVAL_SAMPLES),
        precision=arguments.precision,
        again=0 if fixed or arguments.precision is not None else AGAIN,
        fresh=arguments.fresh,
        seed=arguments.seed,
    )


def only_cell(arguments: Namespace) -> Cell:
    """The one cell that ``generate``'s options mean; raises InputError, Unsupported or Unavailable."""
    request = Request(
        models=(arguments.model,),
        backends=(arguments.backend,),
        schemes=(arguments.quant or ALL,),
        devices=(arguments.device,),
        threads=arguments.threads,
        workload=Workload(1, arguments.tokens),
    )
    planned = plan(request)
    if not planned.cells:
        raise Unsupported(planned.refused[0].reason)
    cell = planned.cells[0]
    short = shortage(memory_needed(cell, model_config(cell.model)), cell.hardware.device)
    if short is not None:
        raise Unavailable(short)
    return cell


def _sizes(arguments: Namespace) -> tuple[int, int, int]:
    if arguments.command == "parity":
        return DEFAULT
    default = QUICK if arguments.quick else DEFAULT
    return (
        arguments.prompt_tokens or default[0],
        arguments.decode_tokens or default[1],
        arguments.repeats or default[2],
    )
