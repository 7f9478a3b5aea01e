"""Stored matrices on the device, and the product of each with one vector or many."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from backends.triton_cuda.kernels_gemm import dequantize, gemm_packed
from backends.triton_cuda.kernels_gemv import gemv
from backends.triton_cuda.tiles import Tile, dequantize_tile, gemm_tile, gemv_tile
from backends.triton_cuda.types import OPTIONS, TRITON

#: Up to so many rows a packed matrix is dequantized inside its product, above as a whole before it: a product of R
#: rows does 2 R operations a weight, dequantizing before it moves 4 bytes of one (written, read) instead of half one.
FUSED_ROWS = 64


@dataclass(frozen=True)
class Matrix:
    """``(results, columns)``: floats, or int32 words of packed codes with float16 scales in groups of 32.

    Layout NK: ``data (results, stride)``; KN: ``data (words, stride)``, results side by side.
    """

    data: Tensor
    results: int
    columns: int
    scales: Tensor | None = None
    bits: int = 0
    kn: bool = False

    def rows(self, first: int, count: int) -> Matrix:
        """Some of its results, without a copy."""
        some = (slice(None), slice(first, first + count)) if self.kn else (slice(first, first + count),)
        scales = None if self.scales is None else self.scales[some]
        return replace(self, data=self.data[some], scales=scales, results=count)

    @property
    def strides(self) -> tuple[int, int]:
        """Of words or floats, and of scales."""
        return self.data.stride(0), 0 if self.scales is None else self.scales.stride(0)

    @property
    def read_bytes(self) -> int:
        """Bytes that a product reads of it."""
        parts = [self.data] if self.scales is None else [self.data, self.scales]
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def vector(self) -> int:
        """Elements of a vector as :func:`vector_product` takes it: padded to whole groups if the matrix is packed."""
        return -(-self.columns // 32) * 32 if self.bits else self.columns

    def vectors(self, count: int, dtype: torch.dtype) -> Tensor:
        """``(count, vector)`` of zeros for such vectors; those for a packed matrix are float32."""
        kind = torch.float32 if self.bits else dtype
        return torch.zeros(count, self.vector, dtype=kind, device=self.data.device)

    def placed(self, x: Tensor) -> Tensor:
        """A vector ``(columns)`` as :func:`vector_product` takes it, by torch; kernels make theirs so at once."""
        if not self.bits:
            return x
        codes = 32 // self.bits
        out = self.vectors(1, x.dtype)[0]
        out[: self.columns] = x
        exponents = 127 - torch.arange(codes, dtype=torch.int32, device=x.device) * self.bits % 16
        return (out.view(-1, codes) * (exponents << 23).view(torch.float32)).t().reshape(-1)

    def tile(self, results: int) -> Tile:
        """Tile of a product of so many of its results with one vector."""
        return gemv_tile(results, self.columns, self.bits, self.kn, self.data.element_size())


def vector_product(
    matrix: Matrix, x: Tensor, out: Tensor, gate: Tensor | None = None, *, made: torch.dtype, add: bool = False
) -> None:
    """``matrix`` times ``x (vector)``, rounded to ``made``, -> ``out``; or ``out += gate * product``.

    ``x`` lies as :meth:`Matrix.placed` has it.
    """
    tile = matrix.tile(matrix.results)
    gemv[(triton.cdiv(matrix.results, tile.rows),)](
        matrix.data, matrix.scales, x, out, gate, matrix.results, matrix.columns, *matrix.strides,
        ADD=add, GATED=gate is not None, MADE=TRITON[made], BITS=matrix.bits, KN=matrix.kn,
        BN=tile.rows, BK=tile.columns, num_warps=tile.warps, **OPTIONS,
    )  # fmt: skip


def product(matrix: Matrix, x: Tensor, made: torch.dtype) -> Tensor:
    """``x (rows, columns)`` times ``matrix`` transposed -> ``(rows, results)`` of the type ``made``."""
    if len(x) == 1:
        out = torch.empty(1, matrix.results, dtype=made, device=x.device)
        vector_product(matrix, matrix.placed(x[0]), out, made=made)
        return out
    if not matrix.bits:
        return _gemm(x, matrix.data, made)
    if len(x) <= FUSED_ROWS:
        return _packed_product(matrix, x, made)
    return _gemm(x, unpacked(matrix, x.dtype), made)


def unpacked(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The dequantized matrix ``(results, columns)``, in the memory order of its layout."""
    shape = (matrix.columns, matrix.results) if matrix.kn else (matrix.results, matrix.columns)
    out = torch.empty(shape, dtype=dtype, device=matrix.data.device)
    steps = (1, matrix.results) if matrix.kn else (matrix.columns, 1)
    rows, columns = dequantize_tile(matrix.kn)
    dequantize[(triton.cdiv(matrix.results, rows), triton.cdiv(matrix.columns, columns))](
        matrix.data, matrix.scales, out, matrix.results, matrix.columns, *matrix.strides, *steps,
        BITS=matrix.bits, KN=matrix.kn, BN=rows, BK=columns, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out.t() if matrix.kn else out


def _packed_product(matrix: Matrix, x: Tensor, made: torch.dtype) -> Tensor:
    rows = len(x)
    out = torch.empty(rows, matrix.results, dtype=made, device=x.device)
    bm, bn, bk, warps = gemm_tile(rows, -(-matrix.columns // 32) * matrix.bits, matrix.kn)
    gemm_packed[(triton.cdiv(matrix.results, bn), triton.cdiv(rows, bm))](
        matrix.data, matrix.scales, x, out, rows, matrix.results, matrix.columns, *matrix.strides,
        BITS=matrix.bits, KN=matrix.kn, BM=bm, BN=bn, BK=bk, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return out


def _gemm(x: Tensor, weight: Tensor, made: torch.dtype) -> Tensor:
    """Sums in float32, rounded once to ``made``."""
    if x.device.type == "cpu":  # interpreted: torch has no product of halves with a float32 result there
        return F.linear(x.float(), weight.float()).to(made)
    return F.linear(x, weight) if made == x.dtype else torch.mm(x, weight.t(), out_dtype=made)
