"""What a checkpoint does not bring back from a file of a format, each in one line."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reference.config import is_matrix
from reference.fr_file import RESCALE
from reference.fr_file import kept_scheme as kept_by_fr
from reference.ggml_file import decay_back, decay_to_file
from reference.weights import Weights

_RUNTIME = {"ggml": "rwkv.cpp", "fr": "faster-rwkv"}


def lost(weights: Weights, format: str, scheme: str | None = None) -> list[str]:
    """What :func:`reference.save_checkpoint` of ``weights`` in ``format`` and ``scheme`` cannot keep.

    Empty where reading the file gives the same tensors again, apart from the types that ``scheme`` asks for.
    """
    return list(_lines(weights, format, scheme))


def _lines(weights: Weights, format: str, scheme: str | None) -> Iterator[str]:
    if format != "hf" and weights.config.rescale_every:
        yield f"{format} has no place for rescale_every {weights.config.rescale_every}; the function is the same"
    if format not in _RUNTIME:
        return
    yield from _decays(weights, format)
    if format == "fr":
        yield "fr stores the embedding after ln0, rounded: emb and ln0 come back as others of the same result"
        if (scheme or kept_by_fr(weights)) == "fp16" and weights.config.n_layer > RESCALE:
            yield (
                f"fr in fp16 divides att.output and ffn.value by 2 after every {RESCALE} layers: of weights"
                " that become subnormal, low bits are lost"
            )
    if any(tensor.stored == "f64" for tensor in weights.values()):
        yield f"{format} has no float64: such tensors are rounded"
    elif scheme is None and any(t.stored == "bf16" for name, t in weights.items() if is_matrix(name)):
        yield f"{format} has no bfloat16: such tensors become float32, of the same values"
    if weights.synthetic or any(not key.startswith(("ggml_", "fr_")) for key in weights.metadata):
        mark = ", nor for the mark that the weights are synthetic" if weights.synthetic else ""
        yield f"{format} has no place for metadata{mark}"


def _decays(weights: Weights, format: str) -> Iterator[str]:
    """Checked by taking every ``time_decay`` there and back."""
    changed, total, furthest = 0, 0, 0.0
    for name, tensor in weights.items():
        if name.endswith(".time_decay"):
            before, after = tensor.array(np.float64), decay_back(decay_to_file(name, tensor)).array(np.float64)
            same = (before == after) | (np.isnan(before) & np.isnan(after))
            with np.errstate(invalid="ignore"):
                furthest = max(furthest, float(np.abs(after - before)[~same].max(initial=0)))
            changed, total = changed + int((~same).sum()), total + before.size
    if changed:
        stores = f"{format} stores -exp(time_decay) in fp32"
        yield f"{stores}: {changed} of {total} decays come back off by up to {furthest:.1g}"
