"""What localization finds, as plain data; the JSON of ``rwkv-bench localize`` is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

CLEAN, BAD_WEIGHTS, NON_FINITE, DIVERGED = "clean", "bad-weights", "non-finite", "diverged"
TRACE, STATE, TRUNCATION, LOGITS = "trace", "state", "truncation", "logits"


@dataclass(frozen=True)
class Seen:
    """One place on the way to the fault: a trace point, a row of the state, or the logits of the first k layers.

    point    name of the trace point; ``blocks.3.state.aa``; ``layers 4`` for a truncated model
    largest  largest magnitude that truth has there, in unrescaled units; ``None`` where it is not known
    got      largest finite magnitude that the backend shows
    error, bound  distance from truth and what is allowed, of the statistic that is worst; ``None`` where nothing
             could be compared
    problem  ``NaN``, ``Inf``, a wrong shape; empty for finite values
    local, local_bound  the same for this operation alone, against what it should have made of the backend's own inputs
    token, channel  where it is worst, or first not finite
    """

    point: str
    layer: int | None
    largest: float | None
    got: float | None
    error: float | None
    bound: float | None
    problem: str = ""
    local: float | None = None
    local_bound: float | None = None
    token: int | None = None
    channel: int | None = None

    @property
    def globally_bad(self) -> bool:
        """Farther from truth than allowed."""
        return self.error is not None and self.bound is not None and not self.error <= self.bound

    @property
    def locally_bad(self) -> bool:
        """Not what the operation should have made of its own inputs."""
        return self.local is not None and self.local_bound is not None and not self.local <= self.local_bound

    @property
    def bad(self) -> bool:
        """Whether something is wrong here, be it handed on from before."""
        return bool(self.problem) or self.globally_bad or self.locally_bad


@dataclass(frozen=True)
class Fix:
    """A change that restores parity.

    what      in words
    verified  whether it was applied to the backend itself and parity was seen; else only emulation says so
    cost      decode with it over decode without it, in tok/s; ``None`` where it was not measured
    note      why it could not be verified, or what is left
    """

    what: str
    verified: bool
    cost: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """The answer of one localization.

    layer, point, token_index, channel  the first wrong result, as far as the method can tell; ``point`` may name
                a span where the backend shows no more (``blocks.3.att.*``)
    span        trace points that the backend does not show and that may be what is wrong instead of ``point``
    history     on the way there, in execution order
    prompt      the shortest failing one that was found: none of its tokens can be left out, unless ``prompt_stopped``
                tells what ended the search (``12 s``)
    no_fix      where a fix was looked for and none was found: that, and what was tried
    watched     what watching did: ``same`` to the bit, ``differs``, or ``hidden`` (the fault is gone when watched);
                empty where nothing was watched
    notes       what the reader must know besides: a method that was not available and why, what was not reached
    broke       whether the backend crashed, hung or raised while it was looked at; a note says where
    """

    verdict: str
    method: str
    layer: int | None = None
    point: str | None = None
    token_index: int | None = None
    channel: int | None = None
    cause: str = ""
    error: float | None = None
    bound: float | None = None
    history: tuple[Seen, ...] = ()
    fix: Fix | None = None
    no_fix: str = ""
    span: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    prompt_stopped: str = ""
    watched: str = ""
    notes: tuple[str, ...] = field(default=())
    broke: bool = False
