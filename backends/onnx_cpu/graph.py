"""RWKV-4 as one ONNX graph, for one token and for many.

    inputs   tokens int64 (1, T)
             state float32 (1, 5 L, C): the rows of the canonical state, layer by layer
             first int64 (1,): of which position on logits are wanted; -1 is the last one's
    outputs  logits float32 (1, positions, V); new_state like state

Arrays are (1, T, C). Matrix products run over all T tokens at once; only WKV asks whether T is 1, and goes
through a loop (Scan) where it is not. A node costs a step about as much as its arithmetic: aa and bb, rows that follow
each other, stay one array, to which v and 1 are added.

The symbols are those of reference/forward.py. The order of roundings differs, not the function:

    token shift   mu h + (1 - mu) past is past + mu (h - past), for all gates in one operation each
    WKV           (e^s aa + v) / (e^s bb + 1) with s = min(pp - u - k, 60), numerator and denominator divided by
                  e^(u+k). Beyond 60 the current token is e^-60 of the sums, far below a rounding of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto

from backends.onnx_cpu.graph_file import Graph, Value, WeightFile
from backends.onnx_cpu.schemes import Kept
from reference.codecs_onnx import OnnxBlocks, OnnxPacked
from reference.config import is_matrix
from reference.forward import LN_EPS
from reference.tensor_file import release
from reference.weights import Tensor, Weights

_LARGEST = 60.0
_GATES = {"att.": "kvr", "ffn.": "kr"}
_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64
_END = 1 << 31

#: What bb adds where aa adds v, a tensor of the weight file.
_ONE = "one"


#: Weights quantized at a time, which bounds the memory of what lies between.
_BLOCK_ELEMENTS = 1 << 22


def write_weights(weights: Weights, kept: Kept, file: WeightFile) -> None:
    """Every tensor as the operators want it, one after the other."""
    for name, tensor in weights.items():
        blocks = kept.blocks(name)
        if ".time_mix_" in name:
            continue
        if name == "emb.weight":
            file.add(name, tensor.read() if tensor.stored == "f16" else _float32(tensor))
        elif not is_matrix(name):
            file.add(name, np.exp(_float32(tensor)) if name.endswith("time_decay") else _float32(tensor))
        elif blocks is None:
            file.add(name, _float32(tensor).T)
        else:
            for part, array in _quantized(tensor, blocks, halved=kept.halved(blocks)).items():
                file.add(f"{name}.{part}", array)
        release(tensor)
    for i in range(weights.config.n_layer):
        for part, gates in _GATES.items():
            at = f"blocks.{i}.{part}time_mix_"
            file.add(at + gates, np.stack([_float32(weights[at + gate]) for gate in gates])[:, None])
    file.add(_ONE, np.ones((1, 1, weights.config.n_embd), np.float32))


def _float32(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.rows(slice(None), np.float32))


def _quantized(tensor: Tensor, blocks: OnnxBlocks, halved: bool) -> dict[str, np.ndarray]:
    """The operator's inputs by the name of their part; ``halved``: those of two operators of 4 bits."""
    n, k = tensor.shape
    step = max(1, _BLOCK_ELEMENTS // k)
    quantized = (blocks.quantize(tensor.rows(slice(a, a + step), np.float32)) for a in range(0, n, step))
    packed = [_halves(one) if halved else one._asdict() for one in quantized]
    return {part: np.concatenate([p[part] for p in packed]) for part in packed[0] if packed[0][part] is not None}


def _halves(packed: OnnxPacked) -> dict[str, np.ndarray]:
    """Symmetric codes of 8 bits as 16 times one of 4 bits with zero point 8, and one with zero point 0."""
    codes, (rows, groups) = packed.codes, packed.scales.shape
    high, low = ((half[..., 0::2] | (half[..., 1::2] << np.uint8(4))) for half in (codes >> 4, codes & 15))
    zeros = np.zeros((rows, -(-groups // 2)), dtype=np.uint8)
    return {
        "high.codes": high,
        "high.scales": np.float32(16) * packed.scales,
        "low.codes": low,
        "low.scales": packed.scales,
        "low.zeros": zeros,
    }


class Mixed(NamedTuple):
    """What WKV takes, each ``(1, T, C)``; of the past the sums aa and bb ``(1, 2, C)``, and pp ``(1, 1, C)``."""

    k: str
    v: str
    r: str
    sums: str
    pp: str


class Network:
    """The graph under construction."""

    def __init__(self, weights: Weights, kept: Kept, file: WeightFile) -> None:
        self._graph, self._weights, self._kept = Graph(file), weights, kept
        self._config = weights.config

    def save(self, path: Path) -> None:
        """Build it and write it."""
        graph, layers = self._graph, self._config.n_layer
        rows = 5 * layers
        count = graph.op("Size", "tokens")
        graph.op("Equal", count, graph.integer(1), to="one_token")
        count = graph.op("Reshape", count, graph.integers(1))
        graph.op("Concat", count, graph.integers(1), to="all_and_last", attributes={"axis": 0})
        parts = graph.integers(*[1, 1, 2, 1] * layers)  # ffn_x, att_x, aa and bb, pp
        state = graph.ops("Split", "state", parts, to=[""] * (4 * layers), attributes={"axis": 1})
        x = graph.op("Gather", graph.weight("emb.weight"), "tokens")
        if self._weights["emb.weight"].stored == "f16":
            x = graph.op("Cast", x, attributes={"to": _FLOAT})
        x = self._norm(x, "blocks.0.ln0")
        h = self._norm(x, "blocks.0.ln1")
        new: list[str] = []
        for i in range(layers):
            past_ffn_x, *past = state[4 * i : 4 * i + 4]
            out, att_x, sums = self._time_mix(h, f"blocks.{i}.att.", past)
            x, h = self._added_norm(x, out, f"blocks.{i}.ln2")
            out, ffn_x = self._channel_mix(h, f"blocks.{i}.ffn.", past_ffn_x)
            x, h = self._added_norm(x, out, f"blocks.{i + 1}.ln1" if i + 1 < layers else "ln_out")
            new += [ffn_x, att_x, *sums]
        graph.op("Concat", *new, to="new_state", attributes={"axis": 1})
        h = graph.op("Slice", h, "first", graph.integers(_END), graph.integers(1))
        self._linear(h, "head.weight", to="logits")
        state_shape = [1, rows, self._config.n_embd]
        graph.save(
            path,
            [("tokens", _INT64, [1, "T"]), ("state", _FLOAT, state_shape), ("first", _INT64, [1])],
            [("logits", _FLOAT, [1, "positions", self._config.n_vocab]), ("new_state", _FLOAT, state_shape)],
        )

    def _time_mix(self, h: str, at: str, past: Sequence[str]) -> tuple[str, str, list[str]]:
        """What is added to the residual stream; new att_x; new sums and pp. ``past``: the old ones, in this order."""
        past_att_x, *past_sums = past
        mixed, att_x = self._shift(h, past_att_x, at)
        k, v, r = (self._linear(x, f"{at}{name}.weight") for x, name in zip(mixed, ("key", "value", "receptance")))
        inputs = Mixed(k, v, r, *past_sums)
        branches = {
            "then_branch": _step(self._graph.inner(at + "step."), inputs, at),
            "else_branch": _loop(self._graph.inner(at + "loop."), inputs, at, self._config.n_embd),
        }
        y, *sums = self._graph.ops("If", "one_token", to=[""] * 3, attributes=branches)
        return self._linear(y, at + "output.weight"), att_x, sums

    def _channel_mix(self, h: str, at: str, past: str) -> tuple[str, str]:
        """What is added to the residual stream; new ffn_x."""
        op = self._graph.op
        (xk, xr), ffn_x = self._shift(h, past, at)
        k = op("Relu", self._linear(xk, at + "key.weight"))
        v = self._linear(op("Mul", k, k), at + "value.weight")
        r = op("Sigmoid", self._linear(xr, at + "receptance.weight"))
        return op("Mul", r, v), ffn_x

    def _shift(self, h: str, past: str, at: str) -> tuple[list[str], str]:
        """The mixed input of every gate; the last token's h."""
        graph, gates = self._graph, _GATES[at[-4:]]
        all_h = graph.op("Concat", past, h, attributes={"axis": 1})
        before, last = graph.ops("Split", all_h, "all_and_last", to=["", ""], attributes={"axis": 1})
        mixed = graph.op("Mul", graph.op("Sub", h, before), graph.weight(f"{at}time_mix_{gates}"))
        mixed = graph.op("Add", mixed, before)
        return graph.ops("Split", mixed, to=[""] * len(gates), attributes={"axis": 0}), last

    def _norm(self, x: str, at: str) -> str:
        gamma, beta = self._graph.weight(at + ".weight"), self._graph.weight(at + ".bias")
        return self._graph.op("LayerNormalization", x, gamma, beta, attributes={"axis": -1, "epsilon": LN_EPS})

    def _added_norm(self, x: str, added: str, at: str) -> tuple[str, str]:
        """``x + added``, and its LayerNorm."""
        gamma, beta = self._graph.weight(at + ".weight"), self._graph.weight(at + ".bias")
        to = ("", None, None, "")
        h, _, _, x = self._graph.contrib("SkipLayerNormalization", x, added, gamma, beta, to=to, epsilon=LN_EPS)
        return x, h

    def _linear(self, x: str, name: str, to: str = "") -> str:
        """``x (.., K)`` times a matrix ``(N, K)`` transposed."""
        graph, blocks = self._graph, self._kept.blocks(name)
        if blocks is None:
            return graph.op("MatMul", x, graph.weight(name), to=to)
        if self._kept.halved(blocks):
            half = replace(blocks, bits=4)
            high = self._product(x, name, name + ".high", half)
            low = self._product(x, name, name + ".low", replace(half, asymmetric=True))
            return graph.op("Add", high, low, to=to)
        return self._product(x, name, name, blocks, to)

    def _product(self, x: str, name: str, stored: str, blocks: OnnxBlocks, to: str = "") -> str:
        """``x`` times the matrix of a name, kept as ``stored``, transposed."""
        graph, level = self._graph, self._kept.accuracy
        parts = [graph.weight(f"{stored}.{part}") for part in OnnxPacked._fields[: 2 + blocks.asymmetric]]
        n, k = self._weights[name].shape
        shape = {"N": n, "K": k, "bits": blocks.bits, "block_size": blocks.group}
        return graph.contrib("MatMulNBits", x, *parts, to=(to,), accuracy_level=level, **shape)[0]


def _step(graph: Graph, of: Mixed, at: str) -> Any:
    """Branch for one token: r times WKV, and the new sums."""
    op = graph.op
    faded = op("Sub", of.pp, graph.weight(at + "time_decay"))
    pp = op("Max", faded, of.k)
    decay, gain = op("Exp", op("Sub", faded, pp)), op("Exp", op("Sub", of.k, pp))
    added = op("Concat", of.v, graph.weight(_ONE), attributes={"axis": 1})
    sums = op("Add", op("Mul", decay, of.sums), op("Mul", gain, added))
    with_this = op("Add", op("Mul", _old(graph, of, at), of.sums), added)
    above, below = graph.ops("Split", with_this, to=["", ""], attributes={"axis": 1})
    return graph.body([], _any_rank(op("Mul", op("Sigmoid", of.r), op("Div", above, below)), sums, pp))


def _loop(graph: Graph, of: Mixed, at: str, width: int) -> Any:
    """Branch for many tokens. What does not depend on the token before is out of the loops, which take rows of one."""
    op, ops, w = graph.op, graph.ops, graph.weight(at + "time_decay")
    past_aa, past_bb = ops("Split", of.sums, to=["", ""], attributes={"axis": 1})
    rows = graph.integers(-1, 1, 1, width)
    k, v, r, past_pp = (op("Reshape", x, rows) for x in (of.k, of.v, of.r, of.pp))
    body = _largest(graph.inner(at + "pp."), w, width)
    pp, after = ops("Scan", of.pp, k, to=("", ""), attributes={"body": body, "num_scan_inputs": 1})
    before = op("Concat", past_pp, after, attributes={"axis": 0})
    before = op("Slice", before, *map(graph.integers, (0, -1, 0)))
    decay = op("Exp", op("Sub", op("Sub", before, w), after))
    gain = op("Exp", op("Sub", k, after))
    added = op("Mul", gain, v)
    body = _sums(graph.inner(at + "sums."), width)
    loop = {"body": body, "num_scan_inputs": 3}
    aa, bb, *sums = ops("Scan", past_aa, past_bb, decay, added, gain, to=[""] * 4, attributes=loop)
    old = _old(graph, Mixed(k, v, r, "", before), at)
    above = op("Add", op("Mul", old, sums[0]), v)
    below = op("Add", op("Mul", old, sums[1]), graph.scalar(1))
    y = op("Reshape", op("Mul", op("Sigmoid", r), op("Div", above, below)), graph.integers(1, -1, width))
    return graph.body([], _any_rank(y, op("Concat", aa, bb, attributes={"axis": 1}), pp))


def _old(graph: Graph, of: Mixed, at: str) -> str:
    """What the sums before the token count for where the token itself counts for 1."""
    op = graph.op
    s = op("Sub", of.pp, op("Add", of.k, graph.weight(at + "time_first")))
    return op("Exp", op("Min", s, graph.scalar(_LARGEST)))


def _largest(body: Graph, w: str, width: int) -> Any:
    """pp_t = max(pp_{t-1} - w, k_t), and every one of them."""
    body.op("Max", body.op("Sub", "pp", w), "k", to="new_pp")
    body.op("Identity", "new_pp", to="pp_t")
    return body.body(_rows(width, "pp", "k"), _rows(width, "new_pp", "pp_t"))


def _sums(body: Graph, width: int) -> Any:
    """aa and bb with token t, and every one of them without it."""
    for name, added in (("aa", "added"), ("bb", "gain")):
        body.op("Add", body.op("Mul", "decay", name), added, to="new_" + name)
        body.op("Identity", name, to=name + "_t")
    inputs = _rows(width, "aa", "bb", "decay", "added", "gain")
    return body.body(inputs, _rows(width, "new_aa", "new_bb", "aa_t", "bb_t"))


def _rows(width: int, *names: str) -> list[Value]:
    return [(name, _FLOAT, [1, 1, width]) for name in names]


def _any_rank(*names: str) -> list[Value]:
    return [(name, _FLOAT, None) for name in names]
