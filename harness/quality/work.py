"""Run a plan for quality: load, gate, run the text beside the reference, one row at a time.

The gate judges the kernel on the weights as stored; the rows after it say how far all of it is from the fp32
weights. A kernel that the gate fails keeps its figures, with the verdict.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from harness.budget import shortage
from harness.cell_rows import Job, arithmetic_text, base_row, itself_rows, parity_rows, refused_row
from harness.console import say
from harness.models import Model, gate_tokens, open_model
from harness.parity import gate
from harness.plan import Cell, Plan, memory_needed
from harness.quality.asked import Asked
from harness.quality.lambada import Question, answers, beside, questions, sha256
from harness.quality.paired import Against
from harness.quality.passage import Passage, passage_of, whole_segments
from harness.quality.rows import Demand, failed_lambada, failed_rows, lambada_row, score_rows
from harness.quality.scores import score
from harness.rows import Row, RowError
from harness.run import ENDED, GATE_TOKENS, Emit, Tell, apart_of, failure_row
from harness.session import Opened, open_session
from harness.store import StoreError
from harness.without_codec import NotComparable, has_codec, quality, truth_for


@dataclass
class _Texts:
    """A model with what it is asked on. ``demand``: what its cells are compared with, as soon as that has run."""

    model: Model
    passage: Passage
    asked: list[Question] = field(default_factory=list)
    data: str = ""
    demand: Demand = field(default_factory=Demand)


def run(cells: Plan, job: Job, asked: Asked, emit: Emit, tell: Tell) -> None:
    """Run every cell in order. Whatever one cell does, the next one runs; only Ctrl-C goes through.

    cells  of :func:`harness.quality.asked.planned`

    Raises InputError for a text, a model or a tokenizer that is wrong.
    """
    for refusal in cells.refused:
        emit(refused_row(refusal, job), refusal.by_name)
    opened: dict[str, _Texts] = {}
    for cell in cells.cells:
        if cell.model not in opened:
            tell(cell, "opening the model")
            opened.clear()  # one model at a time: two 7B checkpoints do not fit
            gc.collect()
            opened[cell.model] = _texts(cell.model, asked, job.request.seed)
        texts = opened[cell.model]
        by_name = job.request.explicit or asked.names(cell)
        _run_cell(cell, texts, job, partial(_with, emit, by_name), tell)
        tell(cell, ENDED)


def _with(emit: Emit, by_name: bool, row: Row) -> None:
    emit(row, by_name)


def _texts(name: str, asked: Asked, seed: int) -> _Texts:
    model = open_model(name, seed)
    passage = passage_of(model, asked.text, asked.tokens, asked.context, asked.tokenizer, seed)
    if len(passage) < asked.tokens:
        whole = whole_segments(asked.tokens, asked.context)
        why = "the text has no more" if len(passage) < whole else f"whole segments of {asked.context}"
        say(f"{name}: {len(passage)} positions of {asked.tokens} asked for, {why}")
    data = asked.data or beside(model)
    last_words = questions(data, model, asked.documents, asked.tokenizer) if data else []
    against = Against(*asked.against) if asked.against is not None else None
    demand = Demand(against, asked.no_worse, asked.strict)
    return _Texts(model, passage, last_words, Path(data or "").name, demand)


def _run_cell(cell: Cell, texts: _Texts, job: Job, emit: Callable[[Row], None], tell: Tell) -> None:
    """All rows of one cell. A backend that raises, dies or hangs becomes a row that says so."""
    tell(cell, "loading")
    base = base_row(cell, texts.model, job)
    free = cell.hardware.facts.get("free_bytes")
    short = shortage(memory_needed(cell, texts.model.config), cell.hardware.device, None if free is None else int(free))
    if short:
        emit(replace(base, verdict="UNAVAILABLE", reason=short))
        return
    work = _Work(cell, texts, job, emit, partial(tell, cell))
    place = cell.hardware.device, cell.threads, job.request.isolate, apart_of(cell, job)
    try:
        with open_session(cell.backend, texts.model, cell.scheme, *place, work.tell) as opened:
            work.judge_and_score(opened, base)
    except (RowError, StoreError):
        raise  # ours, not the backend's
    except Exception as error:  # noqa: BLE001 - a backend may raise anything, and the next cell must run
        emit(failure_row(error, base, cell, job, work.metric))
    finally:
        gc.collect()


@dataclass
class _Work:
    """One cell at work. ``metric`` is what a row would be about, should it end now."""

    cell: Cell
    texts: _Texts
    job: Job
    emit: Callable[[Row], None]
    tell: Callable[[str], None]
    metric: str = "parity"

    def judge_and_score(self, opened: Opened, base: Row) -> None:
        cell, passage, model = self.cell, self.texts.passage, self.texts.model
        base = replace(
            base,
            backend_version=opened.version,
            arithmetic=arithmetic_text(opened),
            isolated=opened.isolated,
            cpus=opened.cpus,
        )
        bad = self._judge(opened, base)
        self.metric = "kl_divergence"
        self.tell(f"{len(passage)} tokens of {passage.name}")
        try:
            scores = score(opened.session, model, cell.scheme, passage, self.tell)
        except NotComparable as error:
            rows = failed_rows(base, passage, error)
        else:
            rows = score_rows(base, passage, scores, bad, self._demand(scores.kl))
        for row in rows:
            self.emit(row)
        if self.texts.asked:
            self._last_words(opened, base, bad)

    def _demand(self, kl: np.ndarray) -> Demand:
        """What this cell is compared with; of the first cell that is so named, all are from now on."""
        demand, cell = self.texts.demand, self.cell
        other = demand.against
        if other is not None and other.kl is None and (other.backend, other.scheme) == (cell.backend, cell.scheme):
            demand = self.texts.demand = replace(demand, against=replace(other, kl=kl))
        return demand

    def _last_words(self, opened: Opened, base: Row, bad: str | None) -> None:
        """Emit the row of LAMBADA."""
        self.metric = "lambada_accuracy"
        self.tell("LAMBADA")
        asked = self.texts.asked
        about = {"text": self.texts.data, "ids_sha256": sha256(asked), "documents": len(asked)}
        try:
            right = answers(opened.session, asked, self.texts.model.config.n_vocab, self.tell)
        except NotComparable as error:
            self.emit(failed_lambada(base, about, error))
        else:
            self.emit(lambada_row(base, right, about, bad))

    def _judge(self, opened: Opened, base: Row) -> str | None:
        """Emit the verdict on the kernel; why it, and so no figure of it, passes, if it does not."""
        cell, model, session = self.cell, self.texts.model, opened.session
        self.tell("deriving the bound")
        tokens = gate_tokens(model, GATE_TOKENS, self.job.request.seed)
        truth = truth_for(session, model.weights, cell.scheme, opened.arithmetic, tokens, model.sha256)
        self.tell("parity")
        found = gate(session, truth)
        known = has_codec(cell.scheme)
        for row in parity_rows(base, found, truth, model.weights) if known else itself_rows(base, found):
            self.emit(row)
        if not found.passed:
            return f"the kernel fails parity: {found.first_bad}"
        if not known:
            far = quality(session, model.weights, cell.scheme, tokens)
            if not far.kl_divergence <= far.limit:
                return f"divergence {far.kl_divergence:.2g} over {far.positions} positions, limit {far.limit:.2g}"
        return None
