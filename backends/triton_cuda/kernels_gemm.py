"""What a prompt needs beside cuBLAS: packed matrices, inputs kept in float16's range, and the gated addition."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize(
    matrix, scales, out, results, columns, stride, scale_stride, out_row, out_column,
    BITS: tl.constexpr, KN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``(code - zero) * scale`` of a packed matrix -> ``out``, with strides of its own; layouts as in kernels_gemv."""
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BK + tl.arange(0, BK)).to(tl.int64)[None, :]
    mask = (rows < results) & (cols < columns)
    word, group = cols // (32 // BITS), cols // 32
    if KN:
        packed = tl.load(matrix + word * stride + rows, mask=mask, other=0)
        scale = tl.load(scales + group * scale_stride + rows, mask=mask, other=0.0)
    else:
        packed = tl.load(matrix + rows * stride + word, mask=mask, other=0)
        scale = tl.load(scales + rows * scale_stride + group, mask=mask, other=0.0)
    code = (packed >> ((cols % (32 // BITS)) * BITS).to(tl.int32)) & (2**BITS - 1)
    value = (code.to(tl.float32) - (2 ** (BITS - 1) - 1)) * scale.to(tl.float32)
    tl.store(out + rows * out_row + cols * out_column, value, mask=mask)


@triton.jit
def gemm_packed(
    matrix, scales, x, out, rows, results, columns, stride, scale_stride,
    BITS: tl.constexpr, KN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``x (rows, columns)`` float16 times a packed matrix transposed -> ``out (rows, results)``; sums in float32.

    Tiles of BK words: the codes at place j of every word meet every (32 / BITS)-th column of x in one product.
    """
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    lanes = tl.arange(0, BK)
    words = (columns + 31) // 32 * BITS
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, words, BK):
        word = start + lanes
        mask = (word < words)[:, None] & (n < results)
        at = word.to(tl.int64)[:, None]
        if KN:
            packed = tl.load(matrix + at * stride + n, mask=mask, other=0)
            scale = tl.load(scales + at // BITS * scale_stride + n, mask=mask, other=0.0)
        else:
            packed = tl.load(matrix + n * stride + at, mask=mask, other=0)
            scale = tl.load(scales + n * scale_stride + at // BITS, mask=mask, other=0.0)
        for j in tl.static_range(32 // BITS):
            cols = word * (32 // BITS) + j
            a = tl.load(x + m * columns + cols[None, :], mask=(m < rows) & (cols < columns)[None, :], other=0.0)
            code = ((packed >> (j * BITS)) & (2**BITS - 1)) | 0x6400  # 1024 + code as float16
            w = (code.to(tl.uint16).to(tl.float16, bitcast=True) - (1024.0 + 2 ** (BITS - 1) - 1)) * scale
            acc = tl.dot(a, w.to(tl.float16), acc)
    tl.store(out + m * results + n, acc, mask=(m < rows) & (n < results))


@triton.jit
def square(k, squared, factors, width, rows, LIMITED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """relu(k)^2 of ``k (rows, F)`` -> ``squared``; LIMITED: divided by the row's factor, a power of two.

    The factor is 1 until a row would leave float16; the product that reads it is multiplied by ``factors (rows)``.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = row[:, None] * width
    inside = (row < rows)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    inverse = tl.full([ROWS], 1.0, dtype=tl.float32)
    if LIMITED:
        largest = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            cols = start + lanes
            x = tl.load(k + at + cols, mask=inside & (cols < width), other=0.0).to(tl.float32)
            largest = tl.maximum(largest, x)
        top = tl.max(largest, axis=1)
        power = tl.maximum(tl.ceil(tl.log2(tl.maximum(top * top, 1.0)) - 15.0), 0.0)
        inverse = tl.exp2(-power)
        tl.store(factors + row, tl.exp2(power), mask=row < rows)
    for start in range(0, width, BLOCK):
        cols = start + lanes
        x = tl.load(k + at + cols, mask=inside & (cols < width), other=0.0).to(tl.float32)
        x = tl.where(x > 0, x, x * 0)  # NaN stays NaN
        tl.store(squared + at + cols, x * x * inverse[:, None], mask=inside & (cols < width))


@triton.jit
def fit(x, out, factors, width, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``x (rows, C)`` divided by the row's factor as in :func:`square` -> ``out``; a program holds whole rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (cols < width)
    at = row[:, None] * width + cols
    value = tl.load(x + at, mask=inside, other=0.0)
    top = tl.max(tl.abs(value), axis=1)
    power = tl.maximum(tl.ceil(tl.log2(tl.maximum(top, 1.0)) - 15.0), 0.0)
    tl.store(factors + row, tl.exp2(power), mask=row < rows)
    tl.store(out + at, value * tl.exp2(-power)[:, None], mask=inside)


@triton.jit
def add_gated(
    x, r, v, factors, width, rows,
    LIMITED: tl.constexpr, MADE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x (rows, C) += sigmoid(r) * v``, v times its row's factor where LIMITED."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (cols < width)
    at = row * width + cols
    gate = tl.load(r + at, mask=mask, other=0.0).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-gate))).to(MADE).to(tl.float32)
    y = tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
    if LIMITED:
        y *= tl.load(factors + row, mask=row < rows, other=0.0)
    y = (gate * y).to(MADE).to(tl.float32)
    tl.store(x + at, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + y, mask=mask)
