"""Faults of matrix products and gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from reference.forward import sigmoid
from reference.numerics import Arithmetic, Emulated
from reference.operations import Here
from reference.weights import Tensor
from suites.selftest.planted.fault import Fault, Patch, Planted, Site, Wrong, operation

#: Trace point of a product -> (what it reads, its matrix).
PRODUCTS = {
    "att.k": ("att.xk", "att.key.weight"),
    "att.v": ("att.xv", "att.value.weight"),
    "att.r": ("att.xr", "att.receptance.weight"),
    "att.out": ("att.rwkv", "att.output.weight"),
    "ffn.k": ("ffn.xk", "ffn.key.weight"),
    "ffn.v": ("ffn.k2", "ffn.value.weight"),
    "ffn.r": ("ffn.xr", "ffn.receptance.weight"),
    "logits": ("ln_out", "head.weight"),
}


def _product(
    point: str,
    matrix: Callable[[np.ndarray], np.ndarray] = lambda w: w,
    inputs: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    result: Callable[[np.ndarray], np.ndarray] = lambda y: y,
    other: str = "",
) -> Wrong:
    """A product with other inputs, another matrix, or another result; a gate stays one."""
    source, name = PRODUCTS[point]

    def wrong(h: Here) -> np.ndarray:
        op = h.op.at(h.at + point)
        w = h.weights[h.at + (other or name)].array(np.float32)
        y = op.linear(inputs(h.read(source)), Tensor.of(np.ascontiguousarray(matrix(w))))
        y = result(y)
        return np.asarray(op.act(sigmoid(y)) if point.endswith(".r") else y)

    return wrong


def _summed_in(point: str, kind: str) -> Wrong:
    """Partial sums kept in another type; 64 of them."""
    source, name = PRODUCTS[point]

    def wrong(h: Here) -> np.ndarray:
        op = h.op.at(h.at + point)
        x = h.read(source)
        own = op.arithmetic if isinstance(op, Emulated) else Arithmetic()
        summed = Emulated(replace(own, accumulation=kind, chain=64))
        return np.asarray(op.act(summed.linear(x.astype(np.float32), h.weights[h.at + name]).astype(x.dtype)))

    return wrong


def _blocks_exchanged(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[:, :8], x[:, 8:16] = x[:, 8:16].copy(), x[:, :8].copy()
    return x


def _zero_columns(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[:, -1] = 0
    return w


def _column_twice(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[:, 0] *= 2
    return w


def _tile_late(y: np.ndarray) -> np.ndarray:
    """A tile of sixteen outputs is one row off."""
    y = y.copy()
    y[:, 16:32] = np.roll(y[:, 16:32], 1, axis=1)
    return y


def _stale_output(y: np.ndarray) -> np.ndarray:
    y = y.copy()
    y[1:, 5] = y[:-1, 5]
    return y


def _plain_gate(point: str) -> Wrong:
    source, name = PRODUCTS[point]
    return lambda h: h.op.at(h.at + point).linear(h.read(source), h.weights[h.at + name])


def _shaped_gate(point: str, shape: Callable[[np.ndarray], np.ndarray]) -> Wrong:
    source, name = PRODUCTS[point]

    def wrong(h: Here) -> np.ndarray:
        op = h.op.at(h.at + point)
        return np.asarray(op.act(shape(op.linear(h.read(source), h.weights[h.at + name]))))

    return wrong


def _table(x: np.ndarray) -> np.ndarray:
    """A table of 64 steps from -8 to 8."""
    return sigmoid(np.clip(np.round(x * 4) / 4, -8, 8))


def _activation(shape: Callable[[np.ndarray], np.ndarray]) -> Wrong:
    return lambda h: h.op.at(h.at + "ffn.k2").act(shape(h.read("ffn.k")))


def _gelu(k: np.ndarray) -> np.ndarray:
    return np.asarray(k * sigmoid(1.702 * k))


def _late_gate(site: Site) -> Planted:
    """Receptance gates what comes out of the output matrix, where it should gate what goes in."""
    replaced: dict[str, Any] = {}
    for layer in site.layers:
        kept: dict[str, np.ndarray] = {}

        def ungated(h: Here, kept: dict[str, np.ndarray] = kept) -> np.ndarray:
            kept["r"] = h.read("att.r")
            return np.array(h.read("att.wkv"))

        def gated(h: Here, kept: dict[str, np.ndarray] = kept) -> np.ndarray:
            op = h.op.at(h.at + "att.out")
            return np.asarray(op.act(kept["r"] * op.linear(h.read("att.rwkv"), h.weights[h.at + "att.output.weight"])))

        replaced |= {f"blocks.{layer}.att.rwkv": ungated, f"blocks.{layer}.att.out": gated}
    return Planted(Patch(replaced=replaced), site.names("att.rwkv")[0])


def _early_gate(site: Site) -> Planted:
    """Receptance is multiplied into the value before the recurrence, not into its result."""
    replaced: dict[str, Any] = {}
    for layer in site.layers:

        def value(h: Here) -> np.ndarray:
            op = h.op.at(h.at + "att.v")
            return np.asarray(
                op.act(sigmoid(h.read("att.xv")) * op.linear(h.read("att.xv"), h.weights[h.at + "att.value.weight"]))
            )

        replaced[f"blocks.{layer}.att.v"] = value
    return Planted(Patch(replaced=replaced), site.names("att.v")[0])


def _nan_where_relu_hides_it(h: Here) -> np.ndarray:
    k = h.op.at(h.at + "ffn.k").linear(h.read("ffn.xk"), h.weights[h.at + "ffn.key.weight"])
    return np.where(k < 0, np.nan, k)


def _nan_to_zero(h: Here) -> np.ndarray:
    return np.asarray(h.op.at(h.at + "ffn.k2").act(np.square(np.fmax(h.read("ffn.k"), 0))))


def _hidden_nan(site: Site) -> Planted:
    replaced = dict.fromkeys(site.names("ffn.k"), _nan_where_relu_hides_it)
    return Planted(
        Patch(replaced={**replaced, **dict.fromkeys(site.names("ffn.k2"), _nan_to_zero)}), site.names("ffn.k")[0]
    )


FAULTS = (
    operation(
        "att.key transposed", "att.k", _product("att.k", matrix=np.transpose), "A square matrix the wrong way round."
    ),
    operation("key and value swapped", "att.k", _product("att.k", other="att.value.weight"), "att.k is made with W_v."),
    operation(
        "last column not summed",
        "att.v",
        _product("att.v", matrix=_zero_columns),
        "The tail of the inner loop is left out.",
    ),
    operation(
        "first column summed twice",
        "ffn.k",
        _product("ffn.k", matrix=_column_twice),
        "The tail of the inner loop starts over.",
    ),
    operation(
        "two blocks of inputs exchanged",
        "att.out",
        _product("att.out", inputs=_blocks_exchanged),
        "Inputs of a product are packed in another order.",
    ),
    operation(
        "a tile one row late", "ffn.v", _product("ffn.v", result=_tile_late), "Sixteen outputs are written one row off."
    ),
    operation(
        "a stale output", "att.k", _product("att.k", result=_stale_output), "One output is that of the token before."
    ),
    operation(
        "att.out sums in fp16", "att.out", _summed_in("att.out", "fp16"), "Partial sums of a product in half precision."
    ),
    operation(
        "ffn.v sums in fp16", "ffn.v", _summed_in("ffn.v", "fp16"), "Partial sums of a product in half precision."
    ),
    operation("ffn.v sums in bf16", "ffn.v", _summed_in("ffn.v", "bf16"), "Partial sums of a product in bfloat16."),
    operation(
        "att.k inputs in int8",
        "att.k",
        _product("att.k", inputs=lambda x: np.round(x * 16) / 16),
        "Inputs are rounded to a fixed step.",
    ),
    operation(
        "ffn.k one per cent large",
        "ffn.k",
        _product("ffn.k", matrix=lambda w: w * np.float32(1.01)),
        "The scale of a matrix is off.",
    ),
    operation("receptance without sigmoid", "att.r", _plain_gate("att.r"), "The gate is not squashed."),
    operation("ffn receptance without sigmoid", "ffn.r", _plain_gate("ffn.r"), "The gate is not squashed."),
    operation(
        "hard sigmoid", "att.r", _shaped_gate("att.r", lambda x: np.clip(x / 6 + 0.5, 0, 1)), "A piecewise linear gate."
    ),
    operation("sigmoid from a table", "ffn.r", _shaped_gate("ffn.r", _table), "A table of 64 steps."),
    operation("tanh for sigmoid", "ffn.r", _shaped_gate("ffn.r", np.tanh), "Another squashing function."),
    operation("relu without square", "ffn.k2", _activation(lambda k: np.maximum(k, 0)), "The square is missing."),
    operation("square without relu", "ffn.k2", _activation(np.square), "Negative keys count too."),
    operation("gelu for squared relu", "ffn.k2", _activation(_gelu), "Another activation."),
    operation(
        "squared relu saturates at 2",
        "ffn.k2",
        _activation(lambda k: np.minimum(np.square(np.maximum(k, 0)), 2)),
        "Results are clipped.",
    ),
    operation(
        "relu of the square",
        "ffn.k2",
        _activation(lambda k: np.square(np.maximum(k, 0.1))),
        "Small keys are lifted to a tenth.",
    ),
    Fault("receptance after the output matrix", "r gates what comes out of W_o, not what goes in.", _late_gate),
    Fault("receptance before value", "A gate is multiplied into the value before the recurrence.", _early_gate),
    operation("rwkv without receptance", "att.rwkv", lambda h: np.array(h.read("att.wkv")), "The gate is left out."),
    operation("ffn.out without receptance", "ffn.out", lambda h: np.array(h.read("ffn.v")), "The gate is left out."),
    Fault("NaN that relu hides", "Negative keys are NaN, which a relu by fmax makes zero.", _hidden_nan),
)
