"""A batch judged sequence by sequence: each row in turn holds the prompt that truth is known for."""

from __future__ import annotations

from dataclasses import replace

from backends.api import Batched
from harness.batch import batched, side_by_side
from harness.checks import NAN, Check, against, problem
from harness.isolation.remote import RemoteSession, remote_session
from harness.meter import HereMeter
from harness.session import Opened
from harness.tolerance import Truth

#: So many rows are judged: the first, the last, and those between that fit.
_ROWS = 4


def in_batches(opened: Opened, size: int, n_vocab: int) -> Opened:
    """The opened session with ``size`` sequences side by side, where it runs; as it is for one. Raises Unsupported."""
    if size == 1:
        return opened
    found = batched(opened.info.name, opened.session, size, n_vocab)
    if isinstance(opened.session, RemoteSession):
        line = opened.session.line
        line.ask("batch", name=opened.info.name, size=size, n_vocab=n_vocab)
        return replace(opened, session=remote_session(line, ["batch"]))
    assert isinstance(opened.meter, HereMeter)
    opened.meter.session = found
    return replace(opened, session=found)


def batch_checks(opened: Opened, size: int, truth: Truth) -> list[Check]:
    """Logits of judged rows after all tokens but the last in one call, and after the last one from that state."""
    session = opened.session
    if size == 1 or not isinstance(session, Batched):
        return []
    n_vocab, tokens = truth.logits.shape[-1], truth.tokens
    checks = []
    for row in sorted({*range(min(size, _ROWS) - 1), size - 1}):
        logits, states = session.forward_batch(side_by_side(tokens[:-1], size, n_vocab, row), None)
        step, _ = session.forward_batch(side_by_side(tokens[-1:], size, n_vocab, row), states)
        for name, got, position in (("prompt", logits, len(tokens) - 2), ("step", step, len(tokens) - 1)):
            bad = problem(got, (size, n_vocab))
            where = f"sequence {row} of {size}, {name}"
            if bad is not None:
                checks.append(Check("batch", "", NAN, NAN, where, f"{where}: {bad}"))
            else:
                expected = truth.logits[position : position + 1]
                checks.append(against("batch", got[row], expected, truth, where=where))
    return checks
