"""A backend in emulated fp16, sums of products and of WKV too: the numpy reference with every result rounded.

``--backend suites/nan/emulated.py``. It fails exactly where the arithmetic does, and its ``adjust`` is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np

from backends.api import BackendInfo, Session, State, Tap, Unsupported
from reference.forward import forward
from reference.mixed import Mixed
from reference.numerics import Arithmetic
from reference.schemes import apply
from reference.weights import Weights

INFO = BackendInfo(
    name="emulated",
    description="the numpy reference in emulated half precision",
    origin="this project, for testing localization",
    devices=("cpu",),
    schemes={
        "fp16": Arithmetic("fp16", "fp16", "fp16", "fp16"),
        "bf16": Arithmetic("bf16", "bf16", "bf16", "bf16"),
    },
)


class EmulatedSession:
    """The reference in one arithmetic, with all that it can show."""

    def __init__(self, weights: Weights, arithmetic: Union[Arithmetic, Mixed]) -> None:  # noqa: UP007 - Python 3.9
        self._weights, self._arithmetic = weights, arithmetic

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        return forward(self._weights, tokens, state, arithmetic=self._arithmetic)

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        return forward(self._weights, tokens, state, arithmetic=self._arithmetic, tap=tap)

    def export_state(self, state: State) -> np.ndarray:
        return np.array(state, dtype=np.float32)

    def import_state(self, canonical: np.ndarray) -> State:
        return np.array(canonical, dtype=np.float32)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session in the scheme's arithmetic."""
    return adjust(checkpoint, scheme, device, threads, {})


def adjust(checkpoint: Weights, scheme: str, device: str, threads: int | None, change: Mapping[str, Any]) -> Session:
    """The same with some trace points in float32, or rescaled."""
    unknown = set(change) - {"fp32", "rescale_every"}
    if unknown:
        raise Unsupported(f"emulated cannot change {', '.join(sorted(unknown))}")
    exceptions = tuple((str(pattern), Arithmetic()) for pattern in change.get("fp32", ()))
    arithmetic = Mixed(INFO.schemes[scheme], exceptions, int(change.get("rescale_every", 0)))
    return EmulatedSession(apply(checkpoint, scheme).in_memory(np.float32), arithmetic)
