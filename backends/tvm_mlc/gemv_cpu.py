"""One token: ``x (1, K)`` by a matrix of N outputs, weights dequantized as they are read, once each.

NK  a task takes a few rows, one after the other as they lie in memory; lanes lie along K.
KN  a task takes some columns; lanes lie along N, and of each row of the matrix it reads a short piece.

Both are bound by memory. Processors do not fetch far enough ahead of the first, and not at all ahead of the second,
so each line is asked for some thousand bytes before it is used. An address beyond the matrix is not read.
"""

from __future__ import annotations

from typing import NamedTuple

from backends.tvm_mlc.codes_cpu import code, shrink
from backends.tvm_mlc.finish_cpu import block, finish, scratch, tasks
from backends.tvm_mlc.product import Product
from backends.tvm_mlc.storage import Kept
from backends.tvm_mlc.tir_text import f32, indent
from backends.tvm_mlc.tir_text import local as registers

#: Outputs of a task.
_ROWS, _COLUMNS = 16, 64

#: How far ahead lines are asked for: bytes of rows that follow each other; rows of which pieces are read.
_BYTES_AHEAD, _ROWS_AHEAD = 5000, 16

_LINE = 64


class _Piece(NamedTuple):
    """``vectors`` of ``lanes`` words, or unquantized weights, from ``start`` of a row on."""

    start: int
    vectors: int
    lanes: int


def rows_of_matrix(what: Product) -> str:
    """The body of a kernel over an NK matrix."""
    rows, pieces = block(what.n, _ROWS), _pieces(what)
    lanes = pieces[0].lanes
    half = max(lanes // 2, 1)
    text = registers("sums", (rows * half,)) + scratch(what, rows)
    text += registers("acc", (lanes,)) + registers("sc", (lanes,))
    steps = "\n".join(
        f"for c in range({piece.vectors}):\n{indent(_row_step(what, piece), 1)}" for piece in pieces if piece.vectors
    )
    folded = "acc[l]" if lanes == 1 else f"acc[l] + acc[l + {half}]"
    text += f"""
for r in range({rows}):
    for l in T.vectorized({lanes}):
        acc[l] = T.float32(0)
{indent(steps, 1)}
    for l in T.vectorized({half}):
        sums[r * {half} + l] = {folded}
{_pairs(rows, half)}
for l in T.vectorized({rows}):
    val[l] = sums[l]
{finish(what, "0", rows)}
"""
    return _laid_out(what) + tasks(what.n, rows, text)


def _row_step(what: Product, piece: _Piece) -> str:
    """Multiply a vector of a row with its inputs, into ``acc``."""
    how, lanes = what.how, piece.lanes
    at = f"{piece.start} + c * {lanes} + l"
    name, length, size = ("q", how.words(what.k), 4) if how.bits else ("w", what.k, _size(how.dtype))
    text = ""
    if lanes * size >= _LINE // 2:
        far = -(-_BYTES_AHEAD // (length * size))
        text += _ask(f"{name}[row + r + {far}, {piece.start} + c * {lanes}]")
    value = f"x1[{at}] * {f32(f'{name}[row + r, {at}]', how.dtype)}"
    if how.bits:
        terms = (f"{code(how, f'q[row + r, {at}]', i)} * x1[{i * length} + {at}]" for i in range(how.per_word))
        value = f"({' + '.join(terms)}) * sc[l]"
        text += _scales(how, piece)
    return text + f"for l in T.vectorized({lanes}):\n    acc[l] = acc[l] + {value}\n"


def _pieces(what: Product) -> list[_Piece]:
    """A row in vectors of 16 words or weights, and the rest of it in shorter ones."""
    how = what.how
    length = how.words(what.k) if how.bits else what.k
    least = how.words_per_group if how.bits else 1
    found, start, lanes = [], 0, 16
    while start < length:
        count = (length - start) // lanes if lanes > least else -(-(length - start) // least)
        if count:
            found.append(_Piece(start, count, max(lanes, least)))
            start += count * max(lanes, least)
        lanes //= 2
    return found


def _scales(how: Kept, piece: _Piece) -> str:
    """``sc``: the scale of each word of a vector."""
    each = how.words_per_group
    count = piece.lanes // each
    if count == 1:
        scale = f32(f"s[row + r, {piece.start // each} + c]", how.dtype)
        return f"for l in T.vectorized({piece.lanes}):\n    sc[l] = {scale}\n"
    order = [i // each for i in range(piece.lanes)]  # of as many lanes as it has elements
    vector = f"s[row + r, T.Ramp({piece.start // each} + c * {count}, 1, {count})]"
    wide = vector if how.dtype == "float32" else f'T.Cast("float32x{count}", {vector})'
    return f"sc[T.Ramp(0, 1, {piece.lanes})] = T.Shuffle([{', '.join([wide] * each)}], {order})\n"


def _pairs(rows: int, lanes: int) -> str:
    """Add neighbours in ``sums (rows * lanes)`` until each row is one element: all rows at once."""
    lines, length = [], rows * lanes
    while length > rows:
        length //= 2
        width = min(16, length)
        for i in range(length // width):
            whole = ", ".join(f"sums[T.Ramp({(2 * i + side) * width}, 1, {width})]" for side in (0, 1))
            sides = (f"T.Shuffle([{whole}], {list(range(side, 2 * width, 2))})" for side in (0, 1))
            lines.append(f"sums[T.Ramp({i * width}, 1, {width})] = {' + '.join(sides)}")
    return "\n".join(lines)


def columns_of_matrix(what: Product) -> str:
    """The body of a kernel over a KN matrix, which is quantized."""
    columns, how = block(what.n, _COLUMNS), what.how
    words, each = how.words(what.k), how.words_per_group
    terms = " + ".join(
        f"{code(how, f'q[c * {each} + j, row + l]', i)} * x1[c * {how.group} + j * {how.per_word} + {i}]"
        for i in range(how.per_word)
    )
    text = registers("acc", (columns,)) + scratch(what, columns)
    text += f"""
for l in T.vectorized({columns}):
    acc[l] = T.float32(0)
for c in range({how.groups(what.k)}):
    for l in T.vectorized({columns}):
        val[l] = T.float32(0)
{indent(_ask_piece(what, "s", "c", how.groups(what.k), columns), 1)}
    for j in range({each}):
{indent(_ask_piece(what, "q", f"(c * {each} + j)", words, columns), 2)}
        for l in T.vectorized({columns}):
            val[l] = val[l] + ({terms})
    for l in T.vectorized({columns}):
        acc[l] = acc[l] + val[l] * {f32("s[c, row + l]", how.dtype)}
for l in T.vectorized({columns}):
    val[l] = acc[l]
{finish(what, "0", columns)}
"""
    return _laid_out(what) + tasks(what.n, columns, text)


def _ask_piece(what: Product, name: str, at: str, length: int, columns: int) -> str:
    """Ask for the piece of a row some rows on; after the last rows for those of the next task's columns."""
    size, far = (4, _ROWS_AHEAD) if name == "q" else (_size(what.how.dtype), _ROWS_AHEAD // what.how.words_per_group)
    if columns * size < _LINE or length < far:
        return ""
    inside = f"{at} + {far} < {length}"
    row = f"T.Select({inside}, {at} + {far}, {at} + {far} - {length})"
    steps = [*range(0, columns, _LINE // size)]
    if what.n * size % _LINE:  # a piece begins and ends within a line
        steps.append(columns - 1)
    return "".join(_ask(f"{name}[{row}, row + T.Select({inside}, {o}, {o + columns})]") for o in steps)


def _ask(element: str) -> str:
    """Begin to bring the line of an element into the nearest cache."""
    of_data_for_reading = "T.int32(0), T.int32(3), T.int32(1)"
    return f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of({element}), {of_data_for_reading}))\n'


def _laid_out(what: Product) -> str:
    """``x1``: x as float32, multiplied as :func:`backends.tvm_mlc.codes_cpu.code` wants, 0 beyond its end.

    For NK it is in the order in which a vector of words holds codes: first those of code 0 of every word.
    """
    how, k = what.how, what.k
    if not how.bits:
        value = f32("x[0, c]", what.dtype)
        return f'x1 = T.alloc_buffer(({k},), "float32")\nfor c in range({k}):\n    x1[c] = {value}\n'
    words, per_word = how.words(k), how.per_word
    full = k // per_word
    text = f'x1 = T.alloc_buffer(({words * per_word},), "float32")\n'
    for first, end in ((0, full), (full, words)):
        text += f"for c in range({first}, {end}):\n" if first < end else ""
        for i in range(per_word if first < end else 0):
            at = f"{i * words} + c" if how.layout == "NK" else f"c * {per_word} + {i}"
            value = f"{f32(f'x[0, T.min(c * {per_word} + {i}, {k - 1})]', what.dtype)} * {shrink(how, i)}"
            if end > full:
                value = f"T.Select(c * {per_word} + {i} < {k}, {value}, T.float32(0))"
            text += f"    x1[{at}] = {value}\n"
    return text


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
