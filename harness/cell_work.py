"""One cell at work: loaded, judged, measured in turns with others, checked again, its rows handed on.

A session is judged each time it is loaded, on the weights it was just loaded with, and checked again after
its turns. One that fails has no speed: its prefill and decode rows carry the verdict instead of a number.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

from harness.batch_checks import batch_checks, in_batches
from harness.blocks import FRESH_SAMPLES, Blocks
from harness.cell_rows import (
    Job,
    arithmetic_text,
    base_row,
    itself_rows,
    measured_row,
    no_speed_row,
    parity_rows,
    quality_rows,
    timed_row,
    unjudged,
)
from harness.energy_rows import EnergyTally
from harness.failures import apart_of, explained, failure_row, first_bad
from harness.fitting import fitted
from harness.measure import Samples
from harness.models import Model, gate_tokens
from harness.parity import Gate, gate
from harness.plan import Cell
from harness.roofline_rows import Roofline
from harness.rows import Row, RowError
from harness.samples import CELL_ENDED, GREEDY, INTERRUPTED, LOOP
from harness.session import Opened, open_session
from harness.store import StoreError
from harness.timed_check import decode_checks, prefill_checks, returned_check, timed_length
from harness.tolerance import Truth
from harness.turns import DECODE, PREFILL
from harness.without_codec import has_codec, quality, truth_for

#: Length of the parity gate's prompt; the bound needs at least 32 positions.
GATE_TOKENS = 48

#: Where loading and judging a group took longer than this, it is not loaded again only to spread its turns.
RELOAD_SECONDS = 30.0


@dataclass
class _Loaded:
    """What is at hand while a session is loaded."""

    opened: Opened
    base: Row
    truth: Truth
    timed: Sequence[int]
    peak: int | None = None
    seconds: float = 0.0


@dataclass
class CellWork:
    """One cell. ``metric`` is what a row would be about, should it end now; ``ended``: nothing is left to do.

    company  whether other cells are loaded at the same time: in one process, their memory would count as this one's
    shares   whether, if it has no process of its own, others were loaded in this one before
    """

    cell: Cell
    model: Model
    job: Job
    emit: Callable[[Row], None]
    tell: Callable[[str], None]
    metric: str = "load"
    ended: bool = False
    company: bool = False
    shares: bool = False
    blocks: dict[str, Blocks] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)
    _loads: int = 0
    _now: _Loaded | None = None
    _base: Row | None = None
    _tally: EnergyTally | None = None

    def guarded(self, step: Callable[[], None]) -> None:
        """Do one step; a backend that raises, dies or hangs becomes a row that says so, and the cell ends."""
        if self.ended:
            return
        try:
            step()
        except (RowError, StoreError):
            raise  # ours, not the backend's
        except Exception as error:  # noqa: BLE001 - a backend may raise anything, and the next cell must run
            self._fail(error)

    def load(self, stack: ExitStack) -> None:
        """Open the session until ``stack`` ends, judge it, and tell the rows of that the first time."""
        began = time.monotonic()
        self.tell("loading")
        self.shares = self.shares or self._loads > 0  # between two loads of a cell others had their turns
        base, short = fitted(base_row(self.cell, self.model, self.job), self.cell, self.model)
        if short:
            self.emit(replace(base, verdict="UNAVAILABLE", reason=short))
            self.ended = True
            return
        self.metric, self._base = "load", base
        cell, isolate = self.cell, self.job.request.isolate
        opening = open_session(
            cell.backend,
            self.model,
            cell.scheme,
            cell.hardware.device,
            cell.threads,
            True if self.fresh else isolate,
            apart_of(cell, self.job),
            self.tell,
        )
        opened = opening.__enter__()
        stack.push(_Closing(self, opening))
        opened = in_batches(opened, cell.workload.batch, self.model.config.n_vocab)
        self._judged(opened, base)
        if self._now is not None:
            self._now.seconds = time.monotonic() - began
        self._loads += 1

    @property
    def fresh(self) -> bool:
        """Whether each block has a process of its own."""
        return self.job.sampling is not None and self.job.sampling.fresh

    @property
    def loading_s(self) -> float:
        """Seconds that loading and judging it took this time."""
        return 0.0 if self._now is None else self._now.seconds

    def begin(self, what: str) -> None:
        """Before the first turn of a loaded session at ``what``: a sample that is not counted."""
        now = self._loaded()
        self._phase(what, f"{what}, warm-up")
        began = time.monotonic()
        now.opened.meter.begin(what, now.timed, self.cell.workload.decode_tokens, self.cell.hardware.device)
        self._of(what).spent_s += time.monotonic() - began

    def wants(self, what: str, turns: int | None = None) -> bool:
        """Whether it needs another turn; ``turns`` is how many it has had since it was loaded are to be enough."""
        found = self._of(what)
        if self.ended or self._now is None or found.stopped() is not None:
            return False
        since = sum(process == self._loads - 1 for process in found.processes)
        return turns is None or since < turns

    def turn(self, what: str, settle: bool) -> None:
        """Take one block."""
        now, found = self._loaded(), self._of(what)
        self._phase(what, f"{what}, block {len(found.turns) + 1}")
        began = time.monotonic()
        turn = partial(now.opened.meter.turn, what, FRESH_SAMPLES if self.fresh else 1, settle)
        taken = self._energy().during(what, turn)
        found.add(taken, self._loads - 1)
        found.spent_s += time.monotonic() - began

    def finish(self, what: str) -> None:
        """After its turns: check what they returned; with enough of them, tell the row."""
        now, found = self._loaded(), self._of(what)
        self._phase(what, f"{what}, checking")
        samples = now.opened.meter.end(what)
        watched = self.company and not now.opened.isolated
        peak = now.peak if watched else self._own(now.opened, now.opened.meter.peak_bytes())
        session, truth = now.opened.session, now.truth
        if what == PREFILL:
            bad = first_bad(prefill_checks(session, truth, samples))
        else:
            bad = first_bad(decode_checks(session, now.timed, truth, samples))
        wrong = bad or found.non_finite_at or samples.non_finite_at
        if wrong is not None:
            self._no_speed(now.base, f"no speed: {wrong}", (PREFILL, DECODE) if what == PREFILL else (DECODE,))
            return
        stopped = found.stopped()
        if stopped is None:
            return
        roofline = Roofline(self.cell.hardware, self.cell.threads, self.model.config, now.opened, self.tell)
        row = measured_row(now.base, what, samples, found, stopped, peak)
        self._reported.add(what)
        self._figure(self._energy().of(roofline.of(row)))
        if what == PREFILL:
            self._figure(measured_row(now.base, "time_to_first_token", samples, found, stopped, peak))
        self.ended = what == DECODE

    def interrupted(self) -> None:
        """The run ends now: what has been measured and not told yet becomes rows, without the check after it."""
        if not self.ended and any(found.turns for found in self.blocks.values()):
            self.tell(INTERRUPTED)
            self._unfinished((PREFILL, DECODE), INTERRUPTED, "not checked again after timing")

    def _unfinished(self, metrics: Sequence[str], stopped: str, reason: str) -> None:
        """Rows of what has been measured and not been told: for a median, whatever there is of it will do."""
        for what in metrics:
            found = self.blocks.get(what)
            if self._base is None or what in self._reported or found is None or not found.turns:
                continue
            self._reported.add(what)
            steps = any(turn.steps for turn in found.turns)
            driver = None if what == PREFILL else LOOP if steps else GREEDY
            row = measured_row(self._base, what, Samples(0, (), stopped, driver=driver), found, stopped)
            if row.verdict == "PASS":
                count, asked = len(found.turns), found.sampling.repeats
                row = replace(row, reason=f"{stopped} after {count} of {asked} blocks; {reason}")
            self._figure(row)

    def _judged(self, opened: Opened, base: Row) -> None:
        """The gate, and the rows of it; ``_now`` is set where the session may be timed."""
        cell, job, model, session = self.cell, self.job, self.model, opened.session
        base = replace(
            base,
            backend_version=opened.version,
            arithmetic=arithmetic_text(opened),
            isolated=opened.isolated,
            cpus=opened.cpus,
        )
        self._base = base
        emit = self.emit if self._loads == 0 else _nothing
        prompt = gate_tokens(model, max(GATE_TOKENS, cell.workload.prompt_tokens), job.request.seed)
        timed = prompt[: cell.workload.prompt_tokens]
        first: Samples | None = None
        if job.sampling is not None:
            self._phase("first_call", "first call")
            first = opened.meter.first_call(timed)
        load_peak = self._own(opened, opened.meter.peak_bytes())
        self._phase("parity", "deriving the bound")
        known = has_codec(cell.scheme)
        truth = truth_for(session, model.weights, cell.scheme, opened.arithmetic, prompt[:GATE_TOKENS], model.sha256)
        self.tell("parity")
        found = self._gate(opened, truth, timed, first)
        rows = parity_rows(base, found, truth, model.weights) if known else itself_rows(base, found)
        if not found.passed:
            rows[0] = explained(rows[0], cell, model, job, opened, truth, found)
        for row in rows:
            emit(row)
        if not known and found.passed and not self._near_enough(opened, base, timed, emit):
            return
        opened.meter.forget()  # what the reference needed is not the backend's
        if job.sampling is None or first is None:
            self.ended = True
            return
        if self._loads == 0:
            self._figure(timed_row(base, "load", (opened.load_ns,), found, load_peak))
            self._figure(timed_row(base, "first_call", first.ns, found, load_peak))
        if not found.passed:
            self._no_speed(base, f"not timed: {found.first_bad}")
            return
        if self.company and not opened.isolated:
            session.forward(timed, None)  # as prefill does; the gate has taken single steps
        self._now = _Loaded(opened, base, truth, timed, self._own(opened, opened.meter.peak_bytes()))

    def _own(self, opened: Opened, growth: int | None) -> int | None:
        """A process's growth as this session's peak memory; ``None`` where it is not that.

        Where others were loaded before, memory that they freed is taken again and their libraries do not count:
        what grew by less than the weights is certainly not what the session holds.
        """
        if opened.isolated or not self.shares:
            return growth
        weights = self._base.weight_bytes if self._base is not None else None
        return growth if growth is not None and weights is not None and growth >= weights else None

    def _gate(self, opened: Opened, truth: Truth, timed: Sequence[int], first: Samples | None) -> Gate:
        """The gate, the timed length, and what the first call gave."""
        session, model, scheme = opened.session, self.model, self.cell.scheme
        found = gate(session, truth)
        checks = list(found.logits)
        if found.passed:
            checks += batch_checks(opened, self.cell.workload.batch, truth)
        if found.passed:
            arithmetic = opened.arithmetic
            checks.append(timed_length(session, model.weights, scheme, arithmetic, timed, truth, model.sha256))
            if first is not None:
                checks.append(returned_check("first call", session, truth, first))
        return Gate(tuple(checks), found.state)

    def _near_enough(self, opened: Opened, base: Row, timed: Sequence[int], emit: Callable[[Row], None]) -> bool:
        """A scheme without a codec is held against the fp32 weights; too far from them is no speed."""
        self.tell("quality")
        rows = quality_rows(base, quality(opened.session, self.model.weights, self.cell.scheme, timed))
        for row in rows:
            emit(row)
        if rows[0].verdict == "PASS":
            return True
        self.ended = True
        if self.job.sampling is not None:
            self._no_speed(base, f"not timed: {rows[0].reason}")
        return False

    def _figure(self, row: Row) -> None:
        """A time or a speed; of a kernel that nobody could judge it is no PASS."""
        self.emit(row if has_codec(self.cell.scheme) else unjudged(row))

    def _no_speed(self, base: Row, why: str, metrics: Sequence[str] = (PREFILL, DECODE)) -> None:
        self.ended = True
        for metric in metrics:
            if metric not in self._reported:
                self.emit(no_speed_row(base, metric, why))

    def _fail(self, error: Exception) -> None:
        self.ended = True
        base = self._base or base_row(self.cell, self.model, self.job)
        if self.metric == DECODE:
            self._unfinished((PREFILL,), CELL_ENDED, "what came after it failed")
        self.emit(failure_row(error, base, self.cell, self.job, self.metric))

    def _phase(self, metric: str, phase: str) -> None:
        self.metric = metric
        self.tell(phase)

    def _of(self, what: str) -> Blocks:
        assert self.job.sampling is not None
        return self.blocks.setdefault(what, Blocks(self.job.sampling))

    def _energy(self) -> EnergyTally:
        if self._tally is None:
            self._tally = EnergyTally(self.cell.hardware)
        return self._tally

    def _loaded(self) -> _Loaded:
        assert self._now is not None
        return self._now


@dataclass
class _Closing(AbstractContextManager[None]):
    """Closes a cell's session; what that raises is the cell's."""

    work: CellWork
    opening: AbstractContextManager[Opened]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.work._now = None
        try:
            self.opening.__exit__(kind, error, trace)
        except (RowError, StoreError):
            raise
        except Exception as problem:  # noqa: BLE001 - as any other exception of a backend
            if problem is not error:
                self.work._fail(problem)
        finally:
            gc.collect()


def _nothing(row: Row) -> None:
    """Rows of a session that is loaded again are known already."""
