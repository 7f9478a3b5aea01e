"""Products of a matrix with one vector, dequantized as it is read, and what follows each in the same kernel.

A program makes BN results. It reads BN rows in tiles of BK columns (BITS 0: floats), or of BK words of packed codes,
and adds up in float32: every lane its own columns, then the lanes. Codes become floats without a conversion: put into
the mantissa of 2^23 they are ``2^23 + code * 2^shift``, from which ``2^23 + zero * 2^shift`` is taken exactly. The
power of two that is left is taken from the vector where it is made (:func:`placed`), and its elements lie there in the
order in which codes come out of neighbouring words (:func:`place`), float32 and padded with zeros to whole groups:
16-byte loads, and no lane needs what another has loaded. With floats a vector lies in its own order.

Layouts: NK, rows of ``stride`` floats or words; KN (packed only), the transpose, ``stride`` results apart.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(cols, words, BITS: tl.constexpr):
    """Where an element lies of a vector that meets rows of ``words`` words: first those of every word's first code."""
    return cols if BITS == 0 else cols % (32 // BITS) * words + cols // (32 // BITS)


@triton.jit
def placed(value, cols, BITS: tl.constexpr):
    """What lies there: the element divided by the power of two that its code keeps."""
    if BITS != 0:
        exponent = 127 - cols % (32 // BITS) * BITS % 16
        value *= (exponent << 23).to(tl.float32, bitcast=True)
    return value


@triton.jit
def rows_dot(
    matrix, scales, x, rows, valid, columns, stride, scale_stride,
    BITS: tl.constexpr, KN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``rows (BN)`` of the matrix times ``x`` -> float32 ``(BN)``; rows that are not ``valid`` give 0."""
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    lanes = tl.arange(0, BK)[None, :]
    at_row = rows[:, None]
    if BITS == 0:
        for start in range(0, columns, BK):
            cols = start + lanes
            mask = valid[:, None] & (cols < columns)
            w = tl.load(matrix + at_row * stride + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            v = tl.load(x + cols, mask=cols < columns, other=0.0)
            acc += w.to(tl.float32) * v.to(tl.float32)
    else:
        words = (columns + 31) // 32 * BITS  # groups of 32 codes
        for start in range(0, words, BK):
            word = start + lanes
            mask = valid[:, None] & (word < words)
            if KN:
                at, scale_at = word * stride + at_row, word // BITS * scale_stride + at_row
            else:
                at, scale_at = at_row * stride + word, at_row * scale_stride + word // BITS
            low = tl.load(matrix + at, mask=mask, other=0, eviction_policy="evict_first")
            scale = tl.load(scales + scale_at, mask=mask, other=0.0)
            high = low >> 16
            part = tl.zeros([BN, BK], dtype=tl.float32)
            for j in tl.static_range(32 // BITS):
                v = tl.load(x + j * words + word, mask=word < words, other=0.0)
                bits = low if j * BITS < 16 else high
                code = (bits & ((2**BITS - 1) << (j * BITS % 16))) | 0x4B000000
                value = code.to(tl.float32, bitcast=True) - (8388608.0 + (2 ** (BITS - 1) - 1) * (1 << j * BITS % 16))
                part += value * v
            acc += part * scale.to(tl.float32)
    return tl.sum(acc, axis=1)


@triton.jit
def gemv(
    matrix, scales, x, out, gate, results, columns, stride, scale_stride,
    ADD: tl.constexpr, GATED: tl.constexpr, MADE: tl.constexpr,
    BITS: tl.constexpr, KN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``matrix (results, columns)`` times ``x`` -> ``out``: stored, or added to it (ADD), times ``gate`` (GATED)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    valid = rows < results
    y = rows_dot(matrix, scales, x, rows, valid, columns, stride, scale_stride, BITS, KN, BN, BK)
    y = y.to(MADE).to(tl.float32)
    if GATED:
        y = (y * tl.load(gate + rows, mask=valid, other=0.0).to(tl.float32)).to(MADE).to(tl.float32)
    if ADD:
        y += tl.load(out + rows, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + rows, y, mask=valid)


@triton.jit
def gemv_time_mix(
    matrix, scales, mixed, past, after, decay, bonus, out, width, vector, stride, scale_stride,
    MADE: tl.constexpr, OUT_BITS: tl.constexpr,
    BITS: tl.constexpr, KN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Key, value and receptance of one token, its WKV and r * wkv -> ``out (C)``; the sums of the state move on.

    ``matrix (3 C, C)`` holds the three, ``mixed (3, vector)`` their inputs; ``out`` is placed for OUT_BITS;
    ``past``, ``after``: rows aa, bb, pp of the state, ``(3, C)``, possibly the same.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    valid = rows < width
    k = rows_dot(matrix, scales, mixed, rows, valid, width, stride, scale_stride, BITS, KN, BN, BK)
    v = rows_dot(matrix, scales, mixed + vector, width + rows, valid, width, stride, scale_stride, BITS, KN, BN, BK)
    r = rows_dot(
        matrix, scales, mixed + 2 * vector, 2 * width + rows, valid, width, stride, scale_stride, BITS, KN, BN, BK
    )
    k, v = k.to(MADE).to(tl.float32), v.to(MADE).to(tl.float32)
    r = (1.0 / (1.0 + tl.exp(-r.to(MADE).to(tl.float32)))).to(MADE).to(tl.float32)
    aa = tl.load(past + rows, mask=valid, other=0.0)
    bb = tl.load(past + width + rows, mask=valid, other=0.0)
    pp = tl.load(past + 2 * width + rows, mask=valid, other=0.0)
    w = tl.load(decay + rows, mask=valid, other=0.0)
    u = tl.load(bonus + rows, mask=valid, other=0.0)
    uk = u + k
    top = tl.maximum(pp, uk)
    old, new = tl.exp(pp - top), tl.exp(uk - top)
    y = ((old * aa + new * v) / (old * bb + new)).to(MADE).to(tl.float32)
    out_words = (width + 31) // 32 * OUT_BITS
    tl.store(out + place(rows, out_words, OUT_BITS), placed(r * y, rows, OUT_BITS), mask=valid)
    top = tl.maximum(pp - w, k)
    old, new = tl.exp(pp - w - top), tl.exp(k - top)
    tl.store(after + rows, old * aa + new * v, mask=valid)
    tl.store(after + width + rows, old * bb + new, mask=valid)
    tl.store(after + 2 * width + rows, top, mask=valid)


@triton.jit
def gemv_channel_mix(
    matrix, scales, mixed, squared, gate, width, hidden, vector, stride, scale_stride,
    MADE: tl.constexpr, OUT_BITS: tl.constexpr,
    BITS: tl.constexpr, KN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """relu(k)^2 -> ``squared (F)`` and the receptance -> ``gate (C)`` of one token.

    ``matrix (F + C, C)`` holds key and receptance, ``mixed (2, vector)`` their inputs; ``squared`` is placed for
    OUT_BITS. The first programs make the key.
    """
    program = tl.program_id(0)
    of_key = tl.cdiv(hidden, BN)
    if program < of_key:
        rows = program * BN + tl.arange(0, BN)
        valid = rows < hidden
        k = rows_dot(matrix, scales, mixed, rows, valid, width, stride, scale_stride, BITS, KN, BN, BK)
        k = k.to(MADE).to(tl.float32)
        k = tl.where(k > 0, k, k * 0)  # NaN stays NaN
        out_words = (hidden + 31) // 32 * OUT_BITS
        tl.store(squared + place(rows, out_words, OUT_BITS), placed(k * k, rows, OUT_BITS), mask=valid)
    else:
        rows = (program - of_key) * BN + tl.arange(0, BN)
        valid = rows < width
        r = rows_dot(
            matrix, scales, mixed + vector, hidden + rows, valid, width, stride, scale_stride, BITS, KN, BN, BK
        )
        r = r.to(MADE).to(tl.float32)
        tl.store(gate + rows, 1.0 / (1.0 + tl.exp(-r)), mask=valid)


@triton.jit
def top_of_block(logits, tops, places, vocabulary, BLOCK: tl.constexpr):
    """Largest of each block of ``logits (rows, V)`` and where it first is; NaN is larger than all."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocabulary + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    top = tl.max(x, axis=0)
    place = tl.min(tl.where(x == top, at, vocabulary - 1), axis=0)
    tl.store(tops + row * tl.num_programs(0) + block, top)
    tl.store(places + row * tl.num_programs(0) + block, place)


@triton.jit
def choose(tops, places, ids, chosen, count, blocks, rows, BLOCK: tl.constexpr):
    """The arg-max of every sequence -> ``ids (rows)``, the next input, and ``chosen[count[row], row]``; counts on."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    valid = at < blocks
    x = tl.load(tops + row * blocks + at, mask=valid, other=float("-inf"))
    place = tl.load(places + row * blocks + at, mask=valid, other=2147483647)
    best = tl.min(tl.where((x == tl.max(x, axis=0)) & valid, place, 2147483647), axis=0)
    n = tl.load(count + row)
    tl.store(ids + row, best)
    tl.store(chosen + n * rows + row, best)
    tl.store(count + row, n + 1)
