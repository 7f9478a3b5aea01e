"""Where a backend goes wrong, why, and what helps.

weights      NaN in the checkpoint is nobody's fault but its own
judged       what of the backend fails: the checks of the parity gate
place        by trace points, by the recurrent state, or by checkpoints of the first k layers
prompt       one that fails and of which nothing can be left out
cause, fix   what explains it, and a change that was tried
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from backends.api import Unavailable, Unsupported
from harness.localize import places
from harness.localize.answer import operation_of
from harness.localize.bad_weights import bad_weights
from harness.localize.by_layers import layered
from harness.localize.case import Case, Located
from harness.localize.evidence import Opener
from harness.localize.finding import CLEAN, LOGITS, NON_FINITE, STATE, TRACE, TRUNCATION, Finding, Seen
from harness.localize.held import Held, from_backend, told
from harness.localize.off import rms
from harness.localize.prompt import Enough, shortest
from harness.parity import Gate, gate
from harness.tolerance import K, derive
from reference.forward import Tokens, check_tokens, forward
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

METHODS: dict[str, Callable[[Case, Held, Gate], places.Looked]] = {
    TRACE: places.by_trace,
    STATE: places.by_state,
    TRUNCATION: places.by_truncation,
}


#: Positions that a bound is taken over; a mean over fewer is one draw of the arithmetic's error.
ENOUGH = 32


def localize(
    opener: Opener,
    weights: Weights,
    scheme: str,
    arithmetic: Arithmetic,
    tokens: Tokens,
    *,
    method: str | None = None,
    fix: bool = True,
    cache_key: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Finding:
    """The first wrong result of a backend over one prompt, its cause, and a fix.

    opener     opens the backend over the weights it is given; over ``weights`` first
    scheme, arithmetic  as the backend declares them; a session that declares another arithmetic is judged by its own
    tokens     the prompt, from the initial state; bounds need at least ``ENOUGH`` tokens; of fewer a note is made
    method     ``trace``, ``state`` or ``truncation``; ``None``: the best that the backend allows
    fix        whether to look for one
    cache_key  content hash of ``weights``, under which truth is kept

    Raises Unsupported where ``method`` is not to be had, TokenError for an empty prompt, and whatever the backend
    raises where it cannot be opened or does not run even unwatched.
    """
    ids = check_tokens(tokens, weights.config.n_vocab)
    tell(f"the weights as {scheme} stores them")
    stored = apply(weights, scheme)
    bad = bad_weights(weights, stored, scheme)
    if bad is not None:
        return bad
    tell("deriving the bound")
    truth = derive(weights, scheme, arithmetic, ids, cache_key)  # before the backend takes its memory
    with Held(opener, weights) as held:
        tell("opening the backend")
        own = held.arithmetic(arithmetic)
        if own != arithmetic:
            arithmetic, truth = own, derive(weights, scheme, own, ids, cache_key)
        stored = layered(stored)
        case = Case(opener, weights, stored, scheme, arithmetic, ids, truth, tell)
        tell("judging")
        judged = gate(held.session, truth)
        found = places.malformed(case, judged) or _place(case, held, judged, method)
        if isinstance(found, Finding):
            return found
        finding = _prompted(case, held, judged, found.finding)
    finding = replace(finding, cause=found.cause) if found.cause else _explained(case, found, finding)
    return _fixed(case, finding, found, judged) if fix else finding


def _place(case: Case, held: Held, judged: Gate, method: str | None) -> Located | Finding:
    """Where it is, by the first method that sees it; a finding of nothing where nothing is wrong."""
    count = f"{len(case.ids)} token{'s' * (len(case.ids) > 1)}"
    few = f"the prompt has {count}; bounds are meant for {ENOUGH} or more, with fewer the verdict is less sure"
    notes = [few] if len(case.ids) < ENOUGH else []
    history: tuple[Seen, ...] = ()
    used, watched, broke = "", "", False
    for name in [method] if method else METHODS:
        try:
            looked = METHODS[name](case, held, judged)
        except (Unavailable, Unsupported) as error:
            if method:
                raise
            notes.append(f"{name}: {error}")
            continue
        except Exception as error:
            if method or not from_backend(error):
                raise
            held.drop(error)
            broke = True
            notes.append(f"{name}: it broke while watched: {told(error)}")
            continue
        watched = watched or looked.watched
        if looked.why and method:
            raise Unsupported(f"--method {method}: {looked.why}")
        if looked.located is not None:
            finding = looked.located.finding
            notes = [*finding.notes, *looked.notes, *notes]
            finding = replace(finding, watched=watched, notes=tuple(notes), broke=broke or finding.broke)
            return replace(looked.located, finding=finding)
        right = [] if judged.passed else [f"{name}: all that it shows is right"]
        notes += [*([f"{name}: {looked.why}"] if looked.why else right), *looked.notes]
        if not looked.why:
            history, used = history or looked.history, used or name
        if judged.passed and not looked.why:
            break
    if judged.passed:
        return Finding(CLEAN, used or LOGITS, history=history, watched=watched, notes=tuple(notes), broke=broke)
    found = places.by_logits(case, held, judged, tuple(notes))
    finding = found.finding
    return replace(found, finding=replace(finding, watched=watched, history=history, broke=broke or finding.broke))


def _prompted(case: Case, held: Held, judged: Gate, finding: Finding) -> Finding:
    """With a short failing prompt, and the backend closed; it may break meanwhile, which loses nothing."""
    notes: list[str] = []
    prompt, stopped = _prompt(case, held, judged, finding, notes)
    try:
        held.drop()
    except Exception as error:
        if not from_backend(error):
            raise
        notes.append(f"it broke while it was closed: {told(error)}")
    broke = finding.broke or bool(notes)
    return replace(finding, prompt=prompt, prompt_stopped=stopped, notes=(*finding.notes, *notes), broke=broke)


def _prompt(case: Case, held: Held, judged: Gate, finding: Finding, notes: list[str]) -> tuple[tuple[int, ...], str]:
    """A short prompt that fails as the whole one does, by NaN or by error: in one call, else token by token.

    With what ended the search for a shorter one, as :func:`shortest` tells it. A backend that breaks ends it too,
    with a note.
    """
    failing = {check.name for check in judged.logits if not check.passed and "returned" not in (check.problem or "")}
    if not failing & {"decode", "prefill"}:
        return (), ""
    singly = "prefill" not in failing
    case.tell("the shortest failing prompt")

    def fails(tokens: Sequence[int]) -> bool:
        try:
            logits = _last(held, tokens, singly)
        except Exception as error:
            if not from_backend(error):
                raise
            held.drop(error)
            notes.append(f"the shortest failing prompt: it broke on {len(tokens)} tokens: {told(error)}")
            raise Enough("a call that broke") from error
        if finding.verdict == NON_FINITE or not np.isfinite(logits).all():
            return finding.verdict == NON_FINITE and not np.isfinite(logits).all()
        expected, _ = forward(case.stored, tokens, dtype=np.float64)
        return not rms(logits - expected) / case.truth.unit <= K * case.truth.e_worst

    try:
        if not fails(case.ids):  # it fails at an earlier token only, or not every time
            return (), ""
    except Enough:
        return (), ""
    return shortest(fails, case.ids, finding.token_index)


def _last(held: Held, tokens: Sequence[int], singly: bool) -> np.ndarray:
    state, session = None, held.session
    logits = np.empty(0)
    for some in [[token] for token in tokens] if singly else [list(tokens)]:
        logits, state = session.forward(some, state)
    return logits


def _explained(case: Case, found: Located, finding: Finding) -> Finding:
    """With its cause, and with the operation that the cause is about where the method could not tell it."""
    from harness.localize.cause import explain

    case.tell("the cause")
    evidence = found.evidence
    if evidence.expected is not None:  # perhaps of a call of the first tokens only
        evidence = replace(evidence, tokens=evidence.tokens[: len(evidence.expected)])
    try:
        cause = explain(evidence)
    except (ArithmeticError, LookupError, ValueError) as error:  # the place is worth more than why
        return replace(finding, cause=f"not found: {type(error).__name__}: {error}")
    finding = replace(finding, cause=str(cause))
    point = operation_of(case, finding.span, cause) if finding.span else None
    if point is None:
        return finding
    layer = int(point.split(".")[1]) if point.startswith("blocks.") else None
    note = f"{finding.point} is all that {finding.method} tells; that the cause reproduces it names the operation"
    layer = 0 if point == "blocks.0.ln0" else layer
    return replace(finding, point=point, layer=layer, span=(), notes=(*finding.notes, note))


def _fixed(case: Case, finding: Finding, found: Located, judged: Gate) -> Finding:
    """With a fix, or with what was tried for one."""
    from harness.localize.fix import find_fix

    case.tell("a fix")
    search = find_fix(finding, found.evidence, case.opener, case.tell, judged.passed)
    notes = (*finding.notes, *(f"as a fix, {tried}" for tried in search.tries))
    return replace(finding, fix=search.fix, no_fix=search.none, notes=notes)
