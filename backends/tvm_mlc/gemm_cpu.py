"""A prompt: ``x (n, K)`` by a matrix of N outputs.

A task dequantizes its outputs' weights once, into a panel ``wide (K, columns)`` whose lanes lie along N, and multiplies
it with all tokens, some at a time, which stay in registers while the panel is read. Rows of an NK matrix are turned
on their way into the panel.
"""

from __future__ import annotations

from backends.tvm_mlc.codes_cpu import code, shrink
from backends.tvm_mlc.finish_cpu import block, finish, scratch, tasks
from backends.tvm_mlc.product import Product
from backends.tvm_mlc.storage import Kept
from backends.tvm_mlc.tir_text import f32, indent
from backends.tvm_mlc.tir_text import local as registers

#: Outputs of a task, and tokens that are multiplied together.
_COLUMNS, _TOKENS = 32, 8

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
            fill += f"for j in range({rest}):\n{indent(_gathered(what, h, lanes, full * _SQUARE), 1)}\n"
    return _multiplied(what, columns, fill)


def columns_of_matrix(what: Product) -> str:
    """The body of a kernel over a KN matrix, which is quantized."""
    columns, how = block(what.n, _COLUMNS), what.how
    word, scale = f"c * {how.words_per_group} + j", f32("s[c, row + l]", how.dtype)
    fill = f"""
for c in range({how.groups(what.k)}):
    for j in range({how.words_per_group}):
        for l in T.vectorized({columns}):
{indent(_stores(how, f"q[{word}, row + l]", scale, word, "l"), 3)}
"""
    return _multiplied(what, columns, fill)


def _square(what: Product, h: int) -> str:
    """Turn 16 words, or weights, of each of 16 rows, and put them into the panel."""
    how, column = what.how, f"{h * _SQUARE} + l"
    name, dtype = ("q", "uint32") if how.bits else ("w", how.dtype)
    text = ""
    for r in range(_SQUARE):
        row = f"{name}[row + {h * _SQUARE + r}, T.Ramp(c * {_SQUARE}, 1, {_SQUARE})]"
        row = f'T.Cast("float32x{_SQUARE}", {row})' if dtype == "float16" else row
        text += f"turn[T.Ramp({r * _SQUARE}, 1, {_SQUARE})] = {row}\n"
    text += _turned()
    if not how.bits:
        stores = f"wide[c * {_SQUARE} + j, {column}] = turn[j * {_SQUARE} + l]"
        return text + f"for j in range({_SQUARE}):\n    for l in T.vectorized({_SQUARE}):\n{indent(stores, 2)}\n"
    each = how.words_per_group
    group = f"c * {_SQUARE // each} + i"
    stores = _stores(how, f"turn[(i * {each} + j) * {_SQUARE} + l]", "sc[l]", f"({group}) * {each} + j", column)
    return f"""
{text}
for i in range({_SQUARE // each}):
    for l in T.vectorized({_SQUARE}):
        sc[l] = {f32(f"s[row + {column}, {group}]", how.dtype)}
    for j in range({each}):
        for l in T.vectorized({_SQUARE}):
{indent(stores, 3)}
"""


def _turned() -> str:
    """Interleave the first half of 16 rows with the second; four times that makes rows of columns."""
    lines, source, target = [], "turn", "turned"
    for _ in range(4):
        for i in range(_SQUARE):
            halves = ", ".join(f"{source}[T.Ramp({r * _SQUARE}, 1, {_SQUARE})]" for r in (i // 2, i // 2 + 8))
            order = [i % 2 * 8 + lane // 2 + lane % 2 * _SQUARE for lane in range(_SQUARE)]
            lines.append(f"{target}[T.Ramp({i * _SQUARE}, 1, {_SQUARE})] = T.Shuffle([{halves}], {order})\n")
        source, target = target, source
    return "".join(lines)


def _gathered(what: Product, h: int, lanes: int, start: int) -> str:
    """Put word, or weight, ``start + j`` of each of ``lanes`` rows into the panel."""
    how, at, column = what.how, f"{start} + j", f"{h * lanes} + l"
    if not how.bits:
        value = f32(f"w[row + {column}, {at}]", how.dtype)
        return f"for l in T.vectorized({lanes}):\n    wide[{at}, {column}] = {value}\n"
    return f"""
for l in T.vectorized({lanes}):
    turn[l] = q[row + {column}, {at}]
    sc[l] = {f32(f"s[row + {column}, ({at}) // {how.words_per_group}]", how.dtype)}
for l in T.vectorized({lanes}):
{indent(_stores(how, "turn[l]", "sc[l]", at, column), 1)}
"""


def _stores(how: Kept, word: str, scale: str, at: str, column: str) -> str:
    """Dequantize the codes of word ``at`` of a row or column into the panel."""
    return "\n".join(
        f"wide[({at}) * {how.per_word} + {i}, {column}] = {code(how, word, i)} * ({scale} * {shrink(how, i)})"
        for i in range(how.per_word)
    )


def _multiplied(what: Product, columns: int, fill: str) -> str:
    """Fill the panel, then multiply it with all tokens."""
    width = what.how.groups(what.k) * what.how.group if what.how.bits else what.k
    body = f'wide = T.alloc_buffer(({width}, {columns}), "float32")\n{fill}\n'
    body += f"""
for g in range((n + {_TOKENS - 1}) // {_TOKENS}):
{indent(_tile(what, columns), 1)}
"""
    return _as_float32(what) + tasks(what.n, columns, body)


def _tile(what: Product, columns: int) -> str:
    """Tokens ``g * _TOKENS ...`` by the panel; where there are no more of them, the last one again."""
    token = [f"T.min(g * {_TOKENS} + {i}, n - 1)" for i in range(_TOKENS)]
    text = "".join(registers(f"acc{i}", (columns,)) for i in range(_TOKENS)) + scratch(what, columns)
    text += f"for l in T.vectorized({columns}):\n"
    text += "".join(f"    acc{i}[l] = T.float32(0)\n" for i in range(_TOKENS))
    text += f"for c in range({what.k}):\n    for l in T.vectorized({columns}):\n"
    text += "".join(f"        acc{i}[l] = acc{i}[l] + x1[{t}, c] * wide[c, l]\n" for i, t in enumerate(token))
    for i, t in enumerate(token):
        text += f"for l in T.vectorized({columns}):\n    val[l] = acc{i}[l]\n{finish(what, t, columns)}\n"
    return text


def _as_float32(what: Product) -> str:
    if what.dtype == "float32":
        return "x1 = T.meta_var(x)\n"
    text = f'x1 = T.alloc_buffer((n, {what.k}), "float32")\nfor t in T.parallel(n):\n'
    return text + f"    for c in range({what.k}):\n        x1[t, c] = {f32('x[t, c]', what.dtype)}\n"
