"""Embedding, LayerNorm and token shift: a program holds ROWS rows in registers, on a GPU one.

Symbols and shapes as in :mod:`reference.forward`. ``rows`` is batch times T, sequence after sequence. Pointers decide
the types that results are rounded to when they are stored; everything between is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backends.triton_cuda.kernels_gemv import place, placed


@triton.jit
def layer_norm(x, weight, bias, cols, inside, width, eps):
    """LayerNorm of rows ``x (ROWS, BLOCK)``; zero beyond ``width``."""
    mean = tl.sum(x, axis=1)[:, None] / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / width
    w = tl.load(weight + cols, mask=inside, other=0.0)
    b = tl.load(bias + cols, mask=inside, other=0.0)
    return centred / tl.sqrt(variance + eps) * w + b


@triton.jit
def embed_norm(
    ids, table, scales, weight, bias, x, raw, width, groups, rows, eps,
    BITS: tl.constexpr, TRACE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ln0`` of the embedding of ``ids (rows)`` -> ``x (rows, C)``; ``raw`` takes the embedding itself.

    BITS 0: ``table (V, C)`` of floats; else packed words ``(V, groups * BITS)`` and ``scales (V, groups)``.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < width
    mask = (row < rows) & inside
    token = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    if BITS == 0:
        value = tl.load(table + token * width + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        word = tl.load(table + token * groups * BITS + cols // (32 // BITS), mask=mask, other=0)
        code = (word >> ((cols % (32 // BITS)) * BITS)) & (2**BITS - 1)
        scale = tl.load(scales + token * groups + cols // 32, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, (code.to(tl.float32) - (2 ** (BITS - 1) - 1)) * scale, 0.0)
    if TRACE:
        tl.store(raw + row * width + cols, value, mask=mask)
    tl.store(x + row * width + cols, layer_norm(value, weight, bias, cols, inside, width, eps), mask=mask)


@triton.jit
def norm_mix(
    x, past, after, weight, bias, mu, mixed, normed, width, length, rows, vector, state_stride, eps,
    BITS: tl.constexpr, MIXES: tl.constexpr, SINGLE: tl.constexpr, TRACE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerNorm of ``x (rows, C)``, shifted by one token and mixed -> ``mixed (MIXES, rows, vector)``.

    ``past``, ``after``: the state's row of this sequence before and after, ``state_stride`` apart from one sequence to
    the next; they may be the same where ``length`` is 1 (SINGLE). ``normed (rows, C)`` takes the LayerNorm itself.
    BITS: of the packed matrix that is multiplied by one row of ``mixed``; 0: each row lies in its own order.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < width
    mask = (row < rows) & inside
    sequence, t = row // length, row % length
    value = tl.load(x + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    h = layer_norm(value, weight, bias, cols, inside, width, eps)
    before = tl.load(past + sequence * state_stride + cols, mask=mask & (t == 0), other=0.0)
    if not SINGLE:
        earlier = tl.load(x + (row - 1) * width + cols, mask=mask & (t > 0), other=0.0).to(tl.float32)
        before = tl.where(t > 0, layer_norm(earlier, weight, bias, cols, inside, width, eps), before)
    tl.store(after + sequence * state_stride + cols, h, mask=mask & (t == length - 1))
    if TRACE:
        tl.store(normed + row * width + cols, h, mask=mask)
    for j in tl.static_range(MIXES):
        m = tl.load(mu + j * width + cols, mask=inside, other=0.0)
        made = placed(before + (h - before) * m, cols, BITS)
        tl.store(mixed + (j * rows + row) * vector + place(cols, vector * BITS // 32, BITS), made, mask=mask)


@triton.jit
def norm(
    x, weight, bias, out, width, rows, vector, eps,
    BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerNorm of ``x (rows, C)`` -> ``out (rows, vector)``; BITS as in :func:`norm_mix`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < width
    mask = (row < rows) & inside
    value = tl.load(x + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    made = placed(layer_norm(value, weight, bias, cols, inside, width, eps), cols, BITS)
    tl.store(out + row * vector + place(cols, vector * BITS // 32, BITS), made, mask=mask)
