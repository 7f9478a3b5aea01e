"""The forward pass taken apart: one operation per trace point, each computable from the others' results.

Where :mod:`reference.forward` says what RWKV-4 is, this says which result follows from which, so that a wrong one
can be told from one that was only given wrong inputs. Both compute the same to the last bit, which a test holds
them to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from reference.config import Config
from reference.forward import (
    AA,
    ATT_X,
    FFN_X,
    PP,
    Tap,
    Tokens,
    WkvState,
    check_tokens,
    gate,
    initial_state,
    layer_norm,
    mix,
    vector,
    wkv,
)
from reference.numerics import Op
from reference.weights import Weights

#: Gives the result of a trace point by its name within the block; ``x``: the stream that enters the block.
Read = Callable[[str], np.ndarray]


class Here(NamedTuple):
    """Where an operation is computed.

    read     results it may use
    weights  of the model
    at       the block's prefix, ``blocks.3.``, or nothing
    past     the layer's state before the prompt, ``(5, n_embd)``; the tokens ``(T,)`` for ``emb``
    op       the arithmetic
    """

    read: Read
    weights: Weights
    at: str
    past: np.ndarray
    op: Op

    def shifted(self, name: str, row: int) -> np.ndarray:
        """The results of ``name`` one token earlier."""
        return np.concatenate([self.past[row][None], self.read(name)[:-1]])

    def vector(self, name: str) -> np.ndarray:
        """A vector of the layer in the compute type."""
        return vector(self.weights, self.at + name, self.op)


class Operation(NamedTuple):
    """``compute`` makes a trace point ``(T, width)`` from the results named in ``inputs``."""

    inputs: tuple[str, ...]
    compute: Callable[[Here], np.ndarray]


def norm(source: str, name: str) -> Operation:
    """LayerNorm ``name`` of ``source``."""
    return Operation((source,), lambda h: layer_norm(h.read(source), h.weights, h.at + name, h.op))


def mixed(source: str, row: int, name: str) -> Operation:
    """Token shift: ``att.xk`` of ``ln1`` with ``att.time_mix_k``."""

    def compute(h: Here) -> np.ndarray:
        mu = h.vector(name.replace(".x", ".time_mix_"))
        return mix(h.read(source), h.shifted(source, row), mu, h.op.at(h.at + name))

    return Operation((source,), compute)


def product(source: str, matrix: str, name: str) -> Operation:
    """A matrix product."""
    return Operation((source,), lambda h: h.op.at(h.at + name).linear(h.read(source), h.weights[h.at + matrix]))


def receptance(source: str, matrix: str, name: str) -> Operation:
    """The logistic function of a matrix product."""
    return Operation((source,), lambda h: gate(h.read(source), h.weights[h.at + matrix], h.op.at(h.at + name)))


def times(a: str, b: str, name: str) -> Operation:
    """A product element by element."""
    return Operation((a, b), lambda h: h.op.at(h.at + name).act(h.read(a) * h.read(b)))


def added(a: str, b: str, name: str) -> Operation:
    """An addition to the residual stream."""
    return Operation((a, b), lambda h: h.op.at(h.at + name).residual(h.read(a) + h.read(b)))


def recurrence(h: Here) -> tuple[np.ndarray, WkvState]:
    """WKV over the prompt, and the state after it."""
    w, u = np.exp(h.vector("att.time_decay")), h.vector("att.time_first")
    op = h.op.at(h.at + "att.wkv")
    y, after = wkv(h.read("att.k"), h.read("att.v"), w, u, WkvState(*h.past[AA : PP + 1]), op)
    return op.act(y), after


def _squared(h: Here) -> np.ndarray:
    return h.op.at(h.at + "ffn.k2").act(np.square(np.maximum(h.read("ffn.k"), 0)))


#: The operations of a block in execution order, by trace point.
BLOCK: Mapping[str, Operation] = {
    "ln1": norm("x", "ln1"),
    "att.xk": mixed("ln1", ATT_X, "att.xk"),
    "att.xv": mixed("ln1", ATT_X, "att.xv"),
    "att.xr": mixed("ln1", ATT_X, "att.xr"),
    "att.k": product("att.xk", "att.key.weight", "att.k"),
    "att.v": product("att.xv", "att.value.weight", "att.v"),
    "att.r": receptance("att.xr", "att.receptance.weight", "att.r"),
    "att.wkv": Operation(("att.k", "att.v"), lambda h: recurrence(h)[0]),
    "att.rwkv": times("att.r", "att.wkv", "att.rwkv"),
    "att.out": product("att.rwkv", "att.output.weight", "att.out"),
    "att.residual": added("x", "att.out", "att.residual"),
    "ln2": norm("att.residual", "ln2"),
    "ffn.xk": mixed("ln2", FFN_X, "ffn.xk"),
    "ffn.xr": mixed("ln2", FFN_X, "ffn.xr"),
    "ffn.k": product("ffn.xk", "ffn.key.weight", "ffn.k"),
    "ffn.k2": Operation(("ffn.k",), _squared),
    "ffn.v": product("ffn.k2", "ffn.value.weight", "ffn.v"),
    "ffn.r": receptance("ffn.xr", "ffn.receptance.weight", "ffn.r"),
    "ffn.out": times("ffn.r", "ffn.v", "ffn.out"),
    "ffn.residual": added("att.residual", "ffn.out", "ffn.residual"),
}

#: Before the first block: past is the tokens.
FIRST: Mapping[str, Operation] = {
    "emb": Operation((), lambda h: h.op.at("emb").residual(h.weights["emb.weight"].rows(h.past, h.op.dtype))),
    "blocks.0.ln0": Operation(
        ("emb",),
        lambda h: h.op.at("blocks.0.ln0").residual(layer_norm(h.read("emb"), h.weights, "blocks.0.ln0", h.op)),
    ),
}

#: After the last: ``x`` is the last block's ``ffn.residual``.
LAST: Mapping[str, Operation] = {"ln_out": norm("x", "ln_out"), "logits": product("ln_out", "head.weight", "logits")}


class Step(NamedTuple):
    """One operation of a model: the trace point it makes and those it reads, by their full names."""

    point: str
    layer: int | None
    name: str
    operation: Operation
    inputs: tuple[str, ...]

    @property
    def at(self) -> str:
        """The block's prefix."""
        return "" if self.layer is None else f"blocks.{self.layer}."


def steps(config: Config) -> Iterator[Step]:
    """Every operation of a model in execution order."""
    for name, operation in FIRST.items():
        yield Step(name, None, name, operation, operation.inputs)
    x = "blocks.0.ln0"
    for layer in range(config.n_layer):
        at = f"blocks.{layer}."
        for name, operation in BLOCK.items():
            inputs = tuple(x if source == "x" else at + source for source in operation.inputs)
            yield Step(at + name, layer, name, operation, inputs)
        x = f"{at}ffn.residual"
    for name, operation in LAST.items():
        yield Step(name, None, name, operation, tuple(x if source == "x" else source for source in operation.inputs))


def here(step: Step, read: Read, weights: Weights, tokens: np.ndarray, state: np.ndarray, op: Op) -> Here:
    """What ``step.operation.compute`` wants; ``read`` takes full names, ``state`` is that before the prompt."""
    full = dict(zip(step.operation.inputs, step.inputs))
    past = tokens if step.layer is None else state[step.layer]
    return Here(lambda name: read(full[name]), weights, step.at, past, op)


def compute(step: Step, read: Read, weights: Weights, tokens: np.ndarray, state: np.ndarray, op: Op) -> np.ndarray:
    """The result of one operation, given those of others."""
    return np.asarray(step.operation.compute(here(step, read, weights, tokens, state, op)))


def run(
    weights: Weights,
    tokens: Tokens,
    state: np.ndarray | None,
    op: Op,
    tap: Tap | None = None,
    replaced: Mapping[str, Callable[[Here], Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The whole forward pass, operation by operation: ``(logits (T, n_vocab), new state)``.

    ``replaced``: other computations for some trace points, by full name, such as wrong ones. One for ``att.wkv``
    gives the state as well, as :func:`recurrence` does.
    """
    config = weights.config
    ids = check_tokens(tokens, config.n_vocab)
    past: np.ndarray = initial_state(config, op.dtype) if state is None else np.asarray(state, dtype=op.dtype)
    after = np.array(past)
    results: dict[str, Any] = {}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        for step in steps(config):
            usual: Callable[[Here], Any] = recurrence if step.name == "att.wkv" else step.operation.compute
            make = (replaced or {}).get(step.point, usual)
            made = make(here(step, results.__getitem__, weights, ids, past, op))
            if step.name == "att.wkv":
                made, after[step.layer, AA : PP + 1] = made
            results[step.point] = made
            if tap is not None:
                tap(step.point, made)
            if step.name in ("ln1", "ln2"):
                after[step.layer, ATT_X if step.name == "ln1" else FFN_X] = made[-1]
            if step.name == "ffn.residual":  # all that the rest of the model reads
                results = {step.point: made}
    return results["logits"], after
