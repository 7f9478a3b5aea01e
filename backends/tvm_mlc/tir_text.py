"""The pieces from which kernels are written as TVMScript text: headers, loops, vector exponentials, epilogues.

Text, and not decorated Python: a kernel is one of many sizes, types and layouts, and what is parsed is what
is compiled, loop by loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Union

Size = Union[int, str]  # noqa: UP007 - evaluated at run time, on Python 3.9 too


class Buffer(NamedTuple):
    """A parameter of a kernel. A size may be ``"n"``, the number of tokens, known at run time only."""

    name: str
    shape: tuple[Size, ...]
    dtype: str


class Kernel(NamedTuple):
    """A kernel's text, and its outputs, which are its last parameters."""

    name: str
    text: str
    outputs: tuple[Buffer, ...]


def kernel(name: str, inputs: Sequence[Buffer], outputs: Sequence[Buffer], body: str, lets: str = "") -> Kernel:
    """The function ``name`` over buffers; ``body`` is indented by nothing, and uses the buffers' names."""
    buffers = [*inputs, *outputs]
    symbolic = any("n" in buffer.shape for buffer in buffers)
    lines = ["@T.prim_func(s_tir=True)"]
    if symbolic:
        lines.append(f"def {name}({', '.join(f'{b.name}_h: T.handle' for b in buffers)}):")
    else:
        lines.append(f"def {name}({', '.join(f'{b.name}: {_type(b)}' for b in buffers)}):")
    lines.append('    T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})')
    if symbolic:
        lines.append("    n = T.int64()")
        lines += [f"    {b.name} = T.match_buffer({b.name}_h, {_shape(b)}, {b.dtype!r})" for b in buffers]
    text = "\n".join([*lines, indent(lets + body, 1), ""])
    return Kernel(name, text, tuple(outputs))


def indent(text: str, levels: int) -> str:
    """``text`` moved in by ``levels`` of four blanks."""
    return "\n".join(("    " * levels + line) if line.strip() else line for line in text.strip("\n").splitlines())


def lanes_of(size: int, most: int = 16) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    lanes = most
    while size % lanes:
        lanes //= 2
    return lanes


def local(name: str, shape: Sequence[int], dtype: str = "float32") -> str:
    """A buffer of a CPU's thread, which becomes registers or lies on the stack.

    TVM takes memory of other scopes, and what has 1024 bytes or more, from a pool: two calls each time.
    """
    return f'{name} = T.alloc_buffer(({", ".join(map(str, shape))},), "{dtype}")\n'


def f32(text: str, dtype: str) -> str:
    """A value as float32."""
    return text if dtype == "float32" else f'T.Cast("float32", {text})'


def cast(text: str, dtype: str) -> str:
    """A float32 value as ``dtype``."""
    return text if dtype == "float32" else f'T.Cast("{dtype}", {text})'


#: Below, e^x is less than the smallest normal float32.
_LOWEST = -87.3


def exp_scratch(lanes: int) -> str:
    """The registers that :func:`exp_lines` works in."""
    return local("ex", (lanes,)) + local("en", (lanes,)) + local("ep", (lanes,))


def exp_lines(target: str, source: str) -> str:
    """``target = e ** source`` in a vectorized loop over ``l``, to 2 units in the last place.

    Cody and Waite's reduction with the polynomial of Cephes. NaN stays NaN, and what underflows is 0: both
    comparisons are false for NaN, and its integer part is not taken.
    """
    return f"""
ex[l] = T.Select({source} > T.float32(88.0), T.float32(88.0), {source})
en[l] = T.Select(ex[l] > T.float32({_LOWEST}), T.floor(ex[l] * T.float32(1.44269504) + T.float32(0.5)), T.float32(-126))
ep[l] = ex[l] - en[l] * T.float32(0.693359375) - en[l] * T.float32(-2.12194440e-4)
{target} = T.Select(
    ex[l] < T.float32({_LOWEST}),
    T.float32(0),
    ((((((T.float32(1.9875691500e-4) * ep[l] + T.float32(1.3981999507e-3)) * ep[l] + T.float32(8.3334519073e-3)) * ep[l]
    + T.float32(4.1665795894e-2)) * ep[l] + T.float32(1.6666665459e-1)) * ep[l] + T.float32(5.0000001201e-1))
    * ep[l] * ep[l] + ep[l] + T.float32(1))
    * T.reinterpret("float32", T.shift_left(T.Cast("int32", en[l]) + 127, 23)))
""".strip("\n")


def _type(buffer: Buffer) -> str:
    return f"T.Buffer({_shape(buffer)}, {buffer.dtype!r})"


def _shape(buffer: Buffer) -> str:
    return "()" if not buffer.shape else f"({', '.join(map(str, buffer.shape))},)"
