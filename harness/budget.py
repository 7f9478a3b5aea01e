"""How much memory there is and how much a cell needs, asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil

from reference.config import Config, count_parameters
from reference.weights import Weights

#: Activations, logits and the interpreter with its libraries; torch's share is most of it.
_OVERHEAD_BYTES = 400 << 20


def available_bytes() -> int:
    """Memory that can be used without swapping: the system's figure, or a container's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(0, available)


def needed_bytes(config: Config, weight_bytes: int, source_in_memory: bool) -> int:
    """Estimate for one cell: the backend's weights, the source if it is held in memory, and overhead.

    The parity gate upcasts one matrix at a time to float64, so its share is the largest matrix.
    """
    largest = max(config.n_vocab, config.n_ffn) * config.n_embd
    source = 2 * count_parameters(config) if source_in_memory else 0
    return weight_bytes + source + 8 * largest + _OVERHEAD_BYTES


def hold(weights: Weights) -> Weights:
    """``weights`` upcast to float32 in memory where that takes at most a third of it, else as they are.

    Weights that are dequantized or generated on every read are slow to read twice.
    """
    fits = 4 * count_parameters(weights.config) * 3 <= available_bytes()
    return weights.in_memory(np.float32) if fits else weights
