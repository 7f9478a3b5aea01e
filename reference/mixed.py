"""An arithmetic that differs from one operation to another, and a residual stream that is halved on its way.

What runtimes do against overflow in fp16, and what :mod:`harness.localize` tries: this operation in fp32, these
layers in fp32, ``rescale_every`` as in ChatRWKV and transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from reference.numerics import Arithmetic, Emulated, Op

#: What is kept divided where the stream is: the outputs of both halves of a block, and the stream.
_RESCALED = ("att.out", "att.residual", "ffn.v", "ffn.out", "ffn.residual")


@dataclass(frozen=True)
class Mixed:
    """One arithmetic, and others for the trace points that match a pattern.

    usual          where nothing else is said
    exceptions     (pattern, arithmetic): shell patterns of trace points (``blocks.3.ffn.k2``, ``*.att.residual``,
                   ``blocks.[45].*``); the first that matches counts
    rescale_every  halve the stream after every so many layers, and what is added to it alike: in layer i they are
                   kept divided by ``2 ** (i // rescale_every)``, exactly as with weights divided by it; 0: never
    """

    usual: Arithmetic
    exceptions: tuple[tuple[str, Arithmetic], ...] = ()
    rescale_every: int = 0

    @property
    def activations(self) -> str:
        """Type of most results."""
        return self.usual.activations

    def __str__(self) -> str:
        parts = [str(self.usual), *(f"{pattern} in {arithmetic}" for pattern, arithmetic in self.exceptions)]
        return ", ".join([*parts, *([f"rescale_every {self.rescale_every}"] if self.rescale_every else [])])

    def of(self, point: str) -> Arithmetic:
        """The arithmetic of one trace point."""
        return next((other for pattern, other in self.exceptions if fnmatchcase(point, pattern)), self.usual)

    def unit(self, point: str) -> float:
        """What the values of one trace point are kept divided by."""
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", point)
        if not self.rescale_every or not found or found[2] not in _RESCALED:
            return 1.0
        return float(2 ** (int(found[1]) // self.rescale_every))


def emulated(arithmetic: Arithmetic | Mixed, seed: int = 0) -> Op:
    """One draw of an arithmetic; see :class:`reference.numerics.Emulated`."""
    return Emulated(arithmetic, seed) if isinstance(arithmetic, Arithmetic) else _EmulatedMixed(arithmetic, seed)


class _EmulatedMixed(Emulated):
    """Hands out one :class:`Emulated` for each arithmetic and unit that occurs."""

    def __init__(self, mixed: Mixed, seed: int) -> None:
        super().__init__(mixed.usual, seed)
        self._mixed, self._seed = mixed, seed
        self._drawn_for: dict[tuple[Arithmetic, float], Op] = {}

    def at(self, point: str, /) -> Op:
        key = self._mixed.of(point), self._mixed.unit(point)
        if key not in self._drawn_for:
            self._drawn_for[key] = Emulated(key[0], self._seed + len(self._drawn_for) * (self._seed > 0), key[1])
        return self._drawn_for[key]
