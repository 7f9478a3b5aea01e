"""How much memory there is, on the host and on a device, and how much a cell needs, asked before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType

import numpy as np

from harness.card import Card
from harness.hardware import available_bytes
from reference.config import Config, count_parameters, preset, preset_names
from reference.errors import ConfigError
from reference.schemes import stored_bytes
from reference.weights import Weights

#: Logits, truth and the interpreter with its libraries; torch's share is most of it.
_OVERHEAD_BYTES = 400 << 20

#: What a CUDA context, loaded kernels and cuBLAS's workspace take on a card.
_CONTEXT_BYTES = 700 << 20

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


def beside_bytes(config: Config, batch: int, tokens: int) -> int:
    """What sequences take beyond the first: a state before and after the call, logits, activations of ``tokens``."""
    each = 10 * config.n_layer * config.n_embd + config.n_vocab + tokens * (3 * config.n_ffn + 8 * config.n_embd)
    return 4 * (batch - 1) * each


def device_bytes(config: Config, scheme: str, backend: ModuleType, prompt_tokens: int) -> int:
    """Estimate for one cell on its device: the backend's own, else weights as it keeps them, activations, a context."""
    declared = getattr(backend, "device_bytes", None)
    if declared is not None:
        with suppress(ConfigError):  # groups that do not divide a row: the backend will say so
            return int(declared(config, scheme))
    activations = 4 * prompt_tokens * (3 * config.n_ffn + 8 * config.n_embd)
    return _weight_bytes(config, scheme, backend) + activations + _CONTEXT_BYTES


def device_shortage(
    config: Config, scheme: str, backend: ModuleType, prompt_tokens: int, device: str, card: Card | None, batch: int = 1
) -> str | None:
    """Why a cell does not fit on its card, and what would; ``None`` if it does, or nobody tells what is free."""
    if card is None or card.free_bytes is None:
        return None
    free = card.free_bytes
    needed = _batch_bytes(config, scheme, backend, prompt_tokens, batch)
    if needed <= free:
        return None
    total = "" if card.total_bytes is None else f" of {card.total_bytes / GIB:.1f}"
    return (
        f"needs about {needed / GIB:.1f} GiB on {device} ({card.name}), {free / GIB:.1f}{total} GiB are free; "
        + _would_fit(config, scheme, backend, prompt_tokens, batch, free)
    )


def _batch_bytes(config: Config, scheme: str, backend: ModuleType, prompt_tokens: int, batch: int) -> int:
    """Of ``batch`` sequences; who declares ``device_bytes`` runs their prompts in pieces of one size."""
    tokens = 1 if hasattr(backend, "device_bytes") else prompt_tokens
    return device_bytes(config, scheme, backend, prompt_tokens) + beside_bytes(config, batch, tokens)


def _would_fit(config: Config, scheme: str, backend: ModuleType, prompt_tokens: int, batch: int, free: int) -> str:
    """Schemes of the backend for this model, else the largest shape in the scheme, that take at most ``free``."""

    def fits(shape: Config, kept: str) -> bool:
        try:
            return _batch_bytes(shape, kept, backend, prompt_tokens, batch) <= free
        except ConfigError:  # groups that do not divide a row of this model
            return False

    schemes = [kept for kept in backend.INFO.schemes if kept != scheme and fits(config, kept)]
    if schemes:
        return f"{', '.join(schemes)} would fit"
    shapes = {name: preset(name) for name in preset_names()}
    fitting = [name for name, shape in shapes.items() if shape.n_vocab == config.n_vocab and fits(shape, scheme)]
    if not fitting:
        return "no other scheme and no smaller shape would fit"
    return f"in {scheme}, {max(fitting, key=lambda name: count_parameters(shapes[name]))} would fit"


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
