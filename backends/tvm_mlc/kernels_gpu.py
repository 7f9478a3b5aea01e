"""The kernels that :mod:`backends.tvm_mlc.graph` asks for, for GPUs: no intrinsic that one target lacks.

Vectors give a thread to an element. A product by rows (NK) gives a block of threads to an output, whose parts
are added up in shared memory; one by columns (KN) gives a thread to an output, neighbours reading neighbours.
"""

from __future__ import annotations

from backends.tvm_mlc.product import Product
from backends.tvm_mlc.storage import Kept
from backends.tvm_mlc.tir_text import Buffer, Kernel, Size, cast, f32, indent, kernel

#: Threads of a block: what every target allows, and a whole number of warps on all.
THREADS = 64


def embed(name: str, rows: Size, n_vocab: int, width: int, how: Kept, dtype: str) -> Kernel:
    """``ids (1, rows)`` int32 and the table -> ``y (rows, width)``."""
    ids = Buffer("ids", (1, rows), "int32")
    y = Buffer("y", (rows, width), dtype)
    if how.bits:
        shapes = ((n_vocab, how.words(width)), (n_vocab, how.groups(width)))
        table = [Buffer("q", shapes[0], "uint32"), Buffer("s", shapes[1], how.dtype)]
        value = cast(_weight(how, "ids[0, t]", "c"), dtype)
    else:
        table = [Buffer("w", (n_vocab, width), how.dtype)]
        value = "w[ids[0, t], c]"
    return kernel(name, [ids, *table], [y], _elements(rows, width, f"y[t, c] = {value}"))


def layer_norm(name: str, rows: Size, width: int, dtype: str, eps: float) -> Kernel:
    """``x (rows, width)`` -> ``y``: a block of threads to a row."""
    x, y = (Buffer(b, (rows, width), dtype) for b in "xy")
    weight, bias = (Buffer(b, (width,), dtype) for b in ("weight", "bias"))
    value = f32(f"x[t, i * {THREADS} + l]", dtype)
    scale = "T.float32(1) / T.sqrt(" + f"total[0] * T.float32({1 / width!r}) + T.float32({eps!r}))"
    out = f"({value} - mean[0]) * part[0] * {f32(f'weight[i * {THREADS} + l]', dtype)}"
    out = f"({out} + {f32(f'bias[i * {THREADS} + l]', dtype)})"
    body = f"""
total = T.alloc_buffer(({THREADS},), "float32", scope="shared")
part = T.alloc_buffer((1,), "float32", scope="local")
mean = T.alloc_buffer((1,), "float32", scope="local")
{_sum(value, width)}
mean[0] = total[0] * T.float32({1 / width!r})
T.tvm_storage_sync("shared")
{_sum(f"({value} - mean[0]) * ({value} - mean[0])", width)}
part[0] = {scale}
for i in range({-(-width // THREADS)}):
    if i * {THREADS} + l < {width}:
        y[t, i * {THREADS} + l] = {cast(out, dtype)}
"""
    return kernel(name, [x, weight, bias], [y], _blocks(rows, 1, body))


def mix(name: str, rows: Size, width: int, dtype: str, channels: str) -> Kernel:
    """Token shift: ``h (rows, width)`` and the row before it -> ``x{c} = mu_c h_t + (1 - mu_c) h_{t-1}``."""
    h, past = Buffer("h", (rows, width), dtype), Buffer("past", (1, width), dtype)
    mus = [Buffer(f"mu_{c}", (width,), dtype) for c in channels]
    outs = [Buffer(f"x{c}", (rows, width), dtype) for c in channels]
    before = "past[0, c]" if rows == 1 else "T.if_then_else(t == 0, past[0, c], h[T.max(t - 1, 0), c])"
    lines = []
    for c in channels:
        mu = f32(f"mu_{c}[c]", dtype)
        value = f"({f32('h[t, c]', dtype)} * {mu} + {f32(before, dtype)} * (T.float32(1) - {mu}))"
        lines.append(f"x{c}[t, c] = {cast(value, dtype)}")
    return kernel(name, [h, past, *mus], outs, _elements(rows, width, "\n".join(lines)))


def last_row(name: str, width: int, dtype: str) -> Kernel:
    """``x (n, width)`` -> its last row ``(1, width)``."""
    body = _elements(1, width, "y[t, c] = x[n - 1, c]")
    return kernel(name, [Buffer("x", ("n", width), dtype)], [Buffer("y", (1, width), dtype)], body)


def wkv(name: str, rows: Size, width: int, dtype: str) -> Kernel:
    """The recurrence and its gate, a thread to a channel: as :func:`backends.tvm_mlc.rows_cpu.wkv`."""
    k, v, r = (Buffer(b, (rows, width), dtype) for b in ("k", "v", "r"))
    w, u = (Buffer(b, (width,), "float32") for b in ("w", "u"))
    past = [Buffer(f"{b}_in", (1, width), "float32") for b in ("aa", "bb", "pp")]
    outs = [Buffer(b, (rows, width), dtype) for b in ("y", "raw")]
    sums = [Buffer(b, (1, width), "float32") for b in ("aa", "bb", "pp")]
    kk, vv, rr = (f32(f"{b}[t, c]", dtype) for b in "kvr")
    body = f"""
s = T.alloc_buffer((7,), "float32", scope="local")
s[0] = aa_in[0, c]
s[1] = bb_in[0, c]
s[2] = pp_in[0, c]
for t in range({rows}):
    s[3] = T.Select(s[2] > u[c] + {kk}, s[2], u[c] + {kk})
    s[4] = T.exp(s[2] - s[3])
    s[5] = T.exp(u[c] + {kk} - s[3])
    s[6] = (s[4] * s[0] + s[5] * {vv}) / (s[4] * s[1] + s[5])
    raw[t, c] = {cast("s[6]", dtype)}
    y[t, c] = {cast(f"(s[6] / (T.float32(1) + T.exp(T.float32(0) - {rr})))", dtype)}
    s[3] = T.Select(s[2] + w[c] > {kk}, s[2] + w[c], {kk})
    s[4] = T.exp(s[2] + w[c] - s[3])
    s[5] = T.exp({kk} - s[3])
    s[0] = s[4] * s[0] + s[5] * {vv}
    s[1] = s[4] * s[1] + s[5]
    s[2] = s[3]
aa[0, c] = s[0]
bb[0, c] = s[1]
pp[0, c] = s[2]
"""
    return kernel(name, [k, v, r, w, u, *past], [*outs, *sums], _elements(None, width, body))


def softmax(name: str, width: int) -> Kernel:
    """``softmax(x / temperature)`` over ``x (1, 1, width)``: one block of threads, each of which finds the largest."""
    value = f"T.exp((x[0, 0, i * {THREADS} + l] - largest[0]) / temperature[()])"
    body = f"""
total = T.alloc_buffer(({THREADS},), "float32", scope="shared")
largest = T.alloc_buffer((1,), "float32", scope="local")
largest[0] = x[0, 0, 0]
for i in range({width}):
    largest[0] = T.Select(x[0, 0, i] <= largest[0], largest[0], x[0, 0, i])
{_sum(value, width)}
for i in range({-(-width // THREADS)}):
    if i * {THREADS} + l < {width}:
        y[0, 0, i * {THREADS} + l] = {value} / total[0]
"""
    inputs = [Buffer("x", (1, 1, width), "float32"), Buffer("temperature", (), "float32")]
    return kernel(name, inputs, [Buffer("y", (1, 1, width), "float32")], _blocks(1, 1, body))


def product(name: str, rows: Size, what: Product) -> Kernel:
    """``x (rows, K)``, the matrix (codes and scales), and what ``finish`` takes -> ``y (rows, N)``."""
    inputs = what.inputs(rows)
    if what.how.layout == "KN":
        body = f"""
acc = T.alloc_buffer((1,), "float32", scope="local")
acc[0] = T.float32(0)
for k in range({what.k}):
    acc[0] = acc[0] + {f32("x[t, k]", what.dtype)} * {_weight(what.how, "c", "k")}
{_finish(what, "acc[0]", "c")}
"""
        return kernel(name, inputs, [what.output(rows)], _elements(rows, what.n, body))
    k = f"i * {THREADS} + l"
    body = f"""
total = T.alloc_buffer(({THREADS},), "float32", scope="shared")
{_sum(f"{f32(f'x[t, {k}]', what.dtype)} * {_weight(what.how, 'o', f'({k})')}", what.k)}
if l == 0:
{indent(_finish(what, "total[0]", "o"), 1)}
"""
    return kernel(name, inputs, [what.output(rows)], _blocks(rows, what.n, body))


def _weight(how: Kept, n: str, k: str) -> str:
    """The weight of output ``n`` and input ``k``, as float32."""
    if not how.bits:
        return f32(f"w[{n}, {k}]" if how.layout == "NK" else f"w[{k}, {n}]", how.dtype)
    word, scale = f"{k} // {how.per_word}", f"{k} // {how.group}"
    at = (f"{n}, {word}", f"{n}, {scale}") if how.layout == "NK" else (f"{word}, {n}", f"{scale}, {n}")
    shifted = f"T.shift_right(q[{at[0]}], T.Cast('uint32', {k} % {how.per_word} * {how.bits}))"
    code = f"T.Cast('int32', T.bitwise_and({shifted}, T.uint32({2**how.bits - 1})))"
    return f"(T.Cast('float32', {code} - {how.zero}) * {f32(f's[{at[1]}]', how.dtype)})"


def _finish(what: Product, total: str, n: str) -> str:
    value = total
    if what.finish == "square":
        value = f"T.Select({total} < T.float32(0), T.float32(0), {total} * {total})"
    if what.finish == "add":
        value = f"({f32(f'x0[t, {n}]', what.dtype)} + {total})"
    if what.finish == "gate":
        gate = f"(T.float32(1) + T.exp(T.float32(0) - {f32(f'r0[t, {n}]', what.dtype)}))"
        value = f"({f32(f'x0[t, {n}]', what.dtype)} + {total} / {gate})"
    if what.halve:
        value = f"({value} * T.float32(0.5))"
    return f"y[t, {n}] = {cast(value, what.out)}"


def _sum(value: str, count: int) -> str:
    """``total[0]``: the sum of ``value`` over ``i * THREADS + l`` below ``count``, seen by every thread."""
    lines = [
        "total[l] = T.float32(0)",
        f"for i in range({-(-count // THREADS)}):",
        f"    if i * {THREADS} + l < {count}:",
        f"        total[l] = total[l] + {value}",
        'T.tvm_storage_sync("shared")',
    ]
    half = THREADS // 2
    while half:
        lines += [f"if l < {half}:", f"    total[l] = total[l] + total[l + {half}]", 'T.tvm_storage_sync("shared")']
        half //= 2
    return "\n".join(lines)


def _elements(rows: Size | None, width: int, body: str) -> str:
    """``body`` for every ``c`` below ``width``, and every token ``t`` where ``rows`` says how many."""
    inner = f"""
for b in T.thread_binding({-(-width // THREADS)}, thread="blockIdx.x"):
    for l in T.thread_binding({THREADS}, thread="threadIdx.x"):
        if b * {THREADS} + l < {width}:
            c = T.meta_var(b * {THREADS} + l)
{indent(body, 3)}
"""
    if rows is None:
        return inner
    return f'for t in T.thread_binding({rows}, thread="blockIdx.y"):\n{indent(inner, 1)}'


def _blocks(rows: Size, count: int, body: str) -> str:
    """``body`` for every token ``t`` and output ``o``, by the threads ``l`` of a block."""
    return f"""
for t in T.thread_binding({rows}, thread="blockIdx.y"):
    for o in T.thread_binding({count}, thread="blockIdx.x"):
        for l in T.thread_binding({THREADS}, thread="threadIdx.x"):
{indent(body, 3)}
"""
