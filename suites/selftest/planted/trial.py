"""One fault in one model and arithmetic: is it visible, does the gate see it, does localization find the place?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from backends.api import Session
from harness.checks import Check
from harness.localize import localize
from harness.localize.evidence import Opener
from harness.localize.finding import CLEAN, Finding
from harness.parity import Gate, again, gate
from harness.timed_check import long_check
from reference.schemes import apply
from reference.weights import Weights
from suites.selftest.planted.backend import LOGITS, STATE, TRACE, PlantedBackend
from suites.selftest.planted.catalogue import FAULTS
from suites.selftest.planted.fault import SESSION, Patch, Planted, Site
from suites.selftest.planted.subject import model, subject
from suites.selftest.planted.visible import Effect, effect

#: Single steps between the gate and its repetition, as timing makes them.
TIMED_STEPS = 100


#: What backends show, and the checks of the gate that only those can fail which show more than logits.
SHOWS = (TRACE, STATE, LOGITS)
_STATE = ("state after decode", "state after prefill", "handover")
_MORE = (*_STATE, "scoring")


@dataclass(frozen=True)
class Trial:
    """What is planted where. ``model``: ``tiny``, or the seed of a random one."""

    fault: str
    model: str
    kind: str
    everywhere: bool = False
    seed: int = 0

    def __str__(self) -> str:
        where = "every layer" if self.everywhere else "one layer"
        return f"{self.fault} ({self.kind}, {self.model}, {where})"


#: A layer and a trace point, as localized.
Found = tuple[int | None, str | None]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    place    the true first wrong trace point, or ``session``; ``layer`` of it
    effect   against the bound, in float64
    by       what it shows -> what saw it: ``gate``, ``timed length``, ``after timing``; empty: nothing
    found    what it shows -> where it was localized; ``None``: said to be clean
    seconds  what it shows -> time to localize
    """

    trial: Trial
    place: str
    layer: int | None
    effect: Effect
    by: dict[str, str]
    found: dict[str, Found | None]
    seconds: dict[str, float]

    def visible(self, shows: str) -> bool:
        """Whether it was decided beforehand that it can be seen."""
        return self.effect.shown(shows) > 1

    @property
    def placed(self) -> bool:
        """Whether it has a place, and shows when the prompt is run in one call, as localization does."""
        return self.place != SESSION and self.effect.plain > 1

    def right_layer(self, shows: str) -> bool:
        """Whether the layer, or the end of the model, is the true one."""
        found = self.found.get(shows)
        if self.right_point(shows):
            return True
        return found is not None and (found[0], _end(found)) == (self.layer, _end((self.layer, self.place)))

    def right_point(self, shows: str) -> bool:
        """Whether the operation is the true one; of what is not traced, whether it is in the span that was named."""
        found = self.found.get(shows)
        if found is None or found[1] is None:
            return False
        return found[1] == self.place if shows == TRACE else fnmatchcase(self.place, found[1])


def _end(found: Found) -> str:
    """Which end of the model a place without a layer is at."""
    layer, point = found
    if layer is not None:
        return ""
    return "first" if point in ("emb", "blocks.0.ln0") else "last"


def trials(models: list[str], kinds: list[str], seed: int = 0) -> list[Trial]:
    """Every fault under every arithmetic it can be met with, in one layer or in all, as a draw decides."""
    rng = np.random.default_rng(seed)
    found = []
    for name, fault in FAULTS.items():
        for kind in kinds:
            if fault.schemes and kind not in fault.schemes:
                continue
            for at in models:
                everywhere = bool(fault.layered and rng.integers(2))
                found.append(Trial(name, at, kind, everywhere, int(rng.integers(1, 1 << 30))))
    return found


def attempt(trial: Trial, shows: tuple[str, ...] = ()) -> Outcome:
    """Run one trial; localize with each of ``shows`` where the fault has a place and is visible to it."""
    bench = Bench(trial)
    seen = effect(bench.planted.patch, bench.subject)
    by = bench.judged()
    found: dict[str, Found | None] = {}
    seconds: dict[str, float] = {}
    for how in shows if bench.planted.point != SESSION and seen.plain > 1 else ():
        if seen.shown(how) > 1 and by[how]:
            began = time.perf_counter()
            finding = bench.localized(how)
            seconds[how] = time.perf_counter() - began
            found[how] = None if finding.verdict == CLEAN else (finding.layer, finding.point)
    return Outcome(trial, bench.planted.point, bench.layer, seen, by, found, seconds)


def _checks(found: Gate) -> tuple[Check, ...]:
    return (*found.logits, *found.state)


class Bench:
    """A planted backend, and what it is judged by."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.fault = FAULTS[trial.fault]
        self.subject = subject(model(trial.model), trial.kind, self.fault.schemes.get(trial.kind))
        self.planted = self._plant(self.subject.stored, self.subject.model.weights)
        self.layer = layer_of(self.planted.point)

    def _plant(self, stored: Weights, original: Weights) -> Planted:
        """Plant in weights that may be cut to fewer layers than the model has."""
        trial, rng = self.trial, np.random.default_rng(self.trial.seed)
        chosen, left = int(rng.integers(self.subject.stored.config.n_layer)), stored.config.n_layer
        layers = tuple(range(left)) if trial.everywhere else (chosen,)
        if self.fault.layered and left <= max(layers[0], self.fault.first_layer):
            return Planted(Patch(), SESSION)
        return self.fault.plant(Site(stored, original, self.subject.scheme, layers, rng, trial.everywhere))

    def judged(self) -> dict[str, str]:
        """What it shows -> what of a run sees the fault: the gate, the timed length, the gate again after timing."""
        truth, session = self.subject.truth, self.open(TRACE)
        failed = [check for check in _checks(gate(session, truth)) if not check.passed]
        if any(check.name not in _MORE for check in failed):
            return dict.fromkeys(SHOWS, "gate")
        later = self._later()
        seen_state = any(check.name in _STATE for check in failed)
        return {TRACE: "gate" if failed else later, STATE: "gate" if seen_state else later, LOGITS: later}

    def _later(self) -> str:
        """What sees the fault after the gate has not."""
        truth, prompt, session = self.subject.truth, self.subject.prompt, self.open(LOGITS)
        gate(session, truth)
        if not long_check(session, prompt, truth, self.subject.beyond, self.subject.growth).passed:
            return "timed length"
        state = None
        for token in (prompt * 2)[:TIMED_STEPS]:
            _, state = session.forward([token], state)
        return "" if all(check.passed for check in again(session, truth)) else "after timing"

    def open(self, shows: str) -> Session:
        """A session of the faulty backend."""
        backend = PlantedBackend(self.subject.arithmetic, self.planted.patch, shows, self.trial.seed)
        return backend.open(self.subject.stored)

    def localized(self, shows: str) -> Finding:
        """The answer of localization, no fix looked for."""
        found = self.subject
        return localize(
            self._opener(shows),
            found.model.weights,
            found.scheme,
            found.arithmetic,
            list(found.truth.tokens),
            fix=False,
            cache_key=found.model.key,
        )

    def _opener(self, shows: str) -> Opener:
        """Opens the faulty backend over any weights of this model: cut, or scaled."""
        own = self.subject.model.weights

        @contextmanager
        def opened(weights: Weights) -> Iterator[Session]:
            stored = self.subject.stored
            planted = self.planted
            if weights is not own:
                stored = apply(weights, self.subject.scheme).in_memory(np.float32)
                planted = self._plant(stored, weights)
            yield PlantedBackend(self.subject.arithmetic, planted.patch, shows, self.trial.seed).open(stored)

        return opened


def layer_of(point: str) -> int | None:
    """The layer of a trace point; ``None`` for those before and after the layers, and for a session."""
    parts = point.split(".")
    return int(parts[1]) if parts[0] == "blocks" and parts[2] != "ln0" else None
