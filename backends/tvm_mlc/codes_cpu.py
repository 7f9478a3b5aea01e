"""Codes of a uint32 word as float32 values, in the instructions that every vector unit has.

A code is not moved to the low end of its word and converted. It is masked where it lies, beneath the exponent of
2**23, whose last mantissa bit is worth 1: read as float32 that is ``2**23 + code * 2**place``, and less
``2**23 + zero * 2**place`` it is the wanted value times ``2**place``, exactly. What it is multiplied with, an input
or a scale, is multiplied by ``2**-place`` before, exactly too. Of int4 five codes fit beneath, so a word is shifted
once for eight codes.
"""

from __future__ import annotations

from backends.tvm_mlc.storage import Kept

_MANTISSA = 23
_ONE = 2**_MANTISSA
_EXPONENT = (127 + _MANTISSA) << _MANTISSA


def code(how: Kept, word: str, i: int) -> str:
    """Code ``i`` of a word, less zero's: ``2 ** place(how, i)`` times its value, as float32."""
    shift = i // _fit(how) * _fit(how) * how.bits
    shifted = f"T.shift_right({word}, T.uint32({shift}))" if shift else word
    masked = f"T.bitwise_and({shifted}, T.uint32({(2**how.bits - 1) << place(how, i)}))"
    value = f"T.reinterpret('float32', T.bitwise_or({masked}, T.uint32({_EXPONENT})))"
    return f"({value} - T.float32({_ONE + (how.zero << place(how, i))}))"


def place(how: Kept, i: int) -> int:
    """Lowest bit of code ``i``, after its word has been shifted."""
    return i % _fit(how) * how.bits


def shrink(how: Kept, i: int) -> str:
    """What undoes ``place``: ``T.float32(2**-place)``."""
    return f"T.float32({2.0 ** -place(how, i)!r})"


def _fit(how: Kept) -> int:
    """Codes that fit beneath the exponent."""
    return _MANTISSA // how.bits
