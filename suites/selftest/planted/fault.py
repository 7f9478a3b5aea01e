"""What a planted fault is: a small change to a correct backend, and the place where it truly is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference.operations import Here
from reference.weights import Tensor, Weights

#: A wrong computation of one trace point.
Wrong = Callable[[Here], Any]

#: Where a fault has no place in the model: it is in what lies between the calls.
SESSION = "session"


class Carried(NamedTuple):
    """State of a planted session: how many tokens lie behind, and the canonical rows ``(n_layer, 5, n_embd)``."""

    position: int
    rows: np.ndarray


class Ran(NamedTuple):
    """What one call computes: logits of every position ``(T, n_vocab)``, and the state after it."""

    logits: np.ndarray
    after: Carried


@dataclass(frozen=True)
class Call:
    """One call of a session, for a fault to spoil.

    past     the state passed in; ``None`` starts afresh, from ``empty``
    run      computes; ``replaced`` operations are in force for this run only
    memory   of the session, from one call to the next; ``shared`` by all sessions of the backend
    threads  that the session was opened with
    """

    tokens: list[int]
    past: Carried | None
    empty: Carried
    run: Callable[..., Ran]
    memory: SimpleNamespace
    shared: SimpleNamespace
    threads: int

    @property
    def position(self) -> int:
        """Tokens before this call."""
        return 0 if self.past is None else self.past.position

    @property
    def start(self) -> Carried:
        """What the call starts from."""
        return self.empty if self.past is None else self.past

    def usual(self) -> Ran:
        """The call as it should be."""
        return self.run(self.tokens, self.past)


Around = Callable[[Call], Ran]


@dataclass(frozen=True)
class Patch:
    """What differs from a correct backend.

    weights   that it computes with, where not the right ones
    replaced  wrong operations by full trace point
    around    wraps every call
    given, taken  what ``export_state`` makes of the state's rows, and ``import_state``
    """

    weights: Weights | None = None
    replaced: Mapping[str, Wrong] = field(default_factory=dict)
    around: Around | None = None
    given: Callable[[np.ndarray], np.ndarray] | None = None
    taken: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Site:
    """Where a fault is to be planted.

    weights   as the scheme stores them, float32 in memory; ``original`` before that
    layers    the layers to spoil; ``everywhere``: all that the model has
    rng       for what is left to choose
    """

    weights: Weights
    original: Weights
    scheme: str
    layers: tuple[int, ...]
    rng: np.random.Generator
    everywhere: bool = False

    def names(self, name: str) -> list[str]:
        """Full names of a tensor or trace point in the layers to spoil; ``emb``, ``ln_out`` and their like are full."""
        if name.split(".")[0] in ("emb", "blocks", "ln_out", "logits", "head"):
            return [name]
        return [f"blocks.{layer}.{name}" for layer in self.layers]


@dataclass(frozen=True)
class Planted:
    """A fault at a site: what to patch, and the first trace point it makes wrong (``session``: none)."""

    patch: Patch
    point: str


@dataclass(frozen=True)
class Fault:
    """One defect.

    name     short, unique
    says     one sentence
    plant    puts it somewhere
    schemes  arithmetic -> scheme it needs; empty: any arithmetic with its usual scheme
    layered  it can be in one layer or in all; else it has one place
    first_layer  the first layer that it can be in
    """

    name: str
    says: str
    plant: Callable[[Site], Planted]
    schemes: Mapping[str, str] = field(default_factory=dict)
    layered: bool = True
    first_layer: int = 0


def operation(name: str, point: str, wrong: Wrong, says: str) -> Fault:
    """One operation computed wrongly."""
    return planted(name, point, lambda site: wrong, says)


def planted(name: str, point: str, make: Callable[[Site], Wrong], says: str) -> Fault:
    """One operation computed wrongly, by a computation made for the site."""

    def plant(site: Site) -> Planted:
        places = site.names(point)
        return Planted(Patch(replaced=dict.fromkeys(places, make(site))), places[0])

    return Fault(name, says, plant, layered=_in_layers(point))


def tensor(name: str, point: str, which: str, change: Callable[[np.ndarray], np.ndarray], says: str) -> Fault:
    """A tensor other than it should be: ``change`` is given a copy."""

    def plant(site: Site) -> Planted:
        wanted = set(site.names(which))
        weights = changed(site.weights, lambda n, a: change(a.copy()) if n in wanted else a)
        return Planted(Patch(weights=weights), site.names(point)[0])

    return Fault(name, says, plant, layered=_in_layers(which))


def calls(name: str, around: Around, says: str) -> Fault:
    """A fault in what lies between the calls."""
    return Fault(name, says, lambda site: Planted(Patch(around=around), SESSION), layered=False)


def between(name: str, says: str, plant: Callable[[Site], Planted]) -> Fault:
    """The same, put somewhere else than around every call."""
    return Fault(name, says, plant, layered=False)


def changed(weights: Weights, change: Callable[[str, np.ndarray], np.ndarray]) -> Weights:
    """Weights with every array passed through ``change(name, float32 array)``; the same object: the same tensor."""

    def one(name: str, tensor: Tensor) -> Tensor:
        array = tensor.array(np.float32)
        made = change(name, array)
        return tensor if made is array else Tensor.of(np.ascontiguousarray(made, dtype=np.float32))

    return weights.map(one)


def rounded(x: np.ndarray, kind: Any) -> np.ndarray:
    """``x`` rounded to a numpy type and back to its own."""
    with np.errstate(over="ignore"):
        return np.asarray(x.astype(kind).astype(x.dtype))


def _in_layers(name: str) -> bool:
    return name.split(".")[0] not in ("emb", "blocks", "ln_out", "logits", "head")
