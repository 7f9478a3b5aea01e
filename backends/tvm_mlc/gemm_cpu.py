"""A prompt: ``x (n, K)`` by a matrix of N outputs.

A task dequantizes its outputs' weights once, into a panel ``wide (K, columns)`` whose lanes lie along N, and multiplies
it with all tokens, some at a time, which stay in registers while the panel is read. Rows of an NK matrix are turned
on their way into the panel.
"""

from __future__ import annotations

import os

from backends.tvm_mlc.codes_cpu import code, shrink
from backends.tvm_mlc.finish_cpu import block, finish, scratch, tasks
from backends.tvm_mlc.product import Product
from backends.tvm_mlc.tir_text import f32, indent
from backends.tvm_mlc.tir_text import local as registers

#: Outputs of a task, and tokens that are multiplied together.
_COLUMNS, _TOKENS = int(os.environ.get("GC", "32")), int(os.environ.get("GT", "8"))

#: Rows and columns of what is turned at once.
_SQUARE = 16


def rows_of_matrix(what: Product) -> str:
    """The body of a kernel over an NK matrix."""
    columns = block(what.n, _COLUMNS)
    lanes = min(columns, _SQUARE)
    element = "uint32" if what.how.bits else "float32"
    fill = "".join(f'{name} = T.alloc_buffer(({_SQUARE * lanes},), "{element}")\n' for name in ("turn", "turned"))
    fill += registers("sc", (lanes,))
    length = what.how.words(what.k) if what.how.bits else what.k
    full = length // _SQUARE if lanes == _SQUARE else 0
    for h in range(columns // lanes):
        fill += f"for c in range({full}):\n{indent(_square(what, h), 1)}\n" if full else ""
        rest = length - full * _SQUARE
        if rest:
            fill += f"for e in range({rest}):\n{indent(_gathered(what, h, lanes, full * _SQUARE), 1)}\n"
    return _multiplied(what, columns, fill)


def columns_of_matrix(what: Product) -> str:
    """The body of a kernel over a KN matrix, which is quantized."""
    columns, how = block(what.n, _COLUMNS), what.how
    stores = _stores(
        what,
        f"q[c * {how.words_per_group} + j, row + l]",
        "s[c, row + l]",
        f"(c * {how.words_per_group} + j)",
        "l",
    )
    fill = f"""
for c in range({how.groups(what.k)}):
    for j in range({how.words_per_group}):
        for l in T.vectorized({columns}):
{indent(stores, 3)}
"""
    return _multiplied(what, columns, fill)


def _square(what: Product, h: int) -> str:
    """Turn 16 words, or weights, of each of 16 rows, and put them into the panel."""
    how = what.how
    name, dtype = ("q", "uint32") if how.bits else ("w", how.dtype)
    text = ""
    for r in range(_SQUARE):
        loaded = f"{name}[row + {h * _SQUARE + r}, T.Ramp(c * {_SQUARE}, 1, {_SQUARE})]"
        if dtype == "float16":
            loaded = f'T.Cast("float32x{_SQUARE}", {loaded})'
        text += f"turn[T.Ramp({r * _SQUARE}, 1, {_SQUARE})] = {loaded}\n"
    source, target = "turn", "turned"
    for _ in range(4):  # interleaving the halves of 16 rows four times turns them
        for i in range(8):
            halves = ", ".join(f"{source}[T.Ramp({j * _SQUARE}, 1, {_SQUARE})]" for j in (i, i + 8))
            for side in (0, 1):
                order = [8 * side + j // 2 + (_SQUARE if j % 2 else 0) for j in range(_SQUARE)]
                text += f"{target}[T.Ramp({(2 * i + side) * _SQUARE}, 1, {_SQUARE})] = T.Shuffle([{halves}], {order})\n"
        source, target = target, source
    if not how.bits:
        return (
            text
            + f"""
for e in range({_SQUARE}):
    for l in T.vectorized({_SQUARE}):
        wide[c * {_SQUARE} + e, {h * _SQUARE} + l] = turn[e * {_SQUARE} + l]
"""
        )
    each = how.words_per_group
    group = f"c * {_SQUARE // each} + g"
    stores = _stores(
        what, f"turn[(g * {each} + j) * {_SQUARE} + l]", "sc[l]", f"(({group}) * {each} + j)", f"{h * _SQUARE} + l"
    )
    return (
        text
        + f"""
for g in range({_SQUARE // each}):
    for l in T.vectorized({_SQUARE}):
        sc[l] = {f32(f"s[row + {h * _SQUARE} + l, {group}]", how.dtype)}
    for j in range({each}):
        for l in T.vectorized({_SQUARE}):
{indent(stores, 3)}
"""
    )


def _gathered(what: Product, h: int, lanes: int, start: int) -> str:
    """Put word, or weight, ``start + e`` of each of ``lanes`` rows into the panel."""
    how, at = what.how, f"({start} + e)"
    if not how.bits:
        value = f32(f"w[row + {h * lanes} + l, {at}]", how.dtype)
        return f"for l in T.vectorized({lanes}):\n    wide[{at}, {h * lanes} + l] = {value}\n"
    stores = _stores(what, "turn[l]", "sc[l]", at, f"{h * lanes} + l")
    return f"""
for l in T.vectorized({lanes}):
    turn[l] = q[row + {h * lanes} + l, {at}]
    sc[l] = {f32(f"s[row + {h * lanes} + l, {at} // {how.words_per_group}]", how.dtype)}
for l in T.vectorized({lanes}):
{indent(stores, 1)}
"""


def _stores(what: Product, word: str, scale: str, at: str, column: str) -> str:
    """Dequantize the codes of word ``at`` of a row or column into the panel."""
    how = what.how
    wide = scale if scale.startswith("sc") else f32(scale, how.dtype)
    return "\n".join(
        f"wide[{at} * {how.per_word} + {i}, {column}] = {code(how, word, i)} * ({wide} * {shrink(how, i)})"
        for i in range(how.per_word)
    )


def _multiplied(what: Product, columns: int, fill: str) -> str:
    """Fill the panel, then multiply it with all tokens."""
    width = what.how.groups(what.k) * what.how.group if what.how.bits else what.k
    body = f'wide = T.alloc_buffer(({width}, {columns}), "float32")\n{fill}\n'
    body += f"""
if n >= {_TOKENS}:
    for g in range((n + {_TOKENS - 1}) // {_TOKENS}):
        t = T.meta_var(T.min(g * {_TOKENS}, n - {_TOKENS}))
{indent(_tile(what, _TOKENS, columns), 2)}
else:
    for t in range(n):
{indent(_tile(what, 1, columns), 2)}
"""
    return _as_float32(what) + tasks(what.n, columns, body)


def _tile(what: Product, tokens: int, columns: int) -> str:
    """``tokens`` from ``t`` on by the panel."""
    text = "".join(registers(f"acc{i}", (columns,)) for i in range(tokens))
    text += scratch(what, columns)
    text += f"for l in T.vectorized({columns}):\n"
    text += "".join(f"    acc{i}[l] = T.float32(0)\n" for i in range(tokens))
    text += f"for c in range({what.k}):\n    for l in T.vectorized({columns}):\n"
    text += "".join(f"        acc{i}[l] = acc{i}[l] + x1[t + {i}, c] * wide[c, l]\n" for i in range(tokens))
    for i in range(tokens):
        text += f"for l in T.vectorized({columns}):\n    val[l] = acc{i}[l]\n{finish(what, f't + {i}', columns)}\n"
    return text


def _as_float32(what: Product) -> str:
    if what.dtype == "float32":
        return "x1 = T.meta_var(x)\n"
    text = f'x1 = T.alloc_buffer((n, {what.k}), "float32")\nfor t in T.parallel(n):\n'
    return text + f"    for c in range({what.k}):\n        x1[t, c] = {f32('x[t, c]', what.dtype)}\n"
