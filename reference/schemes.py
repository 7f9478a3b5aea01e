"""Quantization schemes: how weights are stored, and what they are worth once stored that way.

A scheme is a name (its own system's), a class by which tables align systems, and a codec, which
says in which format each kind of tensor is kept. The list is in :mod:`reference.scheme_list`, the
formats are in :mod:`reference.stored_formats`; both are offered here.

Rule for NaN and Inf: they are never lost (:mod:`reference.stored_formats`).
"""

from __future__ import annotations

import difflib

from reference.config import Config, tensor_shapes
from reference.errors import ConfigError
from reference.scheme_list import BF16, F16, F32, SCHEME_CLASSES, SCHEMES, SOURCE, Scheme
from reference.stored_formats import Codec, Convert, Floats, Format, Packed, Packing
from reference.weights import Weights

__all__ = [
    "BF16",
    "F16",
    "F32",
    "SCHEMES",
    "SCHEME_CLASSES",
    "SOURCE",
    "Codec",
    "Convert",
    "Floats",
    "Format",
    "Packed",
    "Packing",
    "Scheme",
    "apply",
    "bytes_read_per_token",
    "codec_of",
    "get_scheme",
    "scheme_names",
    "stored_bytes",
]


def get_scheme(name: str) -> Scheme:
    """The scheme of a name; raises :class:`ConfigError` with the nearest and all names."""
    if name in SCHEMES:
        return SCHEMES[name]
    folded = {known.lower(): known for known in reversed(SCHEMES)}  # fp16 before rwkv.cpp's FP16
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    raise ConfigError(f"no scheme {name!r}; {hint}schemes: {', '.join(SCHEMES)}")


def scheme_names(scheme_class: str | None = None) -> list[str]:
    """Names of all schemes, or of those of a class; raises :class:`ConfigError` for an unknown class."""
    if scheme_class is not None and scheme_class not in SCHEME_CLASSES:
        raise ConfigError(f"no scheme class {scheme_class!r}; classes: {', '.join(SCHEME_CLASSES)}")
    return [name for name, scheme in SCHEMES.items() if scheme_class in (None, scheme.scheme_class)]


def codec_of(scheme: str | Scheme) -> Codec:
    """The codec of a scheme; raises :class:`ConfigError` for an unknown scheme, or one without a codec."""
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    if scheme.codec is None:
        raise ConfigError(f"scheme {scheme.name} has no codec here; its weights are known to its own system only")
    return scheme.codec


def apply(weights: Weights, scheme: str | Scheme) -> Weights:
    """The weights that a correct backend of ``scheme`` computes with.

    Every tensor is converted as it is read, and again when it is read again: hold the result with
    :meth:`Weights.in_memory` to compute with it more than once. Raises :class:`ConfigError` for an
    unknown scheme, one without a codec, or a group that does not divide a row.
    """
    codec = codec_of(scheme)
    return weights.map(lambda name, tensor: codec.format(name).keep(name, tensor))


def stored_bytes(config: Config, scheme: str | Scheme, source: str = "f16") -> int:
    """Bytes of all tensors of a checkpoint packed by ``scheme``, names and headers left out.

    ``source`` is the stored type of the checkpoint that is quantized; only schemes that leave some
    tensors as they are (ggml's) depend on it.
    """
    codec = codec_of(scheme)
    return sum(codec.format(name).nbytes(name, shape, source) for name, shape in tensor_shapes(config).items())


def bytes_read_per_token(config: Config, scheme: str | Scheme, source: str = "f16") -> int:
    """Bytes of weights that one decode step must read: all but the embedding, and one row of that."""
    embedding, name = codec_of(scheme).embedding, "emb.weight"
    matrix = embedding.nbytes(name, (config.n_vocab, config.n_embd), source)
    return stored_bytes(config, scheme, source) - matrix + embedding.nbytes(name, (1, config.n_embd), source)
