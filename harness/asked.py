"""What the options ask for, in the terms of the plan and of measuring."""

from __future__ import annotations

from argparse import Namespace

from backends.api import Unavailable, Unsupported
from harness.budget import shortage
from harness.measure import Sampling, Workload
from harness.models import model_config
from harness.options import UsageError
from harness.plan import ALL, Cell, Request, memory_needed, plan

#: Prompt tokens, decode tokens, repeats.
DEFAULT = (256, 64, 7)
QUICK = (64, 16, 3)

#: Measuring one metric of one cell stops after this long, with no fewer samples than an interval needs.
BUDGET_SECONDS = 20.0
INTERVAL_SAMPLES = 6


def requested(arguments: Namespace) -> Request:
    """The request of ``run`` or ``parity``."""
    prompt, decode, _ = _sizes(arguments)
    if arguments.isolate is False and (arguments.timeout is not None or arguments.cpus is not None):
        option = "--timeout" if arguments.timeout is not None else "--cpus"
        raise UsageError(f"{option} needs a process of its own for each cell; leave out --in-process")
    return Request(
        models=arguments.model,
        backends=arguments.backend,
        schemes=arguments.quant,
        hardware=arguments.hardware,
        devices=arguments.device,
        threads=arguments.threads,
        workload=Workload(prompt, decode),
        seed=arguments.seed,
        isolate=arguments.isolate,
        timeout=arguments.timeout,
        placement=arguments.cpus,
    )


def sampling_of(arguments: Namespace) -> Sampling | None:
    """How to time; ``None`` for ``parity``, which does not."""
    if arguments.command == "parity":
        return None
    repeats = _sizes(arguments)[2]
    return Sampling(repeats, warmup=1, budget_s=BUDGET_SECONDS, minimum=min(repeats, INTERVAL_SAMPLES))


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
