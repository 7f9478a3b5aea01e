"""How much memory there is and how much a cell needs, asked before anything is loaded."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from harness.hardware import available_bytes
from reference.config import Config, count_parameters
from reference.errors import ConfigError
from reference.schemes import stored_bytes
from reference.weights import Weights

#: Logits, truth and the interpreter with its libraries; torch's share is most of it.
_OVERHEAD_BYTES = 400 << 20

GIB = 1 << 30


def needed_bytes(config: Config, scheme: str, backend: ModuleType, prompt_tokens: int, synthetic: bool) -> int:
    """Estimate for one cell: the backend's weights, synthetic ones that are kept beside, activations, overhead.

    The parity gate upcasts one matrix at a time to float64, so its share is the largest matrix. A
    checkpoint file is mapped, not held. A scheme without a codec here counts as fp32.
    """
    largest = max(config.n_vocab, config.n_ffn) * config.n_embd
    activations = 4 * prompt_tokens * (3 * config.n_ffn + 8 * config.n_embd)
    made = 2 * count_parameters(config)
    source = made if synthetic and keeps(made) else 0
    return _weight_bytes(config, scheme, backend) + source + 8 * largest + activations + _OVERHEAD_BYTES


def shortage(needed: int, device: str, free: int | None = None) -> str | None:
    """Why a cell on ``device`` that needs this many bytes of memory should not start; None if it may.

    ``free`` is what another machine has; ``None``: what this one has now.
    """
    have = available_bytes() if free is None else free
    if device != "cpu" or needed <= have:
        return None
    return f"needs about {needed / GIB:.1f} GiB of memory, {have / GIB:.1f} GiB are free; try a smaller scheme or model"


def keeps(made: int) -> bool:
    """Whether synthetic weights of this many bytes are kept once made: where half the free memory takes them."""
    return 2 * made <= available_bytes()


def hold(weights: Weights) -> Weights:
    """``weights`` upcast to float32 in memory where that takes at most a third of it, else as they are.

    Weights that are dequantized or generated on every read are slow to read twice.
    """
    fits = 4 * count_parameters(weights.config) * 3 <= available_bytes()
    return weights.in_memory(np.float32) if fits else weights


def _weight_bytes(config: Config, scheme: str, backend: ModuleType) -> int:
    """What the backend says it keeps of a scheme, else the scheme's own size."""
    declared = getattr(backend, "resident_bytes", None)
    if declared is not None:
        return int(declared(config, scheme))
    try:
        return stored_bytes(config, scheme)
    except ConfigError:
        return 4 * count_parameters(config)
