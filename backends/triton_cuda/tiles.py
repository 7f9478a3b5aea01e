"""Block sizes of the kernels, for a GPU and for the interpreter.

The interpreter pays for each operation of each program, whatever its size, so there blocks are as large as the matrix.
On a GPU a program of :mod:`kernels_gemv` has four rows of 16-byte loads in flight in each of 128 threads, and the 1024
and more programs of a matrix of 4096 rows fill every multiprocessor several times.
"""

from __future__ import annotations

import os
from typing import NamedTuple

#: What Triton itself decides by, when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

#: Largest block that the interpreter is given.
_INTERPRETED_ELEMENTS = 1 << 19


class Tile(NamedTuple):
    """``rows`` results by ``columns`` columns (or words of packed codes), in ``warps`` warps."""

    rows: int
    columns: int
    warps: int


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def row_tile(width: int, rows: int) -> Tile:
    """How many of ``rows`` of so many channels one program holds: on a GPU 8 channels or more for each thread."""
    across = power_of_two(width)
    if INTERPRETED:
        return Tile(max(1, min(power_of_two(rows), _INTERPRETED_ELEMENTS // across)), across, 1)
    return Tile(1, across, min(16, max(1, across // 256)))


def gemv_tile(results: int, columns: int, bits: int, kn: bool, itemsize: int) -> Tile:
    """Tile of a product with one vector; ``bits`` 0: floats of ``itemsize`` bytes."""
    across = power_of_two(-(-columns // 32) * bits if bits else columns)
    if INTERPRETED:
        return Tile(min(power_of_two(results), max(1, _INTERPRETED_ELEMENTS // across)), across, 1)
    if kn:
        return Tile(32, min(64, across), 4)
    if bits:
        return Tile(4, min(512, across), 4)
    return Tile(4, min(2048 // itemsize, across), 4)


def gemm_tile(rows: int, words: int, kn: bool) -> tuple[int, int, int, int]:
    """``BM, BN, BK`` in words, and warps, of a short prompt's product with a packed matrix."""
    bm = min(64, max(16, power_of_two(rows)))
    if INTERPRETED:
        return bm, 1024, max(16, power_of_two(words)), 1
    return bm, 64, 32, 8 if kn else 4  # with 4 the transposed layout spills in Triton 3.6


def dequantize_tile(kn: bool) -> tuple[int, int]:
    """Rows and columns of a block."""
    if INTERPRETED:
        return 512, 1024
    return (128, 32) if kn else (8, 512)


#: Channels of a program of the WKV kernels over a prompt: one for each thread.
WKV_BLOCK = 1024 if INTERPRETED else 64
WKV_WARPS = 1 if INTERPRETED else 2

#: Blocks of the arg-max, and of squared ReLU.
TOP_BLOCK = 1 << 16 if INTERPRETED else 1024
SQUARE_BLOCK = 1 << 12 if INTERPRETED else 2048

#: A chunk of WKV is not shorter than this: what a chunk costs beside its own tokens is joining those before it.
_SHORTEST_CHUNK = 16
#: Channels times chunks that fill a card.
_FILLING = 1 << 17


def wkv_chunk(length: int, width: int, batch: int) -> int:
    """Tokens of a chunk."""
    chunks = max(1, _FILLING // (width * batch))
    return max(_SHORTEST_CHUNK, -(-length // chunks))
