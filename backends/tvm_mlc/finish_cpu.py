"""What all products end with: a task to a block of outputs, and what happens to each output."""

from __future__ import annotations

from backends.tvm_mlc.product import Product
from backends.tvm_mlc.tir_text import cast, exp_lines, exp_scratch, f32, indent
from backends.tvm_mlc.tir_text import local as registers


def tasks(n: int, block: int, body: str) -> str:
    """``body`` for every block of outputs, which begins at ``row``; the last is moved back where N does not divide."""
    start = f"b * {block}" if n % block == 0 else f"T.min(b * {block}, {n - block})"
    return f"for b in T.parallel({-(-n // block)}):\n    row = T.meta_var({start})\n{indent(body, 1)}\n"


def block(n: int, most: int) -> int:
    """``most``, or the largest power of two below where there are fewer outputs."""
    while most > n:
        most //= 2
    return most


def scratch(what: Product, lanes: int) -> str:
    """What :func:`finish` works on: ``val``, and where it needs it more."""
    return registers("val", (lanes,)) + (
        exp_scratch(lanes) + registers("gate", (lanes,)) if what.finish == "gate" else ""
    )


def finish(what: Product, token: str, lanes: int) -> str:
    """Store ``val (lanes)`` as outputs ``row ...`` of a token."""
    at = f"[{token}, row + l]"
    text = ""
    value = "val[l]"
    if what.finish == "square":
        value = "T.Select(val[l] < T.float32(0), T.float32(0), val[l] * val[l])"
    if what.finish == "add":
        value = f"({f32(f'x0{at}', what.dtype)} + val[l])"
    if what.finish == "gate":
        gate = f"(T.float32(0) - {f32(f'r0{at}', what.dtype)})"
        text = f"for l in T.vectorized({lanes}):\n{indent(exp_lines('gate[l]', gate), 1)}\n"
        value = f"({f32(f'x0{at}', what.dtype)} + val[l] / (T.float32(1) + gate[l]))"
    if what.halve:
        value = f"({value} * T.float32(0.5))"
    return text + f"for l in T.vectorized({lanes}):\n    y{at} = {cast(value, what.out)}\n"
