"""How much of a machine a figure uses: decode against read bandwidth, prefill against matrix rate.

A decode step must read every weight but the embedding, of which one row; a prefill must multiply by them. So

    decode    bytes of weights per step x steps per second / bytes per second that memory gives
    prefill   operations of the prompt's matrix products per second / operations per second of the matrix units

Above 1 a figure is not of that machine, or its rate was measured under disturbance. The fraction says nothing where
the weights would fit several times into the last-level cache, since then memory is not what is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from reference.config import Config, is_matrix, tensor_shapes
from reference.errors import ConfigError
from reference.schemes import SCHEMES, bytes_read_per_token

#: A model this many times smaller than the last-level cache, or more, is read from there.
FITS = 4


@dataclass(frozen=True)
class Rates:
    """What a machine can do; ``None`` or missing where it is not known.

    read_bytes_per_s   of memory, sequential reads
    flops              type of the factors (``fp32``, ``fp16``, ``bf16``, ``int8``) -> operations per second
    last_level_bytes   size of the outermost cache
    source             ``probe``, or where the figures are published
    """

    read_bytes_per_s: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    last_level_bytes: int | None = None
    source: str = "probe"


def weight_bytes(config: Config, scheme: str, source: str = "f16") -> int | None:
    """Bytes of weights that a decode step reads; ``None`` where the scheme has no codec or does not fit the shapes.

    ``source`` is the stored type of the checkpoint, which ggml's schemes keep for embedding and head.
    """
    if scheme not in SCHEMES or SCHEMES[scheme].codec is None:
        return None
    try:
        return bytes_read_per_token(config, scheme, source)
    except ConfigError:
        return None


def prefill_flops(config: Config, tokens: int) -> float:
    """Operations of the matrix products of one prompt: the blocks for every token, the head for the last one."""
    blocks = sum(
        math.prod(shape)
        for name, shape in tensor_shapes(config).items()
        if name.startswith("blocks.") and is_matrix(name)
    )
    return 2.0 * (tokens * blocks + config.n_vocab * config.n_embd)


def decode_fraction(tokens_per_s: float, step_bytes: int | None, rates: Rates, batch: int = 1) -> float | None:
    """Of the read bandwidth; ``None`` where a part is unknown or the weights stay in the cache.

    ``tokens_per_s`` is of all sequences of the batch together: they share one reading of the weights.
    """
    if step_bytes is None or not rates.read_bytes_per_s:
        return None
    if rates.last_level_bytes is not None and FITS * step_bytes <= rates.last_level_bytes:
        return None
    return tokens_per_s / batch * step_bytes / rates.read_bytes_per_s


def matrix_rate(factors: str, rates: Rates) -> tuple[str, float] | None:
    """The type that products of ``factors`` are held against, and operations per second; ``None`` if not known.

    Half floats can always be multiplied as float32, so their rate is no less than that.
    """
    rate = rates.flops.get(factors)
    if not rate:
        return None
    full = rates.flops.get("fp32", 0.0)
    return ("fp32", full) if factors in ("fp16", "bf16") and full > rate else (factors, rate)


def prefill_fraction(
    tokens_per_s: float, config: Config, prompt: int, factors: str, rates: Rates, step_bytes: int | None = None
) -> float | None:
    """Of the :func:`matrix_rate` for that type of factors; ``None`` as in :func:`decode_fraction`."""
    found = matrix_rate(factors, rates)
    if found is None:
        return None
    if rates.last_level_bytes is not None and step_bytes is not None and FITS * step_bytes <= rates.last_level_bytes:
        return None
    return tokens_per_s / prompt * prefill_flops(config, prompt) / found[1]
