"""Kernels over rows of activations, for CPUs: embedding, LayerNorm, token shift, the WKV recurrence, softmax.

``rows`` is 1 or ``"n"``. Values between kernels are of the model's type; inside one everything is float32.
"""

from __future__ import annotations

from backends.tvm_mlc.storage import Kept
from backends.tvm_mlc.tir_text import Buffer, Kernel, Size, cast, exp_lines, exp_scratch, f32, indent, kernel, lanes_of
from backends.tvm_mlc.tir_text import local as registers


def embed(name: str, rows: Size, n_vocab: int, width: int, how: Kept, dtype: str) -> Kernel:
    """``ids (1, rows)`` int32 and the table -> ``y (rows, width)``."""
    ids = Buffer("ids", (1, rows), "int32")
    y = Buffer("y", (rows, width), dtype)
    if not how.bits:
        value = cast(f32("w[ids[0, t], c]", how.dtype), dtype) if how.dtype != dtype else "w[ids[0, t], c]"
        table = [Buffer("w", (n_vocab, width), how.dtype)]
    else:
        mask, per_word, group = 2**how.bits - 1, how.per_word, how.group
        word = f"T.shift_right(q[ids[0, t], c // {per_word}], T.Cast('uint32', c % {per_word} * {how.bits}))"
        code = f"(T.Cast('int32', T.bitwise_and({word}, T.uint32({mask}))) - {how.zero})"
        scale = f32(f"s[ids[0, t], c // {group}]", how.dtype)
        value = cast(f"(T.Cast('float32', {code}) * {scale})", dtype)
        table = [
            Buffer("q", (n_vocab, how.words(width)), "uint32"),
            Buffer("s", (n_vocab, how.groups(width)), how.dtype),
        ]
    body = f"for t in range({rows}):\n    for c in range({width}):\n        y[t, c] = {value}\n"
    return kernel(name, [ids, *table], [y], body)


def layer_norm(name: str, rows: Size, width: int, dtype: str, eps: float) -> Kernel:
    """``x (rows, width)`` -> ``y``; the mean is taken out before squares are summed."""
    x, y = (Buffer(b, (rows, width), dtype) for b in "xy")
    weight, bias = (Buffer(b, (width,), dtype) for b in ("weight", "bias"))
    body = registers("total", (lanes_of(width),)) + registers("mean", (1,)) + registers("scale", (1,))
    body = f"{_tokens(rows)}\n" + indent(body + _norm(width, dtype, eps), 1)
    return kernel(name, [x, weight, bias], [y], body)


def _norm(width: int, dtype: str, eps: float) -> str:
    lanes = lanes_of(width)
    chunks = width // lanes
    x = f32(f"x[t, c * {lanes} + l]", dtype)

    def total(value: str) -> str:
        return f"""
for l in T.vectorized({lanes}):
    total[l] = T.float32(0)
for c in range({chunks}):
    for l in T.vectorized({lanes}):
        total[l] = total[l] + {value}
{sum_lanes("total", lanes)}
"""

    weight, bias = (f32(f"{name}[c * {lanes} + l]", dtype) for name in ("weight", "bias"))
    y = f"({x} - mean[0]) * scale[0] * {weight} + {bias}"
    return f"""
{total(x)}
mean[0] = total[0] * T.float32({1 / width!r})
{total(f"({x} - mean[0]) * ({x} - mean[0])")}
scale[0] = T.float32(1) / T.sqrt(total[0] * T.float32({1 / width!r}) + T.float32({eps!r}))
for c in range({chunks}):
    for l in T.vectorized({lanes}):
        y[t, c * {lanes} + l] = {cast(f"({y})", dtype)}
"""


def sum_lanes(name: str, lanes: int, at: str = "") -> str:
    """Halve a vector onto itself until its first element is the sum."""
    lines = []
    while lanes > 1:
        lanes //= 2
        lines.append(f"for l in T.vectorized({lanes}):")
        lines.append(f"    {name}[{at}l] = {name}[{at}l] + {name}[{at}l + {lanes}]")
    return "\n".join(lines)


def mix(name: str, rows: Size, width: int, dtype: str, channels: str) -> Kernel:
    """Token shift: ``h (rows, width)`` and the row before it -> ``x{c} = mu_c h_t + (1 - mu_c) h_{t-1}``."""
    lanes = lanes_of(width)
    h, past = Buffer("h", (rows, width), dtype), Buffer("past", (1, width), dtype)
    mus = [Buffer(f"mu_{c}", (width,), dtype) for c in channels]
    outs = [Buffer(f"x{c}", (rows, width), dtype) for c in channels]

    def lines(before: str) -> str:
        text = f"for c in range({width // lanes}):\n    for l in T.vectorized({lanes}):\n"
        for c in channels:
            mu = f32(f"mu_{c}[c * {lanes} + l]", dtype)
            value = f"{f32(f'h[t, c * {lanes} + l]', dtype)} * {mu} + {f32(before, dtype)} * (T.float32(1) - {mu})"
            text += f"        x{c}[t, c * {lanes} + l] = {cast(f'({value})', dtype)}\n"
        return text

    first = "for t in range(1):\n" + indent(lines(f"past[0, c * {lanes} + l]"), 1)
    if rows == 1:
        return kernel(name, [h, past, *mus], outs, first)
    others = f"for i in T.parallel({rows} - 1):\n" + indent(
        lines(f"h[i, c * {lanes} + l]").replace("[t, ", "[i + 1, "), 1
    )
    return kernel(name, [h, past, *mus], outs, f"{first}\n{others}")


def last_row(name: str, width: int, dtype: str) -> Kernel:
    """``x (n, width)`` -> its last row ``(1, width)``."""
    body = f"for c in range({width}):\n    y[0, c] = x[n - 1, c]\n"
    return kernel(name, [Buffer("x", ("n", width), dtype)], [Buffer("y", (1, width), dtype)], body)


def wkv(name: str, rows: Size, width: int, dtype: str) -> Kernel:
    """The recurrence and its gate: ``y = sigmoid(r) * wkv(k, v)`` and the new sums; state and sums in float32.

    ``w`` is ``-exp(time_decay)``. Outputs are ``y, wkv, aa, bb, pp``: what the gate has been applied to is one too.
    """
    lanes = lanes_of(width)
    k, v, r = (Buffer(b, (rows, width), dtype) for b in ("k", "v", "r"))
    w, u = (Buffer(b, (width,), "float32") for b in ("w", "u"))
    past = [Buffer(f"{b}_in", (1, width), "float32") for b in ("aa", "bb", "pp")]
    outs = [Buffer(b, (rows, width), dtype) for b in ("y", "raw")]
    sums = [Buffer(b, (1, width), "float32") for b in ("aa", "bb", "pp")]
    at = f"c * {lanes} + l"
    values = {b: f32(f"{b}[t, {at}]", dtype) for b in "kvr"}
    names = ("a", "b", "p", "top", "old", "new", "kk", "vv", "g", "o")
    scratch = "".join(registers(b, (lanes,)) for b in names) + exp_scratch(lanes)
    step = f"""
for l in T.vectorized({lanes}):
    kk[l] = {values["k"]}
    vv[l] = {values["v"]}
    top[l] = {_largest("p[l]", f"(u[{at}] + kk[l])")}
{_exponential("old[l]", "(p[l] - top[l])", lanes)}
{_exponential("new[l]", f"(u[{at}] + kk[l] - top[l])", lanes)}
{_exponential("g[l]", f"(T.float32(0) - {values['r']})", lanes)}
for l in T.vectorized({lanes}):
    o[l] = (old[l] * a[l] + new[l] * vv[l]) / (old[l] * b[l] + new[l])
    raw[t, {at}] = {cast("o[l]", dtype)}
    y[t, {at}] = {cast("(o[l] / (T.float32(1) + g[l]))", dtype)}
    top[l] = {_largest(f"(p[l] + w[{at}])", "kk[l]")}
{_exponential("old[l]", f"(p[l] + w[{at}] - top[l])", lanes)}
{_exponential("new[l]", "(kk[l] - top[l])", lanes)}
for l in T.vectorized({lanes}):
    a[l] = old[l] * a[l] + new[l] * vv[l]
    b[l] = old[l] * b[l] + new[l]
    p[l] = top[l]
"""
    start = "".join(f"    {b}[l] = {b * 2}_in[0, {at}]\n" for b in "abp")
    end = "".join(f"    {b * 2}[0, {at}] = {b}[l]\n" for b in "abp")
    body = f"for l in T.vectorized({lanes}):\n{start}for t in range({rows}):\n{indent(step, 1)}\n"
    body += f"for l in T.vectorized({lanes}):\n{end}"
    loop = "range" if rows == 1 else "T.parallel"
    whole = f"for c in {loop}({width // lanes}):\n{indent(scratch + body, 1)}"
    return kernel(name, [k, v, r, w, u, *past], [*outs, *sums], whole)


def softmax(name: str, width: int) -> Kernel:
    """``softmax(x / temperature)`` over ``x (1, 1, width)``."""
    body = """
largest = T.alloc_buffer((1,), "float32")
total = T.alloc_buffer((1,), "float32")
largest[0] = x[0, 0, 0]
total[0] = T.float32(0)
for c in range(WIDTH):
    largest[0] = T.Select(x[0, 0, c] <= largest[0], largest[0], x[0, 0, c])
for c in range(WIDTH):
    y[0, 0, c] = T.exp((x[0, 0, c] - largest[0]) / temperature[()])
    total[0] = total[0] + y[0, 0, c]
for c in range(WIDTH):
    y[0, 0, c] = y[0, 0, c] / total[0]
""".replace("WIDTH", str(width))
    inputs = [Buffer("x", (1, 1, width), "float32"), Buffer("temperature", (), "float32")]
    return kernel(name, inputs, [Buffer("y", (1, 1, width), "float32")], body)


def _largest(a: str, b: str) -> str:
    """The larger of two, NaN if the second is; the first being NaN shows in the exponential of the difference."""
    return f"T.Select({a} > {b}, {a}, {b})"


def _exponential(target: str, source: str, lanes: int) -> str:
    return f"for l in T.vectorized({lanes}):\n{indent(exp_lines(target, source), 1)}"


def _tokens(rows: Size) -> str:
    return "for t in range(1):" if rows == 1 else f"for t in T.parallel({rows}):"
