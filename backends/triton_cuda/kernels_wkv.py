"""WKV over a prompt, in chunks of time that run side by side.

The recurrence over (aa, bb, pp) is associative: a chunk alone, from an empty state, gives a total that any state before
it can be joined with. So :func:`wkv_totals` makes the totals of all chunks but the last, and each program of
:func:`wkv_output` joins those before its own chunk with the state and goes through its chunk. A prompt of one chunk
needs the second only. Everything is float32; k, v, r are read twice at most.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wkv_totals(k, v, decay, totals, width, length, chunk, BLOCK: tl.constexpr):
    """Sums of each chunk from an empty state -> ``totals (batch, chunks, 3, C)``: aa, bb, pp.

    ``k, v (batch * length, C)``; programs: blocks of channels, chunks, sequences.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = cols < width
    part, sequence = tl.program_id(1), tl.program_id(2)
    w = tl.load(decay + cols, mask=valid, other=0.0)
    aa = tl.zeros([BLOCK], dtype=tl.float32)
    bb = tl.zeros([BLOCK], dtype=tl.float32)
    pp = tl.full([BLOCK], -1e30, dtype=tl.float32)
    first = part * chunk
    at = (sequence * length + first).to(tl.int64) * width + cols
    for _ in range(first, first + chunk):
        kt = tl.load(k + at, mask=valid, other=0.0).to(tl.float32)
        vt = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        top = tl.maximum(pp - w, kt)
        old, new = tl.exp(pp - w - top), tl.exp(kt - top)
        aa = old * aa + new * vt
        bb = old * bb + new
        pp = top
        at += width
    out = totals + (sequence * tl.num_programs(1) + part).to(tl.int64) * 3 * width + cols
    tl.store(out, aa, mask=valid)
    tl.store(out + width, bb, mask=valid)
    tl.store(out + 2 * width, pp, mask=valid)


@triton.jit
def wkv_output(
    k, v, r, decay, bonus, past, after, totals, out, raw, width, length, chunk, chunks, state_stride,
    MADE: tl.constexpr, TRACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sigmoid(r) * wkv of every token -> ``out (batch * length, C)``; ``raw`` takes wkv itself.

    ``past``, ``after``: rows aa, bb, pp of the state, ``(3, C)`` each, ``state_stride`` from sequence to sequence.
    ``totals (batch, chunks - 1, 3, C)``.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = cols < width
    part, sequence = tl.program_id(1), tl.program_id(2)
    w = tl.load(decay + cols, mask=valid, other=0.0)
    u = tl.load(bonus + cols, mask=valid, other=0.0)
    state = past + sequence.to(tl.int64) * state_stride + cols
    aa = tl.load(state, mask=valid, other=0.0)
    bb = tl.load(state + width, mask=valid, other=0.0)
    pp = tl.load(state + 2 * width, mask=valid, other=0.0)
    total = totals + sequence.to(tl.int64) * (chunks - 1) * 3 * width + cols
    for _ in range(part):
        pt = tl.load(total + 2 * width, mask=valid, other=0.0)
        shifted = pp - chunk * w
        top = tl.maximum(shifted, pt)
        old, new = tl.exp(shifted - top), tl.exp(pt - top)
        aa = old * aa + new * tl.load(total, mask=valid, other=0.0)
        bb = old * bb + new * tl.load(total + width, mask=valid, other=0.0)
        pp = top
        total += 3 * width
    first = part * chunk
    at = (sequence * length + first).to(tl.int64) * width + cols
    for _ in range(first, tl.minimum(first + chunk, length)):
        kt = tl.load(k + at, mask=valid, other=0.0).to(tl.float32)
        vt = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        rt = tl.load(r + at, mask=valid, other=0.0).to(tl.float32)
        uk = u + kt
        top = tl.maximum(pp, uk)
        old, new = tl.exp(pp - top), tl.exp(uk - top)
        y = ((old * aa + new * vt) / (old * bb + new)).to(MADE).to(tl.float32)
        if TRACE:
            tl.store(raw + at, y, mask=valid)
        rt = (1.0 / (1.0 + tl.exp(-rt))).to(MADE).to(tl.float32)
        tl.store(out + at, rt * y, mask=valid)
        top = tl.maximum(pp - w, kt)
        old, new = tl.exp(pp - w - top), tl.exp(kt - top)
        aa = old * aa + new * vt
        bb = old * bb + new
        pp = top
        at += width
    if part == chunks - 1:
        state = after + sequence.to(tl.int64) * state_stride + cols
        tl.store(state, aa, mask=valid)
        tl.store(state + width, bb, mask=valid)
        tl.store(state + 2 * width, pp, mask=valid)
