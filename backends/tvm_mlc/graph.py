"""RWKV-4 as a Relax module, with the entry points of MLC-LLM's libraries.

    prefill(input_ids (1, n) int32, placeholder, state, params) -> logits (1, 1, n_vocab) float32, state
    decode (input_ids (1, 1) int32, placeholder, state, params) -> the same
    create_kv_cache() -> state                      reset_kv_cache(state) -> state
    softmax_with_temperature(logits, temperature)   get_metadata() -> JSON
    score(...) -> logits (n, n_vocab) of every token, state
    trace_prefill(...), trace_decode(...) -> logits, state, and every point of backends.tvm_mlc.points

State and parameters are tuples. A state is ``5 L`` rows ``(1, n_embd)``, per layer att_x, aa, bb, pp, ffn_x; the
sums are float32, the others of the model's type. ``placeholder`` is the position in MLC's models with attention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from backends.tvm_mlc.library import ABI, ARCHITECTURE
from backends.tvm_mlc.product import Product
from backends.tvm_mlc.storage import kept, model_dtype, parameters
from backends.tvm_mlc.tir_text import Kernel, Size
from reference.config import Config
from reference.forward import LN_EPS, PP_START

#: Rows of one layer's state, in MLC's order.
STATE = ("att_x", "aa", "bb", "pp", "ffn_x")


def metadata(config: Config, scheme: str, target: str, rescale_every: int) -> str:
    """What ``get_metadata`` returns: what MLC-LLM's said, then what ours add."""
    mlc = {"model_name": "rwkv-4", "max_window_size": -1, "stop_tokens": [0], "add_prefix_space": False}
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_embd", "n_ffn", "n_vocab")}
    told = {**mlc, "model_type": ARCHITECTURE, "abi": ABI, "quantization": scheme, "target": target, **sizes}
    return json.dumps({**told, "rescale_every": rescale_every, "model_dtype": model_dtype(scheme)})


@dataclass
class Graph:
    """A module being built: kernels by name, and one function at a time.

    kernels  module of the functions that write kernels for the target's kind
    """

    config: Config
    scheme: str
    kernels: Any
    rescale_every: int = 0
    builder: Any = None
    _parsed: dict[str, Any] = field(default_factory=dict)

    def call(self, made: Kernel, arguments: list[Any], rows: Any) -> Any:
        """Run a kernel; its outputs, of ``rows`` tokens."""
        from tvm import relax
        from tvm.script import from_source

        if made.name not in self._parsed:
            self._parsed[made.name] = self.builder.add_func(from_source(made.text), made.name)
        types = [relax.TensorType([rows if s == "n" else s for s in b.shape], b.dtype) for b in made.outputs]
        call = relax.call_tir(self._parsed[made.name], relax.Tuple(arguments), types[0] if len(types) == 1 else types)
        out = self.builder.emit(call)
        return out if len(types) == 1 else [self.builder.emit(relax.TupleGetItem(out, i)) for i in range(len(types))]


def module(config: Config, scheme: str, kernels: Any, target: str, rescale_every: int = 0) -> Any:
    """The IRModule over ``kernels``: :mod:`backends.tvm_mlc.kernels_cpu` or ``kernels_gpu``."""
    from tvm import relax
    from tvm.ir import StringImm

    graph = Graph(config, scheme, kernels, rescale_every, relax.BlockBuilder())
    _step(graph, "decode", 1, "last")
    _step(graph, "prefill", "n", "last")
    _step(graph, "score", "n", "all")
    _step(graph, "trace_decode", 1, "trace")
    _step(graph, "trace_prefill", "n", "trace")
    _state_functions(graph)
    _softmax(graph)
    with graph.builder.function("get_metadata", []):
        graph.builder.emit_func_output(StringImm(metadata(config, scheme, target, rescale_every)))
    return graph.builder.finalize()


def _step(graph: Graph, name: str, rows: Size, logits: str) -> None:
    from tvm import relax, tirx

    from backends.tvm_mlc.graph_trace import traced

    config, dtype = graph.config, model_dtype(graph.scheme)
    n: Any = tirx.Var("n", "int64") if rows == "n" else 1
    wanted = parameters(config, graph.scheme)
    ids = relax.Var("input_ids", relax.TensorType([1, n], "int32"))
    placeholder = relax.Var("placeholder", relax.AnyType())
    state = relax.Var("state", relax.TupleType([_state_type(config, dtype, row) for row in STATE] * config.n_layer))
    params = relax.Var("params", relax.TupleType([relax.TensorType(list(p.shape), p.dtype) for p in wanted]))
    with graph.builder.function(name, [ids, placeholder, state, params], attrs={"num_input": 3}):
        with graph.builder.dataflow():
            step = Step(graph, rows, n, params, state)
            out, after = step.run(ids, logits)
            shown = [relax.Tuple(traced(step, rows, n))] if logits == "trace" else []
            result = graph.builder.emit_output(relax.Tuple([out, relax.Tuple(after), *shown]))
        graph.builder.emit_func_output(result)


class Step:
    """One entry point's body, over ``rows`` tokens.

    seen  what kernels have put out, by the name of the trace point, or of the matrix where it is its product
    """

    def __init__(self, graph: Graph, rows: Size, n: Any, params: Any, state: Any) -> None:
        self.graph, self.rows, self.n = graph, rows, n
        self.seen: dict[str, Any] = {}
        self.dtype = model_dtype(graph.scheme)
        self._params, self._state = params, state
        self._index = {(item.tensor, item.part): i for i, item in enumerate(parameters(graph.config, graph.scheme))}

    def run(self, ids: Any, logits: str) -> tuple[Any, list[Any]]:
        """Logits of the last token, or of all where ``logits`` is ``"all"``, and the new state."""
        config, make = self.graph.config, self.graph.kernels
        how = kept("emb.weight", self.graph.scheme)
        table = make.embed(self._name("embed"), self.rows, config.n_vocab, config.n_embd, how, self.dtype)
        x = self._see("emb", self._call(table, ids, *self._matrix("emb.weight")))
        x = self._norm(x, "blocks.0.ln0", 0)
        after: list[Any] = []
        for i in range(config.n_layer):
            past = [self._emit_item(self._state, 5 * i + row) for row in range(5)]
            x, sums = self._time_mix(x, i, past)
            x, ffn_x = self._channel_mix(x, i, past[4])
            after += [*sums, ffn_x]
        if logits == "trace":
            self.head(x)
        if logits == "all":
            return self.head(x), after
        x, self.rows, self.n = self._last(x), 1, 1
        return self._reshape(self.head(x, see=False), (1, 1, config.n_vocab)), after

    def head(self, x: Any, see: bool = True) -> Any:
        """Logits of the rows of the last residual."""
        config, every = self.graph.config, self.graph.rescale_every
        x = self._norm(x, "ln_out", config.n_layer // every if every else 0, see)
        out = self.product(x, "head.weight", config.n_vocab, config.n_embd, out="float32")
        return self._see("logits", out) if see else out

    def _time_mix(self, x: Any, i: int, past: list[Any]) -> tuple[Any, list[Any]]:
        make, c, at = self.graph.kernels, self.graph.config.n_embd, f"blocks.{i}.att."
        h = self._norm(x, f"blocks.{i}.ln1", self._halvings(i))
        xk, xv, xr = self._mix(h, past[0], at, "kvr")
        k = self._see(at + "k", self.product(xk, at + "key.weight", c, c))
        v = self._see(at + "v", self.product(xv, at + "value.weight", c, c))
        r = self._see(at + "receptance", self.product(xr, at + "receptance.weight", c, c))
        rates = [self._param(at + "time_decay"), self._param(at + "time_first")]
        y, raw, *sums = self._call(make.wkv(self._name("wkv"), self.rows, c, self.dtype), k, v, r, *rates, *past[1:4])
        self._see(at + "wkv", raw)
        self._see(at + "rwkv", y)
        x = self._see(at + "residual", self.product(y, at + "output.weight", c, c, "add", x))
        return x, [self._last(h), *sums]

    def _channel_mix(self, x: Any, i: int, past: Any) -> tuple[Any, Any]:
        config, at = self.graph.config, f"blocks.{i}.ffn."
        c, f = config.n_embd, config.n_ffn
        h = self._norm(x, f"blocks.{i}.ln2", self._halvings(i))
        xk, xr = self._mix(h, past, at, "kr")
        k2 = self._see(at + "k2", self.product(xk, at + "key.weight", f, c, "square"))
        r = self._see(at + "receptance", self.product(xr, at + "receptance.weight", c, c))
        every = self.graph.rescale_every
        halve = bool(every) and (i + 1) % every == 0
        x = self.product(k2, at + "value.weight", c, f, "gate", x, r, halve=halve)
        return self._see(at + "residual", x), self._last(h)

    def _mix(self, h: Any, past: Any, at: str, channels: str) -> list[Any]:
        make, mus = self.graph.kernels.mix, [self._param(f"{at}time_mix_{channel}") for channel in channels]
        name = self._name(f"mix{len(channels)}")
        mixed = self._call(make(name, self.rows, self.graph.config.n_embd, self.dtype, channels), h, past, *mus)
        return [self._see(f"{at}x{channel}", x) for channel, x in zip(channels, mixed)]

    def _see(self, point: str, value: Any) -> Any:
        self.seen[point] = value
        return value

    def _halvings(self, i: int) -> int:
        return i // self.graph.rescale_every if self.graph.rescale_every else 0

    def _norm(self, x: Any, at: str, halvings: int, see: bool = True) -> Any:
        """LayerNorm of a stream halved so often: its epsilon shrinks with the variance, which makes it the same."""
        eps = LN_EPS / 4.0**halvings
        name = self._name(f"layer_norm{halvings or ''}")
        made = self.graph.kernels.layer_norm(name, self.rows, self.graph.config.n_embd, self.dtype, eps)
        y = self._call(made, x, self._param(at + ".weight"), self._param(at + ".bias"))
        return self._see(at, y) if see else y

    def product(
        self, x: Any, weight: str, n: int, k: int, finish: str = "plain", *more: Any, out: str = "", halve: bool = False
    ) -> Any:
        """A product with one of the model's matrices, and its epilogue: see :mod:`backends.tvm_mlc.product`."""
        how = kept(weight, self.graph.scheme)
        what = Product(n, k, how, self.dtype, out or self.dtype, finish, halve)
        kind = f"q{how.bits}" if how.bits else how.dtype
        name = self._name(f"product_{how.layout}_{kind}_{n}x{k}_{finish}{'_half' if halve else ''}_{what.out}")
        return self._call(self.graph.kernels.product(name, self.rows, what), x, *self._matrix(weight), *more)

    def _last(self, x: Any) -> Any:
        if self.rows == 1:
            return x
        return self._call(self.graph.kernels.last_row("last_row", self.graph.config.n_embd, self.dtype), x)

    def _reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        from tvm import relax

        # The operator would become a copy: the pass that makes a view of it reads kernels as blocks.
        to = relax.TensorType(list(shape), "float32")
        call = relax.call_pure_packed("vm.builtin.reshape", x, relax.ShapeExpr(list(shape)), ty_args=[to])
        return self.graph.builder.emit(call)

    def _call(self, made: Kernel, *arguments: Any) -> Any:
        return self.graph.call(made, list(arguments), self.n)

    def _name(self, kind: str) -> str:
        """Kernels of one token and of many are two."""
        return kind if self.rows == 1 else f"{kind}_n"

    def _matrix(self, name: str) -> list[Any]:
        if not kept(name, self.graph.scheme).bits:
            return [self._param(name)]
        return [self._param(name, "q_weight"), self._param(name, "q_scale")]

    def _param(self, name: str, part: str = "") -> Any:
        return self._emit_item(self._params, self._index[name, part])

    def _emit_item(self, whole: Any, index: int) -> Any:
        from tvm import relax

        return self.graph.builder.emit(relax.TupleGetItem(whole, index))


def _state_type(config: Config, dtype: str, row: str) -> Any:
    from tvm import relax

    return relax.TensorType([1, config.n_embd], dtype if row.endswith("_x") else "float32")


def _state_functions(graph: Graph) -> None:
    from tvm import relax

    builder, config, dtype = graph.builder, graph.config, model_dtype(graph.scheme)
    shape = relax.ShapeExpr([1, config.n_embd])

    def fresh() -> Any:
        rows = []
        for row in STATE * config.n_layer:
            start = PP_START if row == "pp" else 0.0
            kind = dtype if row.endswith("_x") else "float32"
            rows.append(builder.emit(relax.op.full(shape, relax.const(start, kind), kind)))
        return relax.Tuple(rows)

    with builder.function("create_kv_cache", []):
        with builder.dataflow():
            out = builder.emit_output(fresh())
        builder.emit_func_output(out)
    state = relax.Var("state", relax.TupleType([_state_type(config, dtype, row) for row in STATE] * config.n_layer))
    with builder.function("reset_kv_cache", [state]):
        with builder.dataflow():
            out = builder.emit_output(fresh())
        builder.emit_func_output(out)


def _softmax(graph: Graph) -> None:
    from tvm import relax

    width = graph.config.n_vocab
    logits = relax.Var("logits", relax.TensorType([1, 1, width], "float32"))
    temperature = relax.Var("temperature", relax.TensorType([], "float32"))
    with graph.builder.function("softmax_with_temperature", [logits, temperature]):
        with graph.builder.dataflow():
            made = graph.kernels.softmax("softmax", width)
            out = graph.builder.emit_output(graph.call(made, [logits, temperature], 1))
        graph.builder.emit_func_output(out)
