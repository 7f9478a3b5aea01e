"""Float formats and arithmetics: what a backend's rounding must cost, emulated in numpy.

The forward pass (:mod:`reference.forward`) takes one of these as its arithmetic:

* :class:`Exact` computes in float32 or float64 and rounds nothing further. Float64 is *truth*.
* :class:`Emulated` computes as declared by an :class:`Arithmetic`: every operation's result is
  rounded to the declared type, as IEEE 754 hardware does, and every matrix product is
  accumulated as a chain of partial sums in an order drawn from a seed. One draw is one run that a
  correct backend of that arithmetic could have made; the spread over draws is what is unavoidable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from reference.weights import Tensor, bf16_to_f32, f32_to_bf16

Rounding = Callable[[np.ndarray], np.ndarray]

#: Upcast at most this many weights at a time (128 MiB in float32).
_BLOCK_ELEMENTS = 1 << 25

#: Links of the chain of partial sums in an emulated matrix product. A GEMM micro-kernel adds the
#: products of one output one after the other, over blocks of a few hundred (OpenBLAS, MKL and cuBLAS
#: all block K by 192 to 512), so a chain of this length rounds as often as they do.
CHAIN = 256


def _to_fp32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)


def _to_fp16(x: np.ndarray) -> np.ndarray:
    """Round to IEEE half; beyond 65504 + half a step it is Inf, as in hardware."""
    return x.astype(np.float16).astype(np.float32)


def _to_fp16_rows(x: np.ndarray) -> np.ndarray:
    """Round to half; a row ``x (..., K)`` beyond 2^15 in units of the power of two that brings it below."""
    top = np.minimum(np.abs(x).max(axis=-1, keepdims=True), np.finfo(np.float32).max)
    power = np.maximum(np.ceil(np.log2(np.maximum(top, np.float32(1)))) - np.float32(15), np.float32(0))
    unit = np.exp2(power)
    return np.asarray(_to_fp16(x / unit) * unit)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    return bf16_to_f32(f32_to_bf16(x))


def int8_per_block(
    x: np.ndarray, block: int = 32, scales: Rounding = _to_fp16, wider: Rounding | None = None
) -> np.ndarray:
    """Round ``x (..., K)`` to int8 per block along K, by default as ggml's Q8_0 does with activations.

    The scale is ``max|x| / 127`` of its block, kept in the type that ``scales`` rounds to, after ``wider`` where
    another grid is wanted. A last block that is not full has a scale of its own.
    """
    k = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-k // block) * block), dtype=np.float32)
    padded[..., :k] = x
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    scale = scale if wider is None else wider(scale).astype(np.float32)
    # A scale that is subnormal in float32 is zero in fp16, and so is the block.
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
    rounded = np.round(blocks * inverse) * scales(scale)
    return np.asarray(rounded.reshape(padded.shape)[..., :k])


#: Types of whole blocks of int8 -> elements of a block, and the type of its scale: ggml's, ONNX Runtime's (int8x32f,
#: int8x128), BigDL's (int8x64).
INT8_BLOCKS: dict[str, tuple[int, Rounding]] = {
    "int8x32": (32, _to_fp16),
    "int8x32f": (32, _to_fp32),
    "int8x64": (64, _to_fp32),
    "int8x128": (128, _to_fp32),
    "int8x256": (256, _to_fp32),
}


def int4_per_block(x: np.ndarray, block: int = 32) -> np.ndarray:
    """Round ``x (..., K)`` to -7..7 times ``max|x| / 7`` per block along K, which K is a multiple of."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(7)
    return np.asarray(_to_steps(blocks, scale).reshape(x.shape))


def uint4_per_block(x: np.ndarray, block: int = 32) -> np.ndarray:
    """Round ``x (..., K)`` to 16 even steps from minimum to maximum per block along K, which K is a multiple of."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    low = blocks.min(axis=-1, keepdims=True)
    scale = (blocks.max(axis=-1, keepdims=True) - low) / np.float32(15)
    return np.asarray((_to_steps(blocks - low, scale) + low).reshape(x.shape))


def _to_steps(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.asarray(np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)) * scale)


#: Type name -> rounding to it.
ROUND: dict[str, Rounding] = {"fp32": _to_fp32, "fp16": _to_fp16, "bf16": _to_bf16}

#: Types that only the inputs of matrix products are rounded to: ggml's, BigDL's (int8x64), ONNX Runtime's (int8x32f,
#: int8x128), and what ggml had in April 2023 (int4x32, uint4x32). Scales are fp16 in int8x32 and fp32 in the others.
#: fp16in overflows as fp16 does; fp16rows divides rows that would by a power of two, as this project's kernels do.
INPUTS: dict[str, Rounding] = {
    "fp16in": _to_fp16,
    "fp16rows": _to_fp16_rows,
    **{name: partial(int8_per_block, block=block, scales=scales) for name, (block, scales) in INT8_BLOCKS.items()},
    "int4x32": int4_per_block,
    "uint4x32": uint4_per_block,
}

#: Unit roundoff: the largest relative error of one rounding to the type.
UNIT_ROUNDOFF: dict[str, float] = {
    "fp32": 2.0**-24,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "fp16in": 2.0**-11,
    "fp16rows": 2.0**-11,
    **dict.fromkeys(INT8_BLOCKS, 2.0**-8),
    "int4x32": 2.0**-4,
    "uint4x32": 2.0**-5,
}


@dataclass(frozen=True)
class Arithmetic:
    """How a backend computes, as it declares it.

    activations   result of every operation: ``fp32``, ``fp16``, ``bf16``; or one of ``INPUTS``, such as
                  ``int8x32``: inputs of matrix products rounded to int8 per block of 32, everything else fp32
    accumulation  partial sums of matrix products
    residual      the stream ``x`` that each block adds to
    wkv           the WKV recurrence and its state
    chain         products are added up in chains of at most about this many roundings; a plain loop
                  with one accumulator declares the longest row it sums
    """

    activations: str = "fp32"
    accumulation: str = "fp32"
    residual: str = "fp32"
    wkv: str = "fp32"
    chain: int = CHAIN

    def __post_init__(self) -> None:
        for name in ("activations", "accumulation", "residual", "wkv"):
            value = getattr(self, name)
            allowed = (*ROUND, *INPUTS) if name == "activations" else tuple(ROUND)
            if value not in allowed:
                raise ValueError(f"arithmetic: {name} is {value!r}; known: {', '.join(allowed)}")
        if self.chain < 1:
            raise ValueError(f"arithmetic: chain is {self.chain}; at least 1 is needed")

    def __str__(self) -> str:
        chain = "" if self.chain == CHAIN else f"/chain {self.chain}"
        if self.accumulation == self.residual == self.wkv == self.activations:
            return self.activations + chain
        return f"{self.activations}/acc {self.accumulation}/res {self.residual}/wkv {self.wkv}{chain}"


class Op(Protocol):
    """What the forward pass asks of an arithmetic: a compute type, three roundings, a matrix product."""

    dtype: np.dtype[Any]

    def at(self, point: str, /) -> Op:
        """The arithmetic of what makes a trace point, where points differ."""

    def act(self, x: np.ndarray, /) -> np.ndarray:
        """Result of an operation."""

    def residual(self, x: np.ndarray, /) -> np.ndarray:
        """Result of an addition to the residual stream."""

    def wkv(self, x: np.ndarray, /) -> np.ndarray:
        """Result of an operation inside the WKV recurrence."""

    def linear(self, x: np.ndarray, weight: Tensor, /) -> np.ndarray:
        """``x (T, K)`` times ``weight (N, K)`` transposed -> ``(T, N)``."""


class Exact:
    """Float32 or float64 arithmetic, nothing rounded beyond it."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.dtype = np.dtype(dtype)

    def at(self, point: str, /) -> Op:
        return self

    def act(self, x: np.ndarray, /) -> np.ndarray:
        return x

    residual = wkv = act

    def linear(self, x: np.ndarray, weight: Tensor, /) -> np.ndarray:
        blocks = [x @ weight.rows(rows, self.dtype).T for rows in row_blocks(weight)]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)


class Emulated:
    """One draw of a declared arithmetic; ``seed`` decides the order of every summation.

    In half precision that order hardly changes which way a result is rounded, so draws would be one
    and the same. All but seed 0, which rounds exactly as hardware does, therefore round on a grid
    shifted by a random factor below 2, each time another: errors of the same size, independently drawn.
    The grid of a block moves with its values; there the block's scale is wider by up to a tenth.

    ``unit``, a power of two: results are kept divided by it, as runtimes do that rescale the residual stream.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, arithmetic: Arithmetic, seed: int = 0, unit: float = 1.0) -> None:
        self.arithmetic = arithmetic
        self._unit = np.float32(unit)
        self._order = np.random.default_rng(seed)
        self._exactly = seed == 0
        self.act = self._rounding(arithmetic.activations)
        self.residual = self._rounding(arithmetic.residual)
        self.wkv = self._rounding(arithmetic.wkv)
        self._accumulate = self._in_units(ROUND[arithmetic.accumulation])
        inputs = INPUTS.get(arithmetic.activations, _to_fp32)
        block = INT8_BLOCKS.get(arithmetic.activations)
        shifting = inputs in (_to_fp16, _to_fp16_rows)
        self._inputs = self._drawn_blocks(*block) if block else self._drawn(inputs) if shifting else inputs

    def _rounding(self, kind: str) -> Rounding:
        """Rounding to a type; those of ``INPUTS`` round only the inputs of products."""
        return self._in_units(self._drawn(ROUND.get(kind, _to_fp32)))

    def _in_units(self, exact: Rounding) -> Rounding:
        """Rounding of results that are kept divided by ``unit``, a power of two."""
        if self._unit == 1 or exact is _to_fp32:
            return exact
        return lambda x: exact(x / self._unit) * self._unit

    def at(self, point: str, /) -> Op:
        return self

    def _drawn(self, exact: Rounding) -> Rounding:
        if self._exactly or exact is _to_fp32:
            return exact

        def shifted(x: np.ndarray) -> np.ndarray:
            factor = np.float32(2 ** self._order.uniform())
            y = exact(x * factor) / factor
            return np.where(np.isfinite(y), y, exact(x))  # the type overflows where it does, not earlier

        return shifted

    def _drawn_blocks(self, block: int, scales: Rounding) -> Rounding:
        """Rounding to int8 per block; the scale of every block is wider by another part of a tenth."""
        if self._exactly:
            return lambda x: int8_per_block(x, block, scales)
        return lambda x: int8_per_block(x, block, scales, lambda s: s * self._order.uniform(1, 1.1, s.shape))

    def linear(self, x: np.ndarray, weight: Tensor, /) -> np.ndarray:
        x = self._inputs(x)
        width = -(-x.shape[1] // self.arithmetic.chain)
        links = np.arange(0, x.shape[1], width)
        self._order.shuffle(links)
        out = np.empty((x.shape[0], weight.shape[0]), dtype=np.float32)
        for rows in row_blocks(weight):
            w = weight.rows(rows, np.float32)  # (N, K)
            if width == 1 and self._accumulate is _to_fp32:
                out[:, rows] = one_by_one(x, w, links)
            else:
                out[:, rows] = self._linked(x, w, links, width)
        return self.act(out)

    def _linked(self, x: np.ndarray, w: np.ndarray, links: np.ndarray, width: int) -> np.ndarray:
        """``x (T, K)`` times ``w (N, K)`` transposed, a partial sum rounded after every link of the chain."""
        total = np.zeros((x.shape[0], w.shape[0]), dtype=np.float32)
        for c in links:
            total = self._accumulate(np.add(total, x[:, c : c + width] @ w[:, c : c + width].T, out=total))
        return total


def one_by_one(x: np.ndarray, w: np.ndarray, order: np.ndarray) -> np.ndarray:
    """``x (T, K)`` times ``w (N, K)`` transposed in float32, the K products of each output added one after the other.

    einsum without its optimizer walks operands that are contiguous along the output's last axis with one accumulator
    per output: ten times as fast as K outer products. A last axis of 1 would be summed in another order.
    """
    w = np.ascontiguousarray(w.T[order])  # (K, N)
    if w.shape[1] == 1:
        return np.add.accumulate(x[:, order] * w[:, 0], axis=1)[:, -1:]
    return np.asarray(np.einsum("tk,kn->tn", np.take(x, order, axis=1), w, optimize=False))


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of a matrix's rows, each small enough to be upcast at once. A float32 matrix is one slice."""
    n, k = weight.shape
    step = n if weight.stored in ("f32", "f64") else max(1, _BLOCK_ELEMENTS // k)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))
