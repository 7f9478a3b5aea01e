"""One change applied to the backend itself: judged by the gate, by a trace where the gate does not see, and timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from backends.api import Session, Unavailable, Unsupported
from harness.compare import logits_error
from harness.hardware import available_bytes
from harness.isolation.child import ChildDied, ChildTimedOut
from harness.isolation.remote import RemoteError
from harness.localize.bench import Bench
from harness.localize.cost import cost
from harness.localize.evidence import Evidence, Opener
from harness.localize.finding import Finding
from harness.localize.held import from_backend
from harness.localize.retraced import gone
from harness.localize.whatif import Outcome, Tell
from harness.measure import MeasureError
from harness.parity import Gate, gate
from harness.tolerance import K, Truth, derive
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.schemes import apply, stored_bytes
from reference.weights import Weights

#: What may end a try, as may whatever else a backend raises; the next one is then tried.
ENDS = (Unavailable, Unsupported, ChildDied, ChildTimedOut, RemoteError, RuntimeError, ValueError, OSError)


@dataclass(frozen=True)
class Change:
    """One change to try.

    what        in words
    arithmetic  what the changed backend computes in, which its bound follows from
    change      for ``adjust``; ``scheme``: another one; ``weights``: another checkpoint; each if it is that
    confirmed   what emulation said, where it was asked
    """

    what: str
    arithmetic: Arithmetic | Mixed
    change: Mapping[str, Any] = field(default_factory=dict)
    scheme: str | None = None
    weights: Weights | None = None
    confirmed: Outcome | None = None


class Try(NamedTuple):
    """What became of one change.

    spent  decode speed with it over that without; ``None`` where it was not measured
    truth  what judged it
    gone   whether what was found is gone: the gate's word where that saw it, else a trace's; ``None``: nobody's
    """

    judged: Gate
    spent: float | None
    truth: Truth
    gone: bool | None


def try_change(change: Change, evidence: Evidence, opener: Opener | Bench, tell: Tell, unseen: Finding | None) -> Try:
    """The changed backend judged, and timed where that says yes; ``unseen``: a finding that the gate does not see.

    No speed where the backend cannot be timed here: no :class:`Bench`, no memory for both, or it breaks the timing.
    """
    truth = _truth(change, evidence)  # before the backend takes its memory
    weights = change.weights or evidence.original
    if not isinstance(opener, Bench):
        with opener(weights) as session:
            return _judged(session, change, evidence, truth, unseen)
    with opener.open(weights, change.scheme, change.change or None) as after:
        if change.scheme and after.arithmetic != change.arithmetic:
            change = replace(change, arithmetic=after.arithmetic)
            truth = _truth(change, evidence)
        done = _judged(after.session, change, evidence, truth, unseen)
        if not done.judged.passed or not done.gone or not _both_fit(change, evidence):
            return done
        tell("measuring what it costs")
        try:
            with opener.open(evidence.original) as before:
                return done._replace(spent=cost(before, after, [int(token) for token in evidence.tokens]))
        except Exception as error:
            if not (isinstance(error, (*ENDS, MeasureError)) or from_backend(error)):
                raise
            return done  # the fix is verified all the same


def _judged(session: Session, change: Change, evidence: Evidence, truth: Truth, unseen: Finding | None) -> Try:
    judged = gate(session, truth)
    if unseen is None or not judged.passed:
        return Try(judged, None, truth, judged.passed)
    stored = evidence.stored
    if change.weights is not None or change.scheme is not None:
        stored = apply(change.weights or evidence.original, change.scheme or evidence.scheme)
    return Try(judged, None, truth, gone(session, unseen, stored, change.arithmetic, evidence.tokens))


def how_surely(truth: Truth) -> Iterator[str]:
    """A note where the gate that the fix has passed lets much through."""
    if truth.coarse:
        bound = f"{K * truth.e_rms:.2f} of the logits' spread"
        yield f"verified under a coarse bound, {bound}: only gross faults would have failed it"


def _truth(change: Change, evidence: Evidence) -> Truth:
    """What the changed backend is held against: the bound follows from what it then computes in."""
    # derive() asks an arithmetic only for its type of activations and for the forward pass in it.
    arithmetic = change.arithmetic
    scheme = change.scheme or evidence.scheme
    if change.weights is not None:
        truth = derive(change.weights, scheme, arithmetic, evidence.tokens)
        _check_same_function(truth, evidence, scheme)
        return truth
    if change.scheme is not None:
        return derive(evidence.original, scheme, arithmetic, evidence.tokens)
    return derive(evidence.stored, "fp32", arithmetic, evidence.tokens)  # stored by its scheme already


def _check_same_function(truth: Truth, evidence: Evidence, scheme: str) -> None:
    """Rescaled weights are the same function but for eps and subnormal weights; raises ValueError where these show."""
    original = derive(evidence.original, scheme, evidence.arithmetic, evidence.tokens, evidence.original.key or None)
    error = logits_error(truth.logits, original.logits).rms
    if not error <= K * truth.e_rms:
        raise ValueError(f"the rescaled checkpoint is another function: logits off by {error:.1e} of their spread")


def _both_fit(change: Change, evidence: Evidence) -> bool:
    """Whether memory takes the model twice; what is kept in fp32 is as large as fp32 at most."""
    config = evidence.original.config
    kept = "fp32" if change.change else change.scheme or evidence.scheme
    return stored_bytes(config, evidence.scheme) + stored_bytes(config, kept) < available_bytes()


def why_not(done: Try) -> str:
    """Why a change that was tried is not the answer."""
    if not done.judged.passed:
        return str(done.judged.first_bad)
    untold = "parity holds with it and without it, and no trace tells whether it helped"
    return untold if done.gone is None else "parity holds with it and without it, and the trace is still wrong"
