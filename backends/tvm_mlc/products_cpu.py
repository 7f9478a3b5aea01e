"""Matrix products for CPUs, weights dequantized as they are read: ``x (rows, K)`` by a matrix of N outputs.

NK  a task takes a few rows of the matrix; lanes lie along K, and are added up at the end of a row.
    Codes lie eight to a word, so x is laid out anew first: code s of every word, word by word.
KN  a task takes some columns; lanes lie along N, and nothing is shuffled or added up.

A prompt dequantizes the rows or columns of a task once and multiplies them with all its tokens.
The last task is moved back where N does not divide, and computes a few outputs once more.
"""

from __future__ import annotations

from backends.tvm_mlc.product import Product
from backends.tvm_mlc.rows_cpu import sum_lanes
from backends.tvm_mlc.storage import Kept
from backends.tvm_mlc.tir_text import (
    Kernel,
    Size,
    cast,
    exp_lines,
    exp_scratch,
    f32,
    indent,
    kernel,
    lanes_of,
)
from backends.tvm_mlc.tir_text import local as registers


def product(name: str, rows: Size, what: Product) -> Kernel:
    """``x (rows, K)``, the matrix (codes and scales), and what ``finish`` takes -> ``y (rows, N)``."""
    bodies = {("NK", 1): _nk_one, ("NK", "n"): _nk_many, ("KN", 1): _kn_one, ("KN", "n"): _kn_many}
    return kernel(name, what.inputs(rows), [what.output(rows)], bodies[what.how.layout, rows](what))


# --- rows of the matrix


def _nk_one(what: Product) -> str:
    rows, lanes = _block(what.n, 4), _lanes(what)
    body = registers("acc", (rows, lanes)) + registers("val", (rows,)) + exp_scratch(rows)
    body += _zero("acc", rows, lanes)
    if not what.how.bits:
        product_of = f"x1[0, c * {lanes} + l] * {f32(f'w[row + r, c * {lanes} + l]', what.how.dtype)}"
        body += f"""
for c in range({what.k // lanes}):
    for r in T.unroll({rows}):
        for l in T.vectorized({lanes}):
            acc[r, l] = acc[r, l] + {product_of}
"""
    else:
        body += registers("part", (lanes,)) + registers("sc", (lanes,))
        word, words = f"q[row + r, c * {lanes} + l]", what.how.words(what.k)
        terms = " + ".join(
            f"{_code(what.how, word, i)} * x1[0, {i * words} + c * {lanes} + l]" for i in range(what.how.per_word)
        )
        body += f"""
for c in range({what.how.words(what.k) // lanes}):
    for r in T.unroll({rows}):
{indent(_scales(what.how, lanes), 2)}
        for l in T.vectorized({lanes}):
            acc[r, l] = acc[r, l] + ({terms}) * sc[l]
"""
    body += f"for r in T.unroll({rows}):\n{indent(sum_lanes('acc', lanes, 'r, '), 1)}\n    val[r] = acc[r, 0]\n"
    body += _finish(what, "0", "row", rows)
    return _laid_out(what, 1) + _tasks(what.n, rows, body)


def _nk_many(what: Product) -> str:
    rows, lanes, tokens = _block(what.n, 4), _lanes(what), 4
    width = _width(what)
    body = f'wide = T.alloc_buffer(({rows}, {width}), "float32")\n' + _dequantized(what, rows, lanes)

    def tile(count: int) -> str:
        text = registers("acc", (rows * count, lanes)) + registers("val", (rows,)) + exp_scratch(rows)
        text += _zero("acc", rows * count, lanes)
        text += f"""
for c in range({width // lanes}):
    for i in T.unroll({count}):
        for r in T.unroll({rows}):
            for l in T.vectorized({lanes}):
                acc[i * {rows} + r, l] = acc[i * {rows} + r, l] + x1[t + i, c * {lanes} + l] * wide[r, c * {lanes} + l]
for i in T.unroll({count}):
    for r in T.unroll({rows}):
{indent(sum_lanes("acc", lanes, f"i * {rows} + r, "), 2)}
        val[r] = acc[i * {rows} + r, 0]
{indent(_finish(what, "t + i", "row", rows), 1)}
"""
        return text

    body += _over_tokens(tokens, tile)
    return _laid_out(what, "n") + _tasks(what.n, rows, body)


def _dequantized(what: Product, rows: int, lanes: int) -> str:
    """Fill ``wide`` with the task's rows as float32, in the order of ``x1``."""
    if not what.how.bits:
        return f"""
for r in range({rows}):
    for c in range({what.k // lanes}):
        for l in T.vectorized({lanes}):
            wide[r, c * {lanes} + l] = {f32(f"w[row + r, c * {lanes} + l]", what.how.dtype)}
"""
    words = what.how.words(what.k)
    stores = "\n".join(
        f"wide[r, {i * words} + c * {lanes} + l] = {_code(what.how, f'q[row + r, c * {lanes} + l]', i)} * sc[l]"
        for i in range(what.how.per_word)
    )
    return f"""
for r in range({rows}):
    for c in range({words // lanes}):
{indent(registers("sc", (lanes,)) + _scales(what.how, lanes), 2)}
        for l in T.vectorized({lanes}):
{indent(stores, 3)}
"""


def _laid_out(what: Product, rows: Size) -> str:
    """``x1``: x as float32, in the order in which codes lie, 0 beyond its end."""
    lanes, width = _lanes(what), _width(what)
    text = f'x1 = T.alloc_buffer(({rows}, {width}), "float32")\n'
    text += "for t in range(1):\n" if rows == 1 else "for t in T.parallel(n):\n"
    if not what.how.bits:
        value = f32(f"x[t, c * {lanes} + l]", what.dtype)
        return (
            text
            + f"""
    for c in range({width // lanes}):
        for l in T.vectorized({lanes}):
            x1[t, c * {lanes} + l] = {value}
"""
        )
    words, per_word = what.how.words(what.k), what.how.per_word
    full = what.k // per_word
    text += f"""
    for c in range({full}):
        for i in T.unroll({per_word}):
            x1[t, i * {words} + c] = {f32(f"x[t, c * {per_word} + i]", what.dtype)}
"""
    if full < words:
        value = f32(f"x[t, T.min(c * {per_word} + i, {what.k - 1})]", what.dtype)
        text += f"""
    for c in range({full}, {words}):
        for i in T.unroll({per_word}):
            x1[t, i * {words} + c] = T.Select(c * {per_word} + i < {what.k}, {value}, T.float32(0))
"""
    return text


def _scales(how: Kept, lanes: int) -> str:
    """``sc``: the scale of each of ``lanes`` words."""
    count = lanes // how.words_per_group
    if count == 1:
        return f"for l in T.vectorized({lanes}):\n    sc[l] = {f32('s[row + r, c]', how.dtype)}\n"
    order = [i // how.words_per_group for i in range(lanes)]  # of as many lanes as it has elements
    vector = f"s[row + r, T.Ramp(c * {count}, 1, {count})]"
    wide = vector if how.dtype == "float32" else f'T.Cast("float32x{count}", {vector})'
    return f"sc[T.Ramp(0, 1, {lanes})] = T.Shuffle([{', '.join([wide] * how.words_per_group)}], {order})\n"


def _lanes(what: Product) -> int:
    if not what.how.bits:
        return lanes_of(what.k)
    return max(lanes_of(what.how.words(what.k)), what.how.words_per_group)


def _width(what: Product) -> int:
    return what.how.words(what.k) * what.how.per_word if what.how.bits else what.k


# --- columns of the transposed matrix


def _kn_one(what: Product) -> str:
    columns = _block(what.n, 64)
    body = registers("acc", (columns,)) + registers("val", (columns,)) + exp_scratch(columns)
    body += f"for l in T.vectorized({columns}):\n    acc[l] = T.float32(0)\n"
    if not what.how.bits:
        body += f"""
for c in range({what.k}):
    for l in T.vectorized({columns}):
        acc[l] = acc[l] + x1[0, c] * {f32("w[c, row + l]", what.how.dtype)}
"""
    else:
        how = what.how
        word, start = f"q[c * {how.words_per_group} + j, row + l]", f"c * {how.group} + j * {how.per_word}"
        terms = " + ".join(f"{_code(how, word, i)} * x1[0, {start} + {i}]" for i in range(how.per_word))
        body += f"""
for c in range({how.groups(what.k)}):
    for l in T.vectorized({columns}):
        val[l] = T.float32(0)
    for j in range({how.words_per_group}):
        for l in T.vectorized({columns}):
            val[l] = val[l] + {terms}
    for l in T.vectorized({columns}):
        acc[l] = acc[l] + val[l] * {f32("s[c, row + l]", how.dtype)}
"""
    body += f"for l in T.vectorized({columns}):\n    val[l] = acc[l]\n"
    body += _finish(what, "0", "row", columns)
    return _padded(what, 1) + _tasks(what.n, columns, body)


def _kn_many(what: Product) -> str:
    columns, tokens = _block(what.n, 32), 6
    width = _padded_width(what)
    body = f'wide = T.alloc_buffer(({width}, {columns}), "float32")\n'
    if not what.how.bits:
        body += f"""
for c in range({what.k}):
    for l in T.vectorized({columns}):
        wide[c, l] = {f32("w[c, row + l]", what.how.dtype)}
"""
    else:
        how = what.how
        value = f"{_code(how, 'q[c, row + l]', 'ID')} * {f32(f's[c // {how.words_per_group}, row + l]', how.dtype)}"
        stores = "\n".join(
            f"wide[c * {how.per_word} + {i}, l] = {value.replace('ID', str(i * how.bits))}" for i in range(how.per_word)
        )
        body += f"""
for c in range({how.words(what.k)}):
    for l in T.vectorized({columns}):
{indent(stores, 2)}
"""

    def tile(count: int) -> str:
        text = registers("acc", (count, columns)) + registers("val", (columns,)) + exp_scratch(columns)
        text += _zero("acc", count, columns)
        return (
            text
            + f"""
for c in range({width}):
    for i in T.unroll({count}):
        for l in T.vectorized({columns}):
            acc[i, l] = acc[i, l] + x1[t + i, c] * wide[c, l]
for i in T.unroll({count}):
    for l in T.vectorized({columns}):
        val[l] = acc[i, l]
{indent(_finish(what, "t + i", "row", columns), 1)}
"""
        )

    return _padded(what, "n") + _tasks(what.n, columns, body + _over_tokens(tokens, tile))


def _padded(what: Product, rows: Size) -> str:
    """``x1``: x as float32, 0 beyond its end."""
    width = _padded_width(what)
    text = f'x1 = T.alloc_buffer(({rows}, {width}), "float32")\n'
    text += "for t in range(1):\n" if rows == 1 else "for t in T.parallel(n):\n"
    text += f"    for c in range({what.k}):\n        x1[t, c] = {f32('x[t, c]', what.dtype)}\n"
    if width > what.k:
        text += f"    for c in range({what.k}, {width}):\n        x1[t, c] = T.float32(0)\n"
    return text


def _padded_width(what: Product) -> int:
    return what.how.groups(what.k) * what.how.group if what.how.bits else what.k


# --- both


def _code(how: Kept, word: str, position: int | str) -> str:
    """The value of a code of a word, as float32; ``position`` is its number in the word, or its shift as text."""
    shift = position * how.bits if isinstance(position, int) else position
    shifted = word if shift == 0 else f"T.shift_right({word}, T.uint32({shift}))"
    return f"T.Cast('float32', T.Cast('int32', T.bitwise_and({shifted}, T.uint32({2**how.bits - 1}))) - {how.zero})"


def _tasks(n: int, block: int, body: str) -> str:
    """``body`` for every block of outputs, which begins at ``row``."""
    start = f"b * {block}" if n % block == 0 else f"T.min(b * {block}, {n - block})"
    moved = body.replace("row + ", f"{start} + ")
    return f"for b in T.parallel({-(-n // block)}):\n{indent(moved, 1)}\n"


def _over_tokens(tokens: int, tile: object) -> str:
    assert callable(tile)
    text = f"for g in range(n // {tokens}):\n" + indent(tile(tokens).replace("[t + i,", f"[g * {tokens} + i,"), 1)
    rest = tile(1).replace("[t + i,", f"[n // {tokens} * {tokens} + g,")
    return f"{text}\nfor g in range(n % {tokens}):\n{indent(rest, 1)}\n"


def _zero(name: str, rows: int, lanes: int) -> str:
    return f"for r in T.unroll({rows}):\n    for l in T.vectorized({lanes}):\n        {name}[r, l] = T.float32(0)\n"


def _block(n: int, most: int) -> int:
    """``most``, or the largest power of two below where there are fewer outputs."""
    while most > n:
        most //= 2
    return most


def _finish(what: Product, token: str, row: str, lanes: int) -> str:
    """Store ``val (lanes)`` as outputs ``row ...`` of a token."""
    at = f"[{token}, {row} + l]"
    text = ""
    value = "val[l]"
    if what.finish == "square":
        value = "T.Select(val[l] < T.float32(0), T.float32(0), val[l] * val[l])"
    if what.finish == "add":
        value = f"({f32(f'x0{at}', what.dtype)} + val[l])"
    if what.finish == "gate":
        gate = f"(T.float32(0) - {f32(f'r0{at}', what.dtype)})"
        text = (
            registers("gate", (lanes,)) + f"for l in T.vectorized({lanes}):\n{indent(exp_lines('gate[l]', gate), 1)}\n"
        )
        value = f"({f32(f'x0{at}', what.dtype)} + val[l] / (T.float32(1) + gate[l]))"
    if what.halve:
        value = f"({value} * T.float32(0.5))"
    return text + f"for l in T.vectorized({lanes}):\n    y{at} = {cast(value, what.out)}\n"
