"""Run a plan: cells that memory holds together are loaded, judged, and measured in turns; rows as they are known.

    groups of cells -> a visit to each, and back again until every cell has enough
    a visit: load and judge each cell -> turns at prefill, in random rounds -> checks -> the same for decode -> close

With ``fresh`` every cell is a group of its own and every visit one block.
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from math import ceil

from harness.cell_rows import Job, refused_row, runs_apart
from harness.cell_work import GATE_TOKENS, RELOAD_SECONDS, CellWork
from harness.failures import apart_of, failure_row
from harness.hardware import available_bytes
from harness.models import Model, open_model
from harness.plan import Cell, Plan, memory_needed
from harness.progress import ENDED
from harness.rows import Row
from harness.samples import Sampling
from harness.schedule import groups, passes, rounds
from harness.turns import DECODE, PREFILL

__all__ = ["ENDED", "GATE_TOKENS", "Emit", "Tell", "apart_of", "failure_row", "new_run_id", "run"]

#: Called with each finished row and whether its cell was asked for by name.
Emit = Callable[[Row, bool], None]
#: Called with the cell that is at work and with what it is doing; ENDED when it will do no more.
Tell = Callable[[Cell, str], None]

#: Turns of a visit where precision decides how many there will be.
PRECISION_TURNS = 12


def new_run_id() -> str:
    """Names one invocation: UTC time and four random bytes."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ-") + secrets.token_hex(4)


def run(plan: Plan, job: Job, emit: Emit, tell: Tell) -> None:
    """Run every cell. Whatever one cell does, the others run; only Ctrl-C goes through, after what was measured."""
    for refusal in plan.refused:
        emit(refused_row(refusal, job), refusal.by_name)
    first = next((cell for cell in plan.cells if not _has_own_process(cell, job)), None)
    for name in dict.fromkeys(cell.model for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.model == name]
        tell(cells[0], "opening the model")
        gc.collect()  # one model at a time: two 7B checkpoints do not fit
        model = open_model(name, job.request.seed)
        works = [_work(cell, model, job, emit, tell) for cell in cells]
        for work in works:
            work.shares = work.cell != first
        try:
            _all_of_a_model(works, model, job)
        except KeyboardInterrupt:
            for work in works:
                work.interrupted()
            raise


def _work(cell: Cell, model: Model, job: Job, emit: Emit, tell: Tell) -> CellWork:
    return CellWork(cell, model, job, partial(_emit_named, emit, job.request.explicit), partial(tell, cell))


def _has_own_process(cell: Cell, job: Job) -> bool:
    return cell.hardware.host is not None or runs_apart(cell.backend, job.request)


def _emit_named(emit: Emit, named: bool, row: Row) -> None:
    emit(row, named)


def _all_of_a_model(works: Sequence[CellWork], model: Model, job: Job) -> None:
    """Visit groups of cells, forwards and back, until each has what it needs."""
    together = _groups(works, model, job)
    for number, order in enumerate(passes(together)):
        left = [[work for work in group if not work.ended] for group in order]
        if not any(left):
            return
        for group in filter(None, left):
            _visit(group, _turns(together, group, job.sampling), number)


def _groups(works: Sequence[CellWork], model: Model, job: Job) -> list[list[CellWork]]:
    if job.sampling is None or job.sampling.fresh:
        return [[work] for work in works]
    of_cell = {work.cell: work for work in works}
    found = groups(
        list(of_cell),
        lambda cell: memory_needed(cell, model.config),
        available_bytes(),
        lambda cell: runs_apart(cell.backend, job.request),
    )
    return [[of_cell[cell] for cell in group] for group in found]


def _turns(together: Sequence[Sequence[CellWork]], group: Sequence[CellWork], sampling: Sampling | None) -> int | None:
    """Turns per cell in one visit; ``None``: all it needs."""
    if sampling is None or len(together) == 1 or group[0].cell.hardware.host is not None:
        return 1 if sampling is not None and sampling.fresh else None
    if sampling.fresh:
        return 1
    return PRECISION_TURNS if sampling.precision is not None else ceil(sampling.repeats / 2)


def _visit(group: Sequence[CellWork], turns: int | None, number: int) -> None:
    """Load the cells of a group, let them take their turns, close them."""
    with ExitStack() as stack:
        for work in group:
            work.company = len(group) > 1
            work.guarded(partial(work.load, stack))
            if work.ended:
                work.tell(ENDED)
        inside = [work for work in group if not work.ended]
        if sum(work.loading_s for work in inside) > RELOAD_SECONDS and not any(work.fresh for work in inside):
            turns = None
        for what in (PREFILL, DECODE):
            _take_turns([work for work in inside if not work.ended], what, turns, number)


def _take_turns(works: Sequence[CellWork], what: str, turns: int | None, number: int) -> None:
    """Rounds over the cells that want another turn, then the checks of all."""
    taking = [work for work in works if work.wants(what, turns)]
    for work in taking:
        work.guarded(partial(work.begin, what))
    seed = works[0].job.sampling.seed if works and works[0].job.sampling else 0
    for order in rounds(taking, hash((seed, what == DECODE, number))):
        now = [work for work in order if work.wants(what, turns)]
        if not now:
            break
        for work in now:
            work.guarded(partial(work.turn, what, len(now) > 1))
    for work in taking:
        work.guarded(partial(work.finish, what))
        if work.ended:
            work.tell(ENDED)
