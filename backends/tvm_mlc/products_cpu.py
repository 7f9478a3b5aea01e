"""Matrix products for CPUs: ``x (rows, K)`` by a matrix of N outputs, in float32 inside."""

from __future__ import annotations

from backends.tvm_mlc import gemm_cpu, gemv_cpu
from backends.tvm_mlc.product import Product
from backends.tvm_mlc.tir_text import Kernel, Size, kernel


def product(name: str, rows: Size, what: Product) -> Kernel:
    """``x (rows, K)``, the matrix (codes and scales), and what ``finish`` takes -> ``y (rows, N)``."""
    of = gemv_cpu if rows == 1 else gemm_cpu
    body = of.rows_of_matrix if what.how.layout == "NK" else of.columns_of_matrix
    return kernel(name, what.inputs(rows), [what.output(rows)], body(what))
