"""Builds a library with the ABI of MLC-LLM's RWKV-4, which nobody can build today; runs where TVM's compiler is.

    python mlc_stand_in.py '{"sizes": [...], "scheme": ..., "folder": ..., "file": ...}'

Entry points, order and types of arguments and parameters, the caches of the state and what ``get_metadata`` says are
those of mlc_llm/relax_model/rwkv.py (2023-07 to 2024-03); the operators are Relax's own, fused by TVM as it likes.
Options: ``rescale_every``; ``model_name``; ``prefill`` false for a library of June 2023; ``uint16`` for its q3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.ir import StringImm
from tvm.relax import op
from tvm.script import from_source

from backends.tvm_mlc.mlc_library import stored_2023
from backends.tvm_mlc.storage import kept, model_dtype, parameters
from reference.config import Config, tensor_shapes

WKV = """
@T.prim_func(s_tir=True)
def wkv(k: T.handle, v: T.handle, w: T.handle, u: T.handle, a: T.handle, b: T.handle, p: T.handle,
        y: T.handle, oa: T.handle, ob: T.handle, op: T.handle):
    T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
    n = T.int64()
    K = T.match_buffer(k, (n, C), "float32")
    V = T.match_buffer(v, (n, C), "float32")
    W = T.match_buffer(w, (C,), "float32")
    U = T.match_buffer(u, (C,), "float32")
    A = T.match_buffer(a, (1, C), "float32")
    B = T.match_buffer(b, (1, C), "float32")
    P = T.match_buffer(p, (1, C), "float32")
    Y = T.match_buffer(y, (n, C), "DTYPE")
    OA = T.match_buffer(oa, (1, C), "float32")
    OB = T.match_buffer(ob, (1, C), "float32")
    OP = T.match_buffer(op, (1, C), "float32")
    for c in range(C):
        OA[0, c] = A[0, c]
        OB[0, c] = B[0, c]
        OP[0, c] = P[0, c]
        for t in range(n):
            top = T.max(OP[0, c], U[c] + K[t, c])
            old = T.exp(OP[0, c] - top)
            new = T.exp(U[c] + K[t, c] - top)
            Y[t, c] = T.Cast("DTYPE", (old * OA[0, c] + new * V[t, c]) / (old * OB[0, c] + new))
            top1 = T.max(OP[0, c] + W[c], K[t, c])
            old1 = T.exp(OP[0, c] + W[c] - top1)
            new1 = T.exp(K[t, c] - top1)
            OA[0, c] = old1 * OA[0, c] + new1 * V[t, c]
            OB[0, c] = old1 * OB[0, c] + new1
            OP[0, c] = top1
"""


class Model:
    """One entry point being built."""

    def __init__(self, asked: dict[str, Any], builder: Any, rows: Any) -> None:
        self.config, self.scheme = Config(*asked["sizes"]), asked["scheme"]
        self.builder, self.rows, self.dtype = builder, rows, model_dtype(self.scheme)
        self.every = asked.get("rescale_every", 0)
        taken = parameters(self.config, self.scheme)
        self.taken = stored_2023(taken, self.scheme) if asked.get("uint16") else taken
        types = [relax.TensorType(list(p.shape), p.dtype) for p in self.taken]
        self.params = relax.Var("params", relax.TupleType(types))
        self.state = relax.Var("state", relax.TupleType([relax.AnyType()] * (5 * self.config.n_layer)))

    def run(self, ids: Any) -> tuple[Any, list[Any]]:
        emit = self.builder.emit
        x = emit(op.take(self.matrix("emb.weight"), emit(op.reshape(ids, [-1])), axis=0))
        x = self.norm(x, "blocks.0.ln0")
        after: list[Any] = []
        for i in range(self.config.n_layer):
            block = f"blocks.{i}."
            out, rows = self.time_mix(self.norm(x, block + "ln1"), block + "att.", 5 * i)
            x = emit(x + out)
            out, last = self.channel_mix(self.norm(x, block + "ln2"), block + "ffn.", 5 * i + 4)
            x = emit(x + out)
            if self.every and (i + 1) % self.every == 0:
                x = emit(x / relax.const(2, self.dtype))
            after += [*rows, last]
        logits = self.linear(self.norm(self.last(x), "ln_out"), "head.weight")
        logits = emit(op.astype(emit(op.reshape(logits, (1, 1, self.config.n_vocab))), "float32"))
        return logits, after

    def time_mix(self, h: Any, at: str, offset: int) -> tuple[Any, list[Any]]:
        emit, c = self.builder.emit, self.config.n_embd
        a, b, p = (self.load(offset + row, "float32") for row in (1, 2, 3))
        xk, xv, xr = self.mix(h, at, offset, "kvr")
        r = emit(op.sigmoid(self.linear(xr, at + "receptance.weight")))
        k = emit(op.astype(self.linear(xk, at + "key.weight"), "float32"))
        v = emit(op.astype(self.linear(xv, at + "value.weight"), "float32"))
        kernel = self.builder.add_func(
            from_source(WKV.replace("C)", f"{c})").replace("(C,", f"({c},").replace("DTYPE", self.dtype)), "wkv"
        )
        types = [relax.TensorType([self.rows, c], self.dtype), *[relax.TensorType([1, c], "float32")] * 3]
        given = [k, v, self.param(at + "time_decay"), self.param(at + "time_first"), a, b, p]
        out = emit(relax.call_tir(kernel, relax.Tuple(given), types))
        y, *sums = (emit(relax.TupleGetItem(out, i)) for i in range(4))
        rows = [self.store(offset, self.last(h)), *(self.store(offset + 1 + i, row) for i, row in enumerate(sums))]
        return self.linear(emit(r * y), at + "output.weight"), rows

    def channel_mix(self, h: Any, at: str, offset: int) -> tuple[Any, Any]:
        emit = self.builder.emit
        xk, xr = self.mix(h, at, offset, "kr")
        last = self.store(offset, self.last(h))
        r = emit(op.sigmoid(self.linear(xr, at + "receptance.weight")))
        k2 = emit(op.square(emit(op.nn.relu(self.linear(xk, at + "key.weight")))))
        return emit(r * self.linear(k2, at + "value.weight")), last

    def mix(self, h: Any, at: str, offset: int, channels: str) -> list[Any]:
        emit, before = self.builder.emit, self.load(offset, self.dtype)
        if self.rows != 1:
            before = self.builder.emit_te(_shifted, before, h)
        ones, mixed = emit(op.ones((self.config.n_embd,), self.dtype)), []
        for channel in channels:
            mu = self.param(f"{at}time_mix_{channel}")
            mixed.append(emit(h * mu + before * (ones - mu)))
        return mixed

    def norm(self, x: Any, at: str) -> Any:
        weight, bias = self.param(at + ".weight"), self.param(at + ".bias")
        return self.builder.emit(op.nn.layer_norm(x, weight, bias, axes=-1, epsilon=1e-5))

    def linear(self, x: Any, name: str) -> Any:
        return self.builder.emit(op.matmul(x, self.builder.emit(op.permute_dims(self.matrix(name)))))

    def matrix(self, name: str) -> Any:
        how = kept(name, self.scheme)
        if not how.bits:
            return self.param(name)
        codes, scales = self.param(name, "q_weight"), self.param(name, "q_scale")
        width = tensor_shapes(self.config)[name][1]
        word = 16 if codes.ty.dtype == "uint16" else 32

        def decoded(q: Any, s: Any) -> Any:
            def value(n: Any, k: Any) -> Any:
                at = (n, k // (word // how.bits)) if how.layout == "NK" else (k // (word // how.bits), n)
                of = (n, k // how.group) if how.layout == "NK" else (k // how.group, n)
                shift = tirx.Cast("uint32", k % (word // how.bits) * how.bits)
                code = (q[at].astype("uint32") >> shift) & tirx.const(2**how.bits - 1, "uint32")
                return (code.astype("int32") - how.zero).astype(self.dtype) * s[of]

            outputs = q.shape[0] if how.layout == "NK" else q.shape[1]
            return te.compute((outputs, width), value, name="decode")

        return self.builder.emit_te(decoded, codes, scales)

    def last(self, x: Any) -> Any:
        return x if self.rows == 1 else self.builder.emit_te(_last, x)

    def load(self, row: int, dtype: str) -> Any:
        whole = self.builder.emit(relax.TupleGetItem(self.state, row))
        shape = relax.ShapeExpr([1, self.config.n_embd])
        view = relax.TensorType([1, self.config.n_embd], dtype)
        return self.builder.emit(
            relax.call_pure_packed("vm.builtin.attention_kv_cache_view", whole, shape, ty_args=[view])
        )

    def store(self, row: int, value: Any) -> Any:
        whole = self.builder.emit(relax.TupleGetItem(self.state, row))
        name = "vm.builtin.attention_kv_cache_update"
        return self.builder.emit(
            relax.op.call_inplace_packed(name, whole, value, inplace_indices=[0], ty_args=[relax.AnyType()])
        )

    def param(self, name: str, part: str = "") -> Any:
        index = next(i for i, item in enumerate(self.taken) if (item.tensor, item.part) == (name, part))
        return self.builder.emit(relax.TupleGetItem(self.params, index))


def _shifted(saved: Any, x: Any) -> Any:
    return te.compute(x.shape, lambda i, j: tirx.if_then_else(i == 0, saved[0, j], x[i - 1, j]), name="shifted")


def _last(x: Any) -> Any:
    rows, width = x.shape
    return te.compute((1, width), lambda _, j: x[rows - 1, j], name="last")


def module(asked: dict[str, Any]) -> Any:
    builder = relax.BlockBuilder()
    for name, rows in (("prefill", tirx.Var("n", "int64")), ("decode", 1)):
        if name == "prefill" and not asked.get("prefill", True):
            continue
        model = Model(asked, builder, rows)
        ids = relax.Var("input_ids", relax.TensorType([1, rows], "int32"))
        given = [ids, relax.Var("place_holder", relax.AnyType()), model.state, model.params]
        with builder.function(name, given, attrs={"num_input": 3}):
            with builder.dataflow():
                logits, after = model.run(ids)
                out = builder.emit_output(relax.Tuple([logits, relax.Tuple(after)]))
            builder.emit_func_output(out)
    caches(asked, builder)
    softmax(asked, builder)
    told = {"model_name": asked.get("model_name", "rwkv-stand-in"), "max_window_size": -1, "stop_tokens": [0]}
    with builder.function("get_metadata", []):
        builder.emit_func_output(StringImm(json.dumps({**told, "add_prefix_space": False})))
    return builder.finalize()


def caches(asked: dict[str, Any], builder: Any) -> None:
    """``create_kv_cache`` and ``reset_kv_cache``."""
    config, dtype = Config(*asked["sizes"]), model_dtype(asked["scheme"])
    shape, anything = relax.ShapeExpr([1, config.n_embd]), [relax.AnyType()]
    starts = [(dtype, 0.0), ("float32", 0.0), ("float32", 0.0), ("float32", -1e30), (dtype, 0.0)] * config.n_layer

    def create(kind: str, value: float) -> Any:
        full = builder.emit(op.full(shape, relax.const(value, kind), kind))
        name = "vm.builtin.attention_kv_cache_create"
        return builder.emit(relax.call_pure_packed(name, full, shape, relax.prim_value(1), ty_args=anything))

    with builder.function("create_kv_cache", []):
        with builder.dataflow():
            out = builder.emit_output(relax.Tuple([create(*start) for start in starts]))
        builder.emit_func_output(out)
    state = relax.Var("state", relax.TupleType(anything * len(starts)))
    with builder.function("reset_kv_cache", [state]):
        with builder.dataflow():
            out = builder.emit_output(relax.Tuple([create(*start) for start in starts]))
        builder.emit_func_output(out)


def softmax(asked: dict[str, Any], builder: Any) -> None:
    logits = relax.Var("logits", relax.TensorType([1, 1, asked["sizes"][3]], "float32"))
    temperature = relax.Var("temperature", relax.TensorType([], "float32"))
    with builder.function("softmax_with_temperature", [logits, temperature]):
        with builder.dataflow():
            out = builder.emit_output(op.nn.softmax(builder.emit(op.divide(logits, temperature)), axis=-1))
        builder.emit_func_output(out)


def main(asked: dict[str, Any]) -> None:
    cpu = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
    target = tvm.target.Target(cpu)
    fused = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            *([relax.transform.FuseOps(), relax.transform.FuseTIR()] if asked.get("fused", True) else []),
        ]
    )
    with target:
        lowered = fused(module(asked))
    executable = relax.build(lowered, target)
    executable.export_library(str(Path(asked["folder"], asked.get("file", "rwkv-llvm.so"))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
