"""The numpy reference behind the contract: the backend that every other one is compared with.

Its schemes differ in how the weights are kept: ``fp32`` upcasts them once, ``fp16``, ``bf16`` and ``FP16``
keep them as stored and upcast each matrix as it is used (half the memory, slower), the quantized
ones dequantize once. The arithmetic is float32 throughout, whatever the storage.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from backends.api import BackendInfo, Session, State, Tap, Unavailable, Unsupported
from reference.config import Config, count_parameters
from reference.forward import forward
from reference.numerics import Arithmetic
from reference.schemes import SCHEMES, apply
from reference.weights import Tensor, Weights

INFO = BackendInfo(
    name="numpy",
    description="the readable fp32 reference, numpy only",
    origin="this project, reference/forward.py",
    devices=("cpu",),
    schemes={name: Arithmetic() for name, scheme in SCHEMES.items() if scheme.codec is not None},
    usual=("fp32", "fp16", "bf16", "q8f16_1", "q4f16_1", "Q8_0", "Q4_0"),  # the others cost and show the same
)

#: Kept in half precision, and upcast matrix by matrix as they are used.
_AS_STORED = ("fp16", "bf16", "FP16")


def version() -> str:
    """Version of numpy, which does the work."""
    return np.__version__


def resident_bytes(config: Config, scheme: str) -> int:
    """Bytes of weights while computing: fp16 and bf16 stay as they are, all else is float32."""
    return count_parameters(config) * (2 if scheme in _AS_STORED else 4)


class NumpySession:
    """A :class:`backends.api.Session` with every optional capability that needs no device."""

    def __init__(self, weights: Weights, limit: Any) -> None:
        self._weights = weights
        self._limit = limit

    def forward(self, tokens: Sequence[int], state: State | None) -> tuple[np.ndarray, State]:
        return forward(self._weights, tokens, state)

    def logits(self, tokens: Sequence[int], state: State | None) -> np.ndarray:
        return forward(self._weights, tokens, state, all_logits=True)[0]

    def forward_batch(self, tokens: Sequence[Sequence[int]], states: Any | None) -> tuple[np.ndarray, Any]:
        """One sequence after the other: what a batch must give, not how fast it can be."""
        pasts = [None] * len(tokens) if states is None else states
        found = [forward(self._weights, row, past) for row, past in zip(tokens, pasts)]
        return np.stack([logits for logits, _ in found]), [state for _, state in found]

    def trace(self, tokens: Sequence[int], state: State | None, tap: Tap) -> tuple[np.ndarray, State]:
        return forward(self._weights, tokens, state, tap=tap)

    def export_state(self, state: State) -> np.ndarray:
        return np.array(state, dtype=np.float32)

    def import_state(self, canonical: np.ndarray) -> State:
        return np.array(canonical, dtype=np.float32)

    def close(self) -> None:
        if self._limit is not None:
            self._limit.restore_original_limits()


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> Session:
    """A session whose matrix products use ``threads`` threads of the BLAS that numpy is linked with."""
    if device != "cpu":
        raise Unsupported(f"numpy runs on cpu, not on {device!r}")
    stored = apply(checkpoint, scheme)
    # fp16 and bf16 stay as stored, read once: a checkpoint of another type is not converted at every use.
    kept = stored.map(lambda name, tensor: Tensor.of(tensor.read(), tensor.stored))
    weights = kept if scheme in _AS_STORED else stored.in_memory(np.float32)
    return NumpySession(weights, _limit_threads(threads))


def _limit_threads(threads: int | None) -> Any:
    """What holds numpy's BLAS to ``threads``; ``None`` for its own default."""
    if threads is None:
        return None
    try:
        from threadpoolctl import threadpool_info, threadpool_limits
    except ImportError:
        # On somebody's host there may be numpy alone: a worker's pools are sized by its environment variables.
        if os.environ.get("OPENBLAS_NUM_THREADS") == str(threads):
            return None
        raise Unavailable("threadpoolctl is not installed", "pip install threadpoolctl") from None
    limit = threadpool_limits(threads, user_api="blas")
    pools = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    if pools - {threads}:
        limit.restore_original_limits()
        raise Unsupported(f"numpy's BLAS runs {max(pools)} threads where {threads} were asked for")
    return limit
