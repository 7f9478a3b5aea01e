"""RWKV-4 on one device: the step that a graph replays, and the pass over a prompt.

Shapes and symbols as in :mod:`reference.forward`. A state is float32 ``(batch, n_layer, 5, C)``, the canonical rows.
``rows`` stands for batch times T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from backends.triton_cuda.kernels_gemm import add_gated, fit, square
from backends.triton_cuda.kernels_gemv import choose, gemv_channel_mix, gemv_time_mix, top_of_block
from backends.triton_cuda.kernels_norm import embed_norm, norm, norm_mix
from backends.triton_cuda.kernels_wkv import wkv_output, wkv_totals
from backends.triton_cuda.matrix import FUSED_ROWS, product, vector_product
from backends.triton_cuda.stored import Layer, Step, Stored
from backends.triton_cuda.tiles import (
    SQUARE_BLOCK,
    TOP_BLOCK,
    WKV_BLOCK,
    WKV_WARPS,
    power_of_two,
    row_tile,
    wkv_chunk,
)
from backends.triton_cuda.types import OPTIONS, TRITON, Types
from reference.config import Config
from reference.forward import AA, ATT_X, FFN_X, LN_EPS, PP

#: Called with a trace point's name and its value ``(rows, width)``.
Tap = Callable[[str, Tensor], None]


class Model:
    """RWKV-4 with its weights on one device."""

    def __init__(self, config: Config, types: Types, device: torch.device, stored: Stored) -> None:
        self.config, self.types, self.device = config, types, device
        self._stored = stored
        self._made = TRITON[types.made]

    def buffers(self, batch: int) -> Step:
        """What :meth:`step` works on."""
        return Step(self.config, self.types, self.device, self._stored, batch)

    def step(self, b: Step) -> None:
        """One token of every sequence: ``b.ids`` and ``b.state`` -> ``b.logits``, the state moved on in place."""
        if b.batch > 1:
            x = self.hidden(b.ids[:, None], b.state, b.state)
            b.logits.copy_(self.head(x))
            return
        x, c = b.x, self.config.n_embd
        self._embed(b.ids, x)
        unit = 1.0
        for i, layer in enumerate(self._stored.layers):
            self._rescale(x, unit, layer.unit)
            unit = layer.unit
            state = b.state[:, i]
            self._norm_mix(
                x, layer.att_norm, layer.att_mu, state[:, ATT_X], state[:, ATT_X], b.mixed, 1, unit, bits=layer.kvr.bits
            )
            tile = layer.kvr.tile(c)
            gemv_time_mix[(triton.cdiv(c, tile.rows),)](
                layer.kvr.data, layer.kvr.scales, b.mixed, state[:, AA], state[:, AA], layer.decay, layer.bonus,
                b.inner, c, layer.kvr.vector, *layer.kvr.strides,
                MADE=self._made, OUT_BITS=layer.output.bits, BITS=layer.kvr.bits, KN=layer.kvr.kn,
                BN=tile.rows, BK=tile.columns, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
            vector_product(layer.output, b.inner, x, add=True, made=self.types.made)
            self._norm_mix(
                x, layer.ffn_norm, layer.ffn_mu, state[:, FFN_X], state[:, FFN_X], b.mixed, 1, unit, bits=layer.kr.bits
            )
            tile = layer.kr.tile(self.config.n_ffn)
            gemv_channel_mix[(triton.cdiv(self.config.n_ffn, tile.rows) + triton.cdiv(c, tile.rows),)](
                layer.kr.data, layer.kr.scales, b.mixed, b.squared, b.gate, c, self.config.n_ffn, layer.kr.vector,
                *layer.kr.strides, MADE=self._made, OUT_BITS=layer.value.bits, BITS=layer.kr.bits, KN=layer.kr.kn,
                BN=tile.rows, BK=tile.columns, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
            vector_product(layer.value, b.squared, x, b.gate, add=True, made=self.types.made)
        self._last_norm(x, b.last, unit, self._stored.head.bits)
        vector_product(self._stored.head, b.last, b.logits, made=torch.float32)

    def choose(self, b: Step) -> None:
        """The arg-max of ``b.logits`` -> ``b.ids`` and the next row of ``b.chosen``."""
        blocks = b.tops.shape[1]
        top_of_block[(blocks, b.batch)](b.logits, b.tops, b.places, self.config.n_vocab, BLOCK=TOP_BLOCK, **OPTIONS)
        choose[(b.batch,)](
            b.tops, b.places, b.ids, b.chosen, b.count, blocks, b.batch, BLOCK=power_of_two(blocks), **OPTIONS
        )

    def hidden(self, ids: Tensor, past: Tensor, after: Tensor, tap: Tap | None = None) -> Tensor:
        """``ids (batch, T)`` -> the stream after ``ln_out``, ``(rows, C)``, as the head takes it; ``after`` is written.

        ``past`` and ``after`` may be the same only where T is 1.
        """
        length = ids.shape[1]
        ids = ids.reshape(-1)
        x = torch.empty(len(ids), self.config.n_embd, dtype=self.types.stream, device=self.device)
        raw = None if tap is None else torch.empty_like(x)
        self._embed(ids, x, raw)
        if tap is not None and raw is not None:
            tap("emb", raw)
            tap("blocks.0.ln0", x)
        unit = 1.0
        for i, layer in enumerate(self._stored.layers):
            self._rescale(x, unit, layer.unit)
            unit = layer.unit
            here = _named(tap, f"blocks.{i}.")
            self._time_mix(x, layer, past[:, i], after[:, i], length, here)
            if here is not None:
                here("att.residual", _times(x, unit))
            self._channel_mix(x, layer, past[:, i], after[:, i], length, here)
            if here is not None:
                here("ffn.residual", _times(x, unit))
        last = torch.empty_like(x, dtype=self._shown(tap))
        self._last_norm(x, last, unit)
        if tap is not None:
            tap("ln_out", last)
        return last.to(self.types.inputs)

    def head(self, x: Tensor) -> Tensor:
        """Logits ``(rows, V)``, float32. A packed head is never dequantized as a whole: it is the largest matrix."""
        head = self._stored.head
        if not head.bits or len(x) <= FUSED_ROWS:
            return product(head, x, torch.float32)
        return torch.cat([product(head, some, torch.float32) for some in torch.split(x, FUSED_ROWS)])

    def _shown(self, tap: Tap | None) -> torch.dtype:
        """Type of what a product takes; traced, it is shown as it was made, and rounded for the product only then."""
        return self.types.inputs if tap is None or not self.types.limited else self.types.made

    def _time_mix(self, x: Tensor, layer: Layer, past: Tensor, after: Tensor, length: int, tap: Tap | None) -> None:
        """Adds to ``x`` in place."""
        rows, c = x.shape
        types = self.types
        mixed = torch.empty(3, rows, c, dtype=self._shown(tap), device=self.device)
        normed = None if tap is None else torch.empty_like(x)
        self._norm_mix(
            x, layer.att_norm, layer.att_mu, past[:, ATT_X], after[:, ATT_X], mixed, length, layer.unit, normed
        )
        k, v, r = (product(layer.kvr.rows(j * c, c), mixed[j].to(types.inputs), types.made) for j in range(3))
        out = torch.empty_like(k)
        raw = None if tap is None else torch.empty_like(k)
        rows_of = slice(AA, PP + 1)
        scan(k, v, r, layer.decay, layer.bonus, past[:, rows_of], after[:, rows_of], length, out, raw)
        fitting, factors = self._fitting(out)
        added = product(layer.output, fitting, types.made)
        if tap is not None and normed is not None and raw is not None:
            names = ("ln1", "att.xk", "att.xv", "att.xr", "att.k", "att.v", "att.r", "att.wkv", "att.rwkv")
            for name, value in zip(names, (normed, *mixed, k, v, r.sigmoid(), raw, out)):
                tap(name, value)
            tap("att.out", _times(added if factors is None else added * factors, layer.unit))
        if factors is None:
            x.add_(added)
        else:
            x.addcmul_(added, factors)

    def _fitting(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """``out (rows, C)`` as a product takes it, and ``(rows, 1)`` that the product is to be multiplied by."""
        if not self.types.limited:
            return out, None
        fitting = torch.empty_like(out, dtype=self.types.inputs)
        factors = torch.empty(len(out), 1, device=self.device)
        self._by_rows(fit, len(out), out, fitting, factors, out.shape[1], len(out))
        return fitting, factors

    def _channel_mix(self, x: Tensor, layer: Layer, past: Tensor, after: Tensor, length: int, tap: Tap | None) -> None:
        """Adds to ``x`` in place."""
        rows, c = x.shape
        hidden, types = self.config.n_ffn, self.types
        mixed = torch.empty(2, rows, c, dtype=self._shown(tap), device=self.device)
        normed = None if tap is None else torch.empty_like(x)
        self._norm_mix(
            x, layer.ffn_norm, layer.ffn_mu, past[:, FFN_X], after[:, FFN_X], mixed, length, layer.unit, normed
        )
        k = product(layer.kr.rows(0, hidden), mixed[0].to(types.inputs), types.made)
        r = product(layer.kr.rows(hidden, c), mixed[1].to(types.inputs), types.made)
        squared = torch.empty_like(k, dtype=self._shown(tap))
        factors = torch.ones(rows, device=self.device)
        tile = row_tile(SQUARE_BLOCK, rows)
        square[(triton.cdiv(rows, tile.rows),)](
            k, squared, factors, hidden, rows,
            LIMITED=types.limited, ROWS=tile.rows, BLOCK=tile.columns, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
        v = product(layer.value, squared.to(types.inputs), types.made)
        if tap is not None and normed is not None:
            whole = factors[:, None]
            gate, product_ = r.sigmoid(), _times(v * whole if types.limited else v, layer.unit)
            values = (normed, *mixed, k, squared * whole if types.limited else squared, product_, gate, gate * product_)
            names = ("ln2", "ffn.xk", "ffn.xr", "ffn.k", "ffn.k2", "ffn.v", "ffn.r", "ffn.out")
            for name, value in zip(names, values):
                tap(name, value)
        self._by_rows(add_gated, rows, x, r, v, factors, c, rows, LIMITED=types.limited, MADE=self._made)

    def _embed(self, ids: Tensor, x: Tensor, raw: Tensor | None = None) -> None:
        table, groups = self._stored.embedding, -(-self.config.n_embd // 32)
        self._by_rows(
            embed_norm, len(ids),
            ids, table.data, table.scales, *self._stored.first_norm, x, raw, self.config.n_embd, groups,
            len(ids), LN_EPS,
            BITS=table.bits, TRACE=raw is not None,
        )  # fmt: skip

    def _norm_mix(
        self,
        x: Tensor,
        affine: Tensor,
        mu: Tensor,
        past: Tensor,
        after: Tensor,
        mixed: Tensor,
        length: int,
        unit: float,
        normed: Tensor | None = None,
        bits: int = 0,
    ) -> None:
        """``bits``: of the packed matrices that are multiplied by one vector of ``mixed``."""
        rows, c = x.shape
        eps = LN_EPS / unit**2
        self._by_rows(
            norm_mix, rows,
            x, past, after, affine[0], affine[1], mu, mixed, normed, c, length, rows, mixed.shape[-1],
            past.stride(0), eps,
            BITS=bits, MIXES=len(mu), SINGLE=length == 1, TRACE=normed is not None,
        )  # fmt: skip

    def _last_norm(self, x: Tensor, out: Tensor, unit: float, bits: int = 0) -> None:
        c, rows = self.config.n_embd, len(x)
        eps = LN_EPS / unit**2
        self._by_rows(norm, rows, x, *self._stored.last_norm, out, c, rows, out.shape[-1], eps, BITS=bits)

    def _by_rows(self, kernel: Any, rows: int, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel whose programs hold whole rows of channels."""
        tile = row_tile(self.config.n_embd, rows)
        kernel[(triton.cdiv(rows, tile.rows),)](
            *arguments, **constants, ROWS=tile.rows, BLOCK=tile.columns, num_warps=tile.warps, **OPTIONS
        )

    def _rescale(self, x: Tensor, before: float, unit: float) -> None:
        if unit != before:
            x.mul_(before / unit)


def scan(
    k: Tensor,
    v: Tensor,
    r: Tensor,
    decay: Tensor,
    bonus: Tensor,
    past: Tensor,
    after: Tensor,
    length: int,
    out: Tensor,
    raw: Tensor | None = None,
) -> None:
    """sigmoid(r) * wkv over ``k, v, r (batch * length, C)`` -> ``out``; ``past, after (batch, 3, C)`` in a state."""
    rows, c = k.shape
    batch = rows // length
    chunk = wkv_chunk(length, c, batch)
    chunks, blocks = triton.cdiv(length, chunk), triton.cdiv(c, WKV_BLOCK)
    totals = torch.empty(batch, max(1, chunks - 1), 3, c, device=k.device)
    if chunks > 1:
        wkv_totals[(blocks, chunks - 1, batch)](
            k, v, decay, totals, c, length, chunk, BLOCK=WKV_BLOCK, num_warps=WKV_WARPS, **OPTIONS
        )
    wkv_output[(blocks, chunks, batch)](
        k, v, r, decay, bonus, past, after, totals, out, raw, c, length, chunk, chunks, past.stride(0),
        MADE=TRITON[k.dtype], TRACE=raw is not None, BLOCK=WKV_BLOCK, num_warps=WKV_WARPS, **OPTIONS,
    )  # fmt: skip


def _named(tap: Tap | None, prefix: str) -> Tap | None:
    return None if tap is None else lambda name, value: tap(prefix + name, value)


def _times(x: Tensor, unit: float) -> Tensor:
    return x if unit == 1 else x.float() * unit
