"""What measuring is asked for and what it gives: workload, sampling, raw samples. Plain data, JSON in and out.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from reference.errors import InputError

REPEATS_REACHED = "repeats reached"
TIME_BUDGET = "time budget"
SINGLE_CALL = "single call"  # a first call cannot be repeated
PRECISION_REACHED = "precision reached"
INTERRUPTED = "interrupted"
CELL_ENDED = "cell ended"  # by a crash, a hang or an exception

LOOP, GREEDY = "loop", "greedy"

#: Measuring one metric of one cell stops after this long, unless asked otherwise.
BUDGET_SECONDS = 20.0

#: Samples where precision decides: as good as no limit.
UNLIMITED = 10_000


@dataclass(frozen=True)
class Workload:
    """Length of the prompt and of the continuation, in tokens, and sequences side by side.

    Raises :class:`InputError` for a length that cannot be.
    """

    prompt_tokens: int
    decode_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("decode_tokens", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"workload: {name} is {getattr(self, name)}; at least {least} is needed")


@dataclass(frozen=True)
class Sampling:
    """How much to measure.

    repeats    timed samples wanted; with ``precision`` the most that are taken
    warmup     samples taken and kept apart first
    budget_s   seconds after which measuring ends early, warm-up and untimed work included; None: no limit
    minimum    timed samples taken even when the budget is spent (never more than ``repeats``)
    precision  the median's interval is to be this narrow, as a fraction of the median; None: ``repeats`` decide
    again      disturbed blocks are taken again, at most this many
    fresh      each block in a process of its own
    seed       of the order in which cells take their turns

    What one turn of a cell takes is a block; the functions of :mod:`harness.measure` know nothing of blocks.
    Raises :class:`InputError` for a number that cannot be.
    """

    repeats: int = 10
    warmup: int = 1
    budget_s: float | None = None
    minimum: int = 3
    precision: float | None = None
    again: int = 0
    fresh: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("minimum", 1)):
            if getattr(self, name) < least:
                raise InputError(f"sampling: {name} is {getattr(self, name)}; at least {least} is needed")
        if self.budget_s is not None and not 0 <= self.budget_s < math.inf:
            raise InputError(f"sampling: budget_s is {self.budget_s}; seconds, 0 or more, are needed")
        if self.precision is not None and not 0 < self.precision < 1:
            raise InputError(f"sampling: precision is {self.precision}; a fraction between 0 and 1 is needed")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the record of how a row was measured."""
        return asdict(self)


@dataclass(frozen=True)
class NonFinite:
    """The first logit that was NaN or infinite while measuring.

    phase   ``prompt`` (untimed, before decode), ``warm-up``, ``sample`` or ``repeat`` (untimed, after it)
    sample  which warm-up or timed sample, from 0
    step    decode step within it, from 0; 0 for a prefill. Decode step n is, for the driver ``greedy``
            whose own logits are out of sight, the one step run after a block of n
    index   position in the logits
    value   ``nan``, ``inf`` or ``-inf``; NaN is looked for first
    """

    phase: str
    sample: int
    step: int
    index: int
    value: str

    def __str__(self) -> str:
        return f"logit {self.index} is {self.value} at step {self.step} of {self.phase} {self.sample}"


@dataclass(frozen=True)
class Taken:
    """What one turn of a session gave: raw times, when, and what else the machine did meanwhile.

    ns, first_token_ns, steps  as in :class:`Samples`, of this turn only
    settling_ns   the call before them that is not counted: another cell's data was in the caches
    began         seconds since the epoch
    seconds       of the whole turn
    noise         what :mod:`harness.noise` saw
    """

    ns: tuple[int, ...]
    first_token_ns: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()
    settling_ns: int = 0
    began: float = 0.0
    seconds: float = 0.0
    noise: Mapping[str, float] = field(default_factory=dict)
    non_finite_at: NonFinite | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Taken:
        """What :meth:`to_dict` gave, also after a journey through JSON."""
        known = dict(fields)
        for name in ("ns", "first_token_ns"):
            known[name] = tuple(known.get(name, ()))
        known["steps"] = tuple(tuple(steps) for steps in known.get("steps", ()))
        found = known.get("non_finite_at")
        known["non_finite_at"] = NonFinite(**found) if found else None
        return Taken(**known)


@dataclass(frozen=True)
class Samples:
    """Raw times of one quantity, as measured.

    tokens          tokens processed in each sample
    ns              one time per sample
    warmup_ns       times of the warm-up samples, for whoever asks if it was long enough
    stopped         why measuring ended: ``repeats reached``, ``time budget``, ``single call``, ``precision reached``,
                    ``interrupted`` or ``cell ended``
    driver          decode only: ``loop`` over forward, or the backend's own ``greedy``
    first_token_ns  prefill only: prompt to token id, taken in the same samples as ``ns``
    steps           ``loop`` only: per sample, the time of each step; they sum to ``ns``
    ids, last_ids   decode: token ids chosen in the first and in the last sample
    starts          decode: the tokens those two were started with
    ids_varied      decode: the first sample, run again, chose other ids
    last_prompt     prefill, first call: the prompt of the last sample
    last_logits     prefill, first call: what it returned, ``(n_vocab,)``; in memory only, for whoever checks it
    non_finite_at   the first NaN or Inf seen; times after it are still recorded
    """

    tokens: int
    ns: tuple[int, ...]
    stopped: str
    warmup_ns: tuple[int, ...] = ()
    driver: str | None = None
    first_token_ns: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()
    ids: tuple[int, ...] = ()
    last_ids: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    last_prompt: tuple[int, ...] = ()
    last_logits: np.ndarray | None = field(default=None, compare=False, repr=False)
    ids_varied: bool = False
    non_finite_at: NonFinite | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without ``last_logits``; :meth:`from_dict` is the inverse."""
        return {name: value for name, value in asdict(self).items() if name != "last_logits"}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Samples:
        """What :meth:`to_dict` gave, also after a journey through JSON."""
        known = dict(fields)
        for name in ("ns", "warmup_ns", "first_token_ns", "ids", "last_ids", "starts", "last_prompt"):
            known[name] = tuple(known.get(name, ()))
        known["steps"] = tuple(tuple(steps) for steps in known.get("steps", ()))
        found = known.get("non_finite_at")
        known["non_finite_at"] = NonFinite(**found) if found else None
        return Samples(**known)
