"""The kernels that :mod:`backends.tvm_mlc.graph` asks for, for CPUs."""

from backends.tvm_mlc.products_cpu import product
from backends.tvm_mlc.rows_cpu import embed, last_row, layer_norm, mix, softmax, wkv

__all__ = ["embed", "last_row", "layer_norm", "mix", "product", "softmax", "wkv"]
