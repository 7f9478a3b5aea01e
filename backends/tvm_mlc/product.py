"""A matrix product as the graph asks for it, whatever target computes it."""

from __future__ import annotations

from dataclasses import dataclass

from backends.tvm_mlc.storage import Kept
from backends.tvm_mlc.tir_text import Buffer, Size

#: What happens to each output -> the rows it takes besides.
FINISHES = {"plain": (), "square": (), "add": ("x0",), "gate": ("x0", "r0")}


@dataclass(frozen=True)
class Product:
    """What is multiplied, and what happens to each output.

    finish   ``plain``; ``square`` of what is positive; ``add`` x0; ``gate``: x0 + sigmoid(r0) times it
    halve    then halve it (``rescale_every``)
    """

    n: int
    k: int
    how: Kept
    dtype: str
    out: str
    finish: str = "plain"
    halve: bool = False

    def inputs(self, rows: Size) -> list[Buffer]:
        """``x (rows, K)``, then the matrix ``w``, or its codes ``q`` and scales ``s``, then what ``finish`` takes."""
        how = self.how
        parts = [("w", how.dtype, (self.n, self.k))]
        if how.bits:
            parts = [("q", "uint32", (self.n, how.words(self.k))), ("s", how.dtype, (self.n, how.groups(self.k)))]
        matrix = [Buffer(b, shape[::-1] if how.layout == "KN" else shape, dtype) for b, dtype, shape in parts]
        more = [Buffer(b, (rows, self.n), self.dtype) for b in FINISHES[self.finish]]
        return [Buffer("x", (rows, self.k), self.dtype), *matrix, *more]

    def output(self, rows: Size) -> Buffer:
        """``y (rows, N)``."""
        return Buffer("y", (rows, self.n), self.out)
