"""The trace points of a backend, in execution order: NaN, then Inf, then an error over the derived bound.

Each result is compared twice. Globally, with truth: the bound is what the declared arithmetic must be off by there.
Locally, with what the operation should have made of the backend's own inputs: the bound is what this one operation
must be off by, so errors made earlier neither hide a wrong operation nor accuse a right one. A -Inf that ReLU makes 0,
as it must, is taken for the number that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from backends.api import State, StateAccess, Traceable
from harness.compare import at_exponent, first_non_finite
from harness.localize.before_relu import restored
from harness.localize.finding import Seen
from harness.localize.lockstep import Own, Results, Stream, hidden, layers
from harness.localize.off import allowed, finite, first_place, largest, off, rounding, size
from harness.localize.whatif import harmful
from harness.tolerance import FLOOR
from reference.forward import AA, ATT_X, BB, FFN_X, PP, STATE_ROWS, Tokens, check_tokens
from reference.mixed import Mixed, emulated
from reference.numerics import UNIT_ROUNDOFF, Arithmetic, Exact
from reference.operations import Step
from reference.weights import Weights

#: Emulated runs that give the global bounds, and emulated operations that give the local ones.
DRAWS = 2


@dataclass(frozen=True)
class Place:
    """One result that is wrong, with what it was made of.

    span     operations that the backend does not show and that may be what is wrong instead, in execution order
    inputs   what the operation was given, ``got`` what it made of that, ``expected`` what it should have
    overflow  of ``span`` and ``step``, the first whose result is not finite if it is computed as declared from what
             the backend shows, with token and channel
    """

    seen: Seen
    step: Step
    span: tuple[Step, ...]
    inputs: Mapping[str, np.ndarray]
    got: np.ndarray
    expected: np.ndarray
    overflow: tuple[Step, int, int] | None = None


@dataclass
class Traced:
    """One traced run. ``first_*``: the first place of each kind, in execution order.

    logits   that the run returned, ``(n_vocab,)``
    """

    seen: list[Seen] = field(default_factory=list)
    non_finite: Place | None = None
    local: Place | None = None
    globally: Place | None = None
    logits: np.ndarray | None = None
    state: State | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether all that was shown is right."""
        return not any(seen.bad for seen in self.seen)


class Past(NamedTuple):
    """What a call starts from that is not the first: canonical states ``(n_layer, 5, n_embd)``.

    own    the backend's, if it shows one; else truth's stands in, and the bounds are those of the drawn ones
    truth, drawn  the reference's in float64 and in emulated runs, ``DRAWS`` of them
    """

    own: np.ndarray | None
    truth: np.ndarray
    drawn: Sequence[np.ndarray]


def trace(
    session: Traceable,
    weights: Weights,
    arithmetic: Arithmetic | Mixed,
    tokens: Tokens,
    state: State | None = None,
    past: Past | None = None,
) -> Traced:
    """One traced call; ``weights`` are the scheme's, ``past`` what ``state`` stands for.

    Where the backend shows its state, what the call leaves of it is compared too.
    """
    watch = _Watch(weights, arithmetic, check_tokens(tokens, weights.config.n_vocab), past)
    watch.found.logits, watch.found.state = session.trace([int(t) for t in tokens], state, watch.tap)
    watch.finish(session.export_state(watch.found.state) if isinstance(session, StateAccess) else None)
    return watch.found


class _Made(NamedTuple):
    """What one layer is compared with.

    shown   by the backend, in the right shape, and what enters the layer
    truth, drawn   of the reference in float64 and in emulated runs
    exact, runs    what follows from ``shown``, in float64 and in emulated operations
    """

    group: Sequence[Step]
    shown: Results
    truth: Results
    drawn: Sequence[Results]
    exact: Own
    runs: Sequence[Own]


class _Watch:
    """The tap of one traced run."""

    def __init__(self, weights: Weights, arithmetic: Arithmetic | Mixed, tokens: np.ndarray, past: Past | None) -> None:
        self.found = Traced()
        self._weights, self._arithmetic, self._tokens = weights, arithmetic, tokens
        truth, drawn = (None, [None] * DRAWS) if past is None else (past.truth, past.drawn)
        self._truth = Stream(weights, tokens, Exact(np.float64), truth)
        self._draws = [Stream(weights, tokens, emulated(arithmetic, i), state) for i, state in enumerate(drawn)]
        own = None if past is None else past.own
        self._own_past = [own if own is not None else state for state in (truth, *drawn)]
        self._after: list[list[np.ndarray]] = [[] for _ in range(1 + DRAWS)]
        self._groups = list(layers(weights.config))
        self._index = {step.point: i for i, group in enumerate(self._groups) for step in group}
        self._at = 0
        self._shown: dict[str, np.ndarray] = {}
        self._before: dict[str, np.ndarray] = {}  # what the present layer takes from the one before
        self._unseen: list[Step] = []  # how it follows, where it is not shown

    def tap(self, name: str, x: np.ndarray) -> None:
        """One result of the backend."""
        if name not in self._index:
            self.found.notes.append(f"a trace point {name!r} that is not in the list was left out")
            return
        if self._index[name] < self._at:
            self.found.notes.append(f"{name} was shown after its layer had ended, and left out")
            return
        while self._at < self._index[name]:
            self._end_layer()
        self._shown[name] = np.array(x)  # the backend may use its buffer again

    def finish(self, state: np.ndarray | None = None) -> None:
        """No more will come; ``state`` is the canonical one that the call has left."""
        if self._shown:
            self._end_layer()
        if state is not None and self._after[0]:
            self._compare_state(state)

    def _end_layer(self) -> None:
        group = self._groups[self._at]
        truth = self._truth.layer(group)
        drawn = [draw.layer(group) for draw in self._draws]
        right = {name: x for name, x in self._shown.items() if x.shape == truth[name].shape}
        shown = {**self._before, **right}
        exact, *runs = (self._own(shown, group, i) for i in range(1 + DRAWS))
        for step in group:
            if step.name == "ffn.k" and step.point in right:
                own, follows = right[step.point], exact.made(step)
                filled = restored(step.point, own, follows, self._of(step.point), truth[step.point])
                self._shown[step.point] = right[step.point] = shown[step.point] = filled
        made = _Made(group, shown, truth, drawn, exact, runs)
        for step in group:
            if step.point in self._shown:
                self._compare(step, made)
        for after, run in zip(self._after, (exact, *runs), strict=True):
            if group[0].layer is not None:
                after.append(run.state())
        self._hand_on(made, right)

    def _own(self, shown: Results, group: Sequence[Step], i: int) -> Own:
        op = emulated(self._arithmetic, i - 1) if i else Exact(np.float64)
        return Own(shown, group, self._weights, self._tokens, self._own_past[i], op)

    def _hand_on(self, made: _Made, right: Results) -> None:
        last = made.group[-1]
        self._unseen = [] if last.point in right else [*hidden(last, made.shown, made.group), last]
        self._before = {} if last.point == "logits" else {last.point: made.exact.read(last.point)}
        self._shown = {}
        self._at += 1

    def _compare(self, step: Step, made: _Made) -> None:
        point, got, expected = step.point, self._shown[step.point], made.truth[step.point]
        seen = Seen(point, step.layer, float(np.abs(expected).max()), None, None, None)
        bad = first_non_finite(got) if got.shape == expected.shape else None
        if got.shape != expected.shape:
            seen = replace(seen, problem=f"shape {got.shape}, not {expected.shape}")
        elif bad:
            seen = replace(seen, got=largest(got), problem=bad[0], token=bad[1][0], channel=bad[1][1])
        else:
            seen = self._measured(seen, step, made)
        self._keep(seen, step, made)

    def _measured(self, seen: Seen, step: Step, made: _Made) -> Seen:
        """Of finite values of the right shape: both comparisons."""
        got, expected = self._shown[step.point], made.truth[step.point]
        floor = FLOOR * UNIT_ROUNDOFF[self._arithmetic.activations]
        draws = [self._restored(step, draw[step.point], expected) for draw in made.drawn]
        bound = allowed([off(draw, expected) for draw in draws], size(expected), floor)
        error = off(got, expected).worst(bound, alone=False)
        seen = replace(seen, got=largest(got), error=error[0], bound=error[1])
        token, channel = first_place(got, expected, bound)
        if finite(made.exact.read(name) for name in step.inputs):
            follows = made.exact.made(step)
            drawn = [off(self._restored(step, run.made(step), follows), follows) for run in made.runs]
            bound = allowed(drawn, size(follows), rounding(self._of(step.point), step.point))
            local = off(got, follows).worst(bound, alone=True)
            seen = replace(seen, local=local[0], local_bound=local[1])
            if seen.locally_bad:
                token, channel = first_place(got, follows, bound)
        return replace(seen, token=token, channel=channel)

    def _restored(self, step: Step, drawn: np.ndarray, right: np.ndarray) -> np.ndarray:
        return restored(step.point, drawn, right, self._of(step.point), right)

    def _of(self, point: str) -> Arithmetic:
        return self._arithmetic.of(point) if isinstance(self._arithmetic, Mixed) else self._arithmetic

    def _compare_state(self, got: np.ndarray) -> None:
        """The state that a call leaves follows from what it has shown."""
        follows, *drawn = (np.stack(after) for after in self._after)
        if got.shape[1:] != follows.shape[1:]:
            return  # the gate says so
        at = [at_exponent(x, follows[:, PP]) for x in (got[: len(follows)], *drawn)]
        for layer, row in product(range(len(follows)), (ATT_X, BB, AA, FFN_X)):
            expected = follows[layer, row][None]
            mine, *others = (x[layer, row][None] for x in at)
            if not finite([expected]):
                return
            point = f"blocks.{layer}.state.{STATE_ROWS[row]}"
            bound = allowed(
                [off(x, expected) for x in others], size(expected), rounding(self._of(f"blocks.{layer}.att.wkv"), "wkv")
            )
            seen = Seen(point, layer, float(np.abs(expected).max()), largest(mine), None, None)
            bad = first_non_finite(got[layer, row])
            if bad:
                seen = replace(seen, problem=bad[0], channel=bad[1][0])
            else:
                error = off(mine, expected).worst(bound, alone=True)
                seen = replace(
                    seen, local=error[0], local_bound=error[1], channel=first_place(mine, expected, bound)[1]
                )
            self._keep_state(seen, mine, expected)

    def _keep_state(self, seen: Seen, got: np.ndarray, expected: np.ndarray) -> None:
        self.found.seen.append(seen)
        kind = "non_finite" if seen.problem else "local"
        if seen.bad and getattr(self.found, kind) is None:
            name = seen.point.split(".", 2)[2]
            wkv = next(step for group in self._groups for step in group if step.name == "att.wkv")
            step = Step(seen.point, seen.layer, name, wkv.operation, ())
            setattr(self.found, kind, Place(seen, step, (), {}, got, expected))

    def _keep(self, seen: Seen, step: Step, made: _Made) -> None:
        found = self.found
        found.seen.append(seen)
        kinds = {"non_finite": bool(seen.problem), "local": seen.locally_bad, "globally": seen.globally_bad}
        for kind, bad in kinds.items():
            if bad and getattr(found, kind) is None:
                setattr(found, kind, self._place(seen, step, made))

    def _place(self, seen: Seen, step: Step, made: _Made) -> Place:
        span = hidden(step, made.shown, made.group)
        if {name for other in (*span, step) for name in other.inputs} & set(self._before):
            span = [*self._unseen, *span]
        inputs = {name: made.exact.read(name) for name in step.inputs}
        shown = self._shown[step.point]
        return Place(seen, step, tuple(span), inputs, shown, made.exact.made(step), _overflow([*span, step], made))


def _overflow(steps: Sequence[Step], made: _Made) -> tuple[Step, int, int] | None:
    for step in steps:
        if step.point in {other.point for other in made.group}:
            bad = first_non_finite(harmful(step.point, made.runs[0].made(step)))
            if bad:
                return step, bad[1][0], bad[1][1]
    return None
