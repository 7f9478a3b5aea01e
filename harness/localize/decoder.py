"""The matrices of one model, decoded wrongly in every way that is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.localize.hypotheses import Hypothesis
from harness.localize.hypotheses_codes import CHANGES, Change
from harness.localize.hypotheses_products import PRODUCTS, product
from harness.localize.part import Compute, Unknown
from harness.localize.stored_matrix import Stored
from reference.errors import ConfigError
from reference.schemes import Packed, codec_of, get_scheme
from reference.weights import Tensor, Weights

#: Elements of the matrices that are kept.
_HELD_ELEMENTS = 1 << 25


class Decoder:
    """The matrices of one model decoded wrongly; keeps as many as fit, with their steps.

    original, stored  weights before and after the scheme
    """

    def __init__(self, original: Weights, stored: Weights, scheme: str) -> None:
        self._original, self._stored, self._scheme = original, stored, scheme
        self._held: dict[str, Stored] = {}

    def hypotheses(self, points: Sequence[str]) -> list[Hypothesis]:
        """Every change, of the matrix of each of these products alone."""
        return [
            Hypothesis(
                f"{point}: {change.name}", f"{_matrix(point)}: {change.sentence}", {point: self._at(point, change)}
            )
            for point in points
            for change in CHANGES
        ]

    def together(self) -> list[Hypothesis]:
        """Every change, of all matrices of the blocks at once."""
        points = [point for point in PRODUCTS if point != "logits"]
        return [
            Hypothesis(
                f"all matrices: {change.name}",
                f"in every matrix: {change.sentence.replace('its ', 'the matrix’s ', 1)}",
                {point: self._at(point, change) for point in points},
            )
            for change in CHANGES
        ]

    def _at(self, point: str, change: Change) -> Compute:
        if point == "emb":
            return lambda h: h.op.at("emb").residual(self.changed("emb.weight", change).rows(h.past, h.op.dtype))
        source, matrix = PRODUCTS[point]
        return lambda h: product(h, point, h.read(source), self.changed(h.at + matrix, change))

    def changed(self, name: str, change: Change) -> Tensor:
        """A matrix with a change; raises :class:`Unknown` where it cannot be, or changes nothing."""
        stored = self._matrix(name)
        with np.errstate(all="ignore"):
            made = np.asarray(change.make(stored), dtype=np.float32)
        if np.array_equal(made, stored.values):
            raise Unknown(change.name)
        return Tensor.of(np.ascontiguousarray(made))

    def _matrix(self, name: str) -> Stored:
        if name not in self._held:
            while sum(held.values.size for held in self._held.values()) > _HELD_ELEMENTS:
                self._held.pop(next(iter(self._held)))
            values, original = (w[name].array(np.float32) for w in (self._stored, self._original))
            scheme, eight = self._scheme, get_scheme(self._scheme).scheme_class == "int8"
            self._held[name] = Stored(values, original, group_of(scheme, name), signed_steps(scheme), eight)
        return self._held[name]


def group_of(scheme: str, name: str) -> int:
    """Neighbours that share a scale in a tensor of a scheme; 0 where nothing is shared in rows."""
    try:
        kept = codec_of(scheme).format(name)
    except ConfigError:
        return 0
    return kept.packing.group if isinstance(kept, Packed) else 0


def signed_steps(scheme: str) -> int:
    """Of a scheme whose codes reach further on one side: how far; 0 where both sides, or a minimum, are kept."""
    found = get_scheme(scheme)
    lopsided = found.system in ("ggml", "rwkv.cpp", "BigDL") and found.scales in ("f16", "f32") and found.name != "Q8_0"
    return {"int4": 8, "int5": 16}.get(found.scheme_class, 0) if lopsided else 0


def _matrix(point: str) -> str:
    return "emb" if point == "emb" else PRODUCTS[point][1].removesuffix(".weight")
