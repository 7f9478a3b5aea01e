"""The contract of a backend: one module with ``INFO``, ``load`` and a session with one method.

    INFO = BackendInfo(name=..., ...)
    def load(checkpoint, scheme, device, threads) -> Session

A session must have ``forward``. What more it can do it shows by having the methods of one of the
optional protocols below; callers test with ``isinstance(session, Scoring)``.

A backend that cannot run here raises :class:`Unavailable`; one that does not do what was asked
raises :class:`Unsupported`. It never falls back to another device or precision.

A backend whose dependencies clash with others' declares them in a PEP 723 header on top of its file:

    # /// script
    # requires-python = ">=3.10,<3.12"
    # dependencies = ["torch==2.13.0", "transformers==4.31.0"]
    # [tool.rwkv-bench]
    # no-deps = ["bigdl-llm==2.4.0"]
    # ///

``rwkv-bench setup`` builds that environment (``no-deps``: installed without their own dependencies),
and the backend then runs in a child interpreter there. The module is imported here too, for ``INFO``:
import the runtime inside the functions, and use no syntax that the oldest Python named does not know.

More names a module may have, all optional:
    check() -> None        raises Unavailable if this machine cannot run the backend; cheap; called where it runs
    prepare(checkpoint, scheme, device) -> None
                           writes what load() will want into the cache (:mod:`reference.converted`), so that
                           the time of load is that of loading
    version() -> str       version of the runtime that does the work
    resident_bytes(config, scheme) -> int
                           bytes of weights it keeps while it computes, where that is not their stored size
    device_bytes(config, scheme) -> int
                           all that it needs on a graphics device, where it predicts that itself
    adjust(checkpoint, scheme, device, threads, change) -> Session
                           load() with a change of arithmetic, for fixes that are tried; raises Unsupported for one
                           that it cannot make, never leaves it out. ``change`` is plain JSON:
                               "fp32": [patterns]    results of these trace points kept in float32 and not rounded,
                                                     what reads them computing in float32 (reference.mixed.Mixed)
                               "rescale_every": n    the residual stream halved after every n layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from reference.numerics import Arithmetic
from reference.weights import Weights

State = Any
Tap = Callable[[str, np.ndarray], None]


class Unavailable(Exception):
    """The backend cannot run here: ``reason``, and ``how_to_get_it`` in one line."""

    def __init__(self, reason: str, how_to_get_it: str = "") -> None:
        super().__init__(f"{reason}; {how_to_get_it}" if how_to_get_it else reason)
        self.reason = reason
        self.how_to_get_it = how_to_get_it


class Unsupported(Exception):
    """The backend runs here but does not offer what was asked (scheme, device, model); one line."""


@dataclass(frozen=True)
class BackendInfo:
    """What a backend is and offers, readable without importing its runtime.

    schemes     scheme name -> the arithmetic the backend declares for it on any device
    devices     device names it can be asked for, best known first
    thread_control  whether ``threads`` has a meaning (False: the runtime has one thread or its own mind)
    arithmetic_documented  False: rows say "declared, unverified"
    usual       what ``--quant all`` means, where it is not every scheme; the others run by name or class
    """

    name: str
    description: str
    origin: str
    devices: tuple[str, ...]
    schemes: Mapping[str, Arithmetic]
    thread_control: bool = True
    arithmetic_documented: bool = True
    device_arithmetic: Mapping[tuple[str, str], Arithmetic] = field(default_factory=dict)
    usual: tuple[str, ...] = ()

    def arithmetic(self, scheme: str, device: str) -> Arithmetic:
        """Declared arithmetic of a scheme on a device; ``device_arithmetic`` overrides per (scheme, device)."""
        return self.device_arithmetic.get((scheme, device.split(":")[0]), self.schemes[scheme])


class Session(Protocol):
    """A loaded model. The one required method of a backend."""

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        """Run ``tokens`` (at least one) from ``state``; ``None`` starts afresh.

        Returns the last position's logits, float32 ``(n_vocab,)`` in host memory, so that the
        device has finished, and a new state. The state passed in is left as it was.
        """


@runtime_checkable
class Scoring(Protocol):
    """Gives the logits of every position of a prompt in one call."""

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        """Float32 ``(n_tokens, n_vocab)``."""


@runtime_checkable
class Traceable(Protocol):
    """Shows intermediate results under the names in DESIGN's list of trace points."""

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        """Like ``forward``, calling ``tap(name, float32 (n_tokens, width))`` in execution order."""


@runtime_checkable
class StateAccess(Protocol):
    """Exchanges its state with other backends through the canonical array."""

    def export_state(self, state: State) -> np.ndarray:
        """Float32 ``(n_layer, 5, n_embd)``: rows ffn_x, att_x, aa, bb, pp."""

    def import_state(self, canonical: np.ndarray) -> State:
        """The backend's own state from the canonical array."""


@runtime_checkable
class Generating(Protocol):
    """Has a greedy decoding loop that stays on the device."""

    def greedy(self, token: int, state: State, n: int) -> tuple[np.ndarray, State]:
        """Feed ``token``, then ``n - 1`` times the arg-max: the ``n`` ids chosen, int64, and the state."""


@runtime_checkable
class Batched(Protocol):
    """Runs several sequences in one call, so that weights are read once for all of them."""

    def forward_batch(self, tokens: Sequence[Sequence[int]], states: Any | None) -> tuple[np.ndarray, Any]:
        """Run ``B`` sequences of equal length; ``None`` starts all of them afresh.

        Returns float32 ``(B, n_vocab)``, the last position's logits of each, and new states. The states are opaque,
        of the whole batch, and those passed in are left as they were; the next call has as many sequences.
        """


@runtime_checkable
class Declaring(Protocol):
    """Knows better than ``INFO`` how it computes, since it runs code that the backend did not bring."""

    def declared_arithmetic(self) -> Arithmetic:
        """What is judged by in place of that of ``INFO``; rows call it "declared, unverified"."""


@runtime_checkable
class Closing(Protocol):
    """Holds something that must be given back."""

    def close(self) -> None:
        """Free device memory, threads, files. Called once."""


class BackendModule(Protocol):
    """What :mod:`backends.index` loads: a module, or any object with these names."""

    INFO: BackendInfo

    def load(self, checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
        """A session over ``checkpoint`` stored by ``scheme`` on ``device`` with ``threads`` CPU threads.

        ``threads=None`` is the runtime's own default. Raises Unavailable or Unsupported.
        """
