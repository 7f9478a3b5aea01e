"""The methods, best first: each gives where a fault is, or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from backends.api import Session, StateAccess, Traceable, Unavailable, Unsupported
from harness.checks import call
from harness.localize import calls, narrowed, state, truncation, watched
from harness.localize.answer import Start, start
from harness.localize.case import Case, Located, overflow
from harness.localize.evidence import Evidence
from harness.localize.finding import DIVERGED, LOGITS, NON_FINITE, STATE, TRACE, TRUNCATION, Finding, Seen
from harness.localize.held import Held, from_backend, told
from harness.localize.trace import DRAWS, Past, Traced, trace
from harness.parity import Gate
from reference.forward import forward


@dataclass(frozen=True)
class Looked:
    """What one method came to.

    located  ``None`` where it has seen nothing wrong, or could not look: then ``why``
    history  what it has seen
    """

    located: Located | None = None
    history: tuple[Seen, ...] = ()
    watched: str = ""
    why: str = ""
    notes: tuple[str, ...] = ()


def by_trace(case: Case, held: Held, judged: Gate) -> Looked:
    """Trace points of the prompt in one call; where these are right and the gate fails, of the calls that fail."""
    session = held.session
    if not isinstance(session, Traceable):
        return Looked(why="it shows no trace points")
    case.tell("tracing")
    whole = trace(session, case.stored, case.arithmetic, case.ids)
    if not whole.seen:
        return Looked(why="its trace has no points")
    found = start(whole)
    wrong = found if not judged.passed or whole.local or whole.non_finite else None
    try:
        same, notes = watched.compared(session, case.truth, np.asarray(whole.logits))
    except Exception as error:
        if wrong is None or not from_backend(error):
            raise
        held.drop(error)
        note = f"trace: it broke when run unwatched again: {told(error)}"
        located = _traced(case, whole, wrong, (note, *whole.notes))
        return Looked(replace(located, finding=replace(located.finding, broke=True)), tuple(whole.seen))
    if wrong is not None:
        return Looked(_traced(case, whole, wrong, (*notes, *whole.notes)), tuple(whole.seen), same)
    if found is not None:
        text = f"{found.step.point} is off by {found.error:.1e}, bound {found.bound:.1e}"
        notes.append(f"{text}, but no operation is wrong by itself, and logits and state are right")
    history = tuple(whole.seen)
    for wanted in calls.failing(session, case.truth, judged):
        case.tell(f"tracing {wanted}")
        again = _traced_call(case, session, wanted)
        found = start(again)
        if found is not None:
            shift = replace_token(found, wanted.begin)
            notes = [f"the prompt in one call is right; this is {wanted}", *notes]
            return Looked(_traced(case, again, shift, (*notes, *again.notes), wanted), tuple(again.seen), same)
    return Looked(None, history, same, notes=(*notes, *whole.notes))


def _traced_call(case: Case, session: Session, wanted: calls.Call) -> Traced:
    assert isinstance(session, Traceable)
    begin = wanted.begin
    before = calls.arrive(session, case.ids, case.truth, wanted)
    own = session.export_state(before) if isinstance(session, StateAccess) and before is not None else None
    past = None
    if begin:
        past = Past(
            own,
            forward(case.stored, case.ids[:begin], dtype=np.float64)[1],
            [forward(case.stored, case.ids[:begin], arithmetic=case.arithmetic, seed=i)[1] for i in range(DRAWS)],
        )
    return trace(session, case.stored, case.arithmetic, case.ids[begin : wanted.end], before, past)


def replace_token(found: Start, begin: int) -> Start:
    """Its token counted from the beginning of the prompt."""
    return replace(found, token=None if found.token is None else found.token + begin)


def _traced(
    case: Case, traced: Traced, found: Start, notes: tuple[str, ...], wanted: calls.Call | None = None
) -> Located:
    place, step = found.place, found.step
    exact = step == place.step
    finding = Finding(
        found.verdict,
        TRACE,
        0 if step.point == "blocks.0.ln0" else step.layer,
        step.point,
        found.token,
        found.channel,
        error=found.error,
        bound=found.bound,
        history=tuple(traced.seen),
        span=tuple(other.point for other in found.span),
        notes=(*found.notes, *notes),
    )
    evidence = replace(case.evidence(), point=step.point, layer=step.layer)
    if exact and (wanted is None or wanted.begin == 0):
        # The operation's inputs do not tell of an earlier call: only of the first one can a cause be computed.
        evidence = replace(evidence, inputs=place.inputs, got=place.got, expected=place.expected)
    return Located(finding, evidence)


def by_state(case: Case, held: Held, judged: Gate) -> Looked:
    """Rows of the state after every token; where these are right and the gate fails, after every beginning.

    Where an old state cannot be used once more, which row of it has changed meanwhile.
    """
    session = held.session
    if not isinstance(session, StateAccess):
        return Looked(why="it shows no state")
    if any(check.name.startswith("replay") and not check.passed for check in judged.logits):
        case.tell("states that were handed out")
        changed = state.changed(session, case.ids)
        if changed is not None:
            return Looked(_of_changed(case, changed))
    history: tuple[Seen, ...] = ()
    for how, look in (("one token at a time", state.token_by_token), ("in one call", state.in_one_call)):
        case.tell(f"states, {how}")
        shown = look(session, case.ids)
        seen = state.compare(shown, case.stored, case.arithmetic, case.tokens)
        history = history or tuple(seen)
        bad = _first_bad(seen)
        if bad is not None and (not judged.passed or bad.problem or bad.locally_bad):
            notes = () if look is state.token_by_token else ("one token at a time it is right; this is in one call",)
            return Looked(_of_state(case, seen, bad, shown, notes), tuple(seen))
        if judged.passed:
            break
    return Looked(None, history)


def _of_changed(case: Case, changed: state.Changed) -> Located:
    bad = changed.seen
    place = (bad.layer, bad.point, bad.token, bad.channel)
    finding = Finding(DIVERGED, STATE, *place, error=bad.error, bound=bad.bound, history=(bad,))
    return Located(finding, replace(case.evidence(), layer=bad.layer, point=bad.point), str(changed))


def _first_bad(seen: list[Seen]) -> Seen | None:
    """The first of those that are locally wrong, else of all that are wrong."""
    bad = [one for one in seen if one.bad]
    local = [one for one in bad if one.locally_bad]
    if local and not any(one.problem for one in bad[: bad.index(local[0])]):
        return local[0]
    return bad[0] if bad else None


def _of_state(case: Case, seen: list[Seen], bad: Seen, shown: state.Watched, notes: tuple[str, ...]) -> Located:
    layer, point, span = state.between(seen, bad)
    searched = layer  # where a cause is looked for
    if bad.point == "logits" and not bad.problem:
        layer, point, span = narrowed.of_the_head(case, layer, point, span)
        searched = layer
    elif bad.point == "logits" and narrowed.partly(shown.logits):
        layer, searched, point, span, notes = None, None, "logits", [], (*notes, narrowed.PARTLY)
    elif not bad.problem and bad.point.endswith(("att_x", "ffn_x")):
        case.tell("whether a norm or what it was given")
        layer, point, span, why = narrowed.by_norm(shown.states, case, bad, (layer, point, span))
        notes = (*notes, why) if why else notes
    verdict = NON_FINITE if bad.problem else DIVERGED
    if bad.problem:
        culprit = overflow(case, span)
        if culprit is not None:
            point, span = culprit, []
            notes = (*notes, f"{bad.point} is {bad.problem} because of it")
    finding = Finding(
        verdict,
        STATE,
        layer,
        point,
        bad.token,
        bad.channel,
        error=bad.local if bad.locally_bad else bad.error,
        bound=bad.local_bound if bad.locally_bad else bad.bound,
        history=tuple(seen),
        span=tuple(span),
        notes=notes,
    )
    last = shown.states[-1]
    evidence = replace(case.evidence(), layer=searched, point=None if span else point, logits=shown.logits)
    evidence = replace(evidence, truth=case.truth.logits, state=last, truth_state=case.truth.state)
    return Located(finding, evidence)


def by_truncation(case: Case, held: Held, judged: Gate) -> Looked:
    """Checkpoints of the first k layers."""
    if judged.passed:
        return Looked(why="its logits are right, and it shows nothing else")
    shown = _logits_of(case, held, "logits", None)
    if shown.logits is not None and narrowed.partly(shown.logits):
        finding = Finding(NON_FINITE, LOGITS, None, "logits", notes=(narrowed.PARTLY,))
        return Looked(Located(finding, shown))
    held.drop()  # two models of a large size may not fit
    try:
        cut = truncation.smallest(case, judged)
    except (Unavailable, Unsupported) as error:
        return Looked(why=f"it cannot be cut to fewer layers: {error}")
    bad = cut.seen[[one.point for one in cut.seen].index(f"layers {cut.layers}")]
    layer: int | None = cut.layers - 1
    point, span = f"blocks.{layer}.{cut.half or ''}".rstrip(".") + ".*", cut.span
    if cut.half == "ends":
        layer, point = None, "logits"
    verdict = NON_FINITE if bad.problem in ("NaN", "Inf") else DIVERGED
    notes = cut.notes
    if cut.overflow is not None:
        point, span = cut.overflow, []
        notes = (*notes, "of that layer, the operation is the one that overflows in emulated arithmetic")
    finding = Finding(
        verdict,
        TRUNCATION,
        layer,
        point,
        error=bad.error,
        bound=bad.bound,
        history=cut.seen,
        span=tuple(span),
        notes=notes,
    )
    return Looked(_with_logits(case, held, judged, finding, None if span else point), cut.seen)


def malformed(case: Case, judged: Gate) -> Located | None:
    """Results that are no logits at all: of another type or shape."""
    bad = next((check for check in judged.logits if check.problem and "returned" in check.problem), None)
    if bad is None:
        return None
    finding = Finding(DIVERGED, LOGITS, None, "logits", notes=(str(bad),))
    return Located(finding, replace(case.evidence(), point="logits"), f"{bad}: that breaks the contract of a backend")


def by_logits(case: Case, held: Held, judged: Gate, notes: tuple[str, ...]) -> Located:
    """Only that the logits are wrong."""
    check = judged.first_bad
    assert check is not None
    problem = check.problem or ""
    verdict = NON_FINITE if problem.startswith(("NaN", "Inf")) else DIVERGED
    error, bound = (None, None) if problem else (check.error, check.bound)
    finding = Finding(verdict, LOGITS, None, None, error=error, bound=bound, notes=(str(check), *notes))
    return _with_logits(case, held, judged, finding, None)


def _with_logits(case: Case, held: Held, judged: Gate, finding: Finding, point: str | None) -> Located:
    """With the evidence of its logits, unless the backend breaks on the way to them, or they are right that way."""
    nothing = replace(case.evidence(), point=point, layer=finding.layer)
    if all(check.passed for check in judged.logits if check.name == "decode"):
        cause = f"not known: one token at a time all logits are right, and no cause can be told from {judged.first_bad}"
        return Located(finding, nothing, cause)
    try:
        return Located(finding, _logits_of(case, held, point, finding.layer))
    except Exception as error:
        if not from_backend(error):
            raise
        held.drop(error)
        notes = (*finding.notes, f"it broke when its logits were wanted once more: {told(error)}")
        return Located(replace(finding, notes=notes, broke=True), nothing)


def _logits_of(case: Case, held: Held, point: str | None, layer: int | None) -> Evidence:
    """Evidence from the logits, token by token, of the whole model."""
    rows, past = [], None
    session = held.session
    for token in case.ids:
        row, past = call(session, [token], past)
        rows.append(row)
    evidence = replace(case.evidence(), point=point, layer=layer, logits=np.stack(rows), truth=case.truth.logits)
    if isinstance(session, StateAccess):
        evidence = replace(evidence, state=session.export_state(past), truth_state=case.truth.state)
    return evidence
