"""Trace points of an ordinary library, from outside: which kernel reads which parameter, and what its name says.

TVM calls an instrument after every kernel of a virtual machine, with its name and arguments, the last of which it
wrote. A kernel that reads ``att.key.weight`` and is a ``matmul`` gives ``att.k``; ``fused_NT_matmul2_sigmoid`` over
``att.receptance.weight`` gives ``att.r``; ``add`` over ``att.out`` gives ``att.residual``. Where a kernel is fused so
that its output is no trace point, or its name has a word that is not known, nothing is shown for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from backends.tvm_mlc.library import Library, runtime
from backends.tvm_mlc.points import OF_THE_STREAM, trace_points

#: What TVM's names of kernels are made of: operators, and words that change no value.
_SILENT = ("fused", "tir", "NT", "NN", "cast", "astype", "decode", "decoded", "dequantize", "transpose", "reshape")
_OPERATORS = ("layer_norm", "matmul", "sigmoid", "relu", "square", "multiply", "add", "divide", "subtract", "take")
_WORD = re.compile(rf"({'|'.join((*_OPERATORS, *_SILENT, 'permute_dims', 'wkv', 'ones'))})\d*(?=_|$)|(_)")

#: Matrix -> label of what it is multiplied with, and of the product; of ``receptance`` the sigmoid is taken then.
_PRODUCTS = {
    "att.key": ("att.xk", "att.k"),
    "att.value": ("att.xv", "att.v"),
    "att.receptance": ("att.xr", "att.receptance"),
    "att.output": ("att.rwkv", "att.out"),
    "ffn.key": ("ffn.xk", "ffn.k"),
    "ffn.receptance": ("ffn.xr", "ffn.receptance"),
    "ffn.value": ("ffn.k2", "ffn.v"),
}

#: (labels read, operators) -> label written.
_RULES = {
    ("att.receptance", "sigmoid"): "att.r",
    ("ffn.receptance", "sigmoid"): "ffn.r",
    ("ffn.k", "relu square"): "ffn.k2",
    ("ffn.k", "relu"): "ffn.relu",
    ("ffn.relu", "square"): "ffn.k2",
    ("att.r att.wkv", "multiply"): "att.rwkv",
    ("att.receptance att.wkv", "multiply sigmoid"): "att.rwkv",
    ("att.out", "add"): "att.residual",
    ("ffn.r ffn.v", "multiply"): "ffn.out",
    ("ffn.out", "add"): "ffn.residual",
    ("ffn.out", "add divide"): "ffn.residual",
    ("ffn.r ffn.v", "add multiply"): "ffn.residual",
    ("ffn.r ffn.v", "add divide multiply"): "ffn.residual",
    ("ffn.receptance ffn.v", "multiply sigmoid"): "ffn.out",
    ("ffn.receptance ffn.v", "add multiply sigmoid"): "ffn.residual",
    ("ffn.receptance ffn.v", "add divide multiply sigmoid"): "ffn.residual",
    ("ffn.residual", "divide"): "ffn.residual",
}


class Recorder:
    """An instrument of one virtual machine, which collects the points of what it runs.

    The labels of tensors are kept by address; memory that is used again is labelled again.
    """

    def __init__(self, library: Library, parameters: Any) -> None:
        self._weights = {tensor.data_ptr(): item.tensor for tensor, item in zip(parameters, library.parameters)}
        self._derived: dict[int, str] = {}
        self._labels: dict[int, str] = {}
        self._points: dict[str, list[np.ndarray]] = {}
        self._order = trace_points(library.config.n_layer)
        self._halvings = 0
        self._kind = runtime().runtime.Tensor

    def __call__(self, function: Any, name: str, before: bool, returned: Any, *arguments: Any) -> int:
        """Called by TVM before and after every call of a function; 0 lets it run."""
        tensors = [a for a in arguments if isinstance(a, self._kind)]
        if not before and not name.startswith("vm.") and tensors:
            self._look(name if len(tensors) == len(arguments) else "", tensors)
        return 0

    def points(self, rows: int) -> Iterator[tuple[str, np.ndarray]]:
        """What has been seen of all ``rows`` tokens, in execution order: float32 ``(rows, width)``."""
        for name in self._order:
            found = self._points.get(name, [])
            # The logits of a prompt, and its last LayerNorm, are computed of the last token only.
            if found and sum(len(part) for part in found) == rows:
                yield name, np.concatenate(found)

    def _look(self, name: str, tensors: list[Any]) -> None:
        operators = words(name)
        *read, written = tensors
        weights = {w for t in read if (w := self._weight(t)) is not None}
        labels = {self._labels[t.data_ptr()] for t in read if self._weight(t) is None and t.data_ptr() in self._labels}
        if weights and all(self._weight(t) is not None for t in read):
            self._forget(written)
            if len(weights) == 1:
                self._derived[written.data_ptr()] = weights.pop()
            return
        if any(w.endswith("time_decay") for w in weights):
            self._write_wkv(tensors)
            return
        self._forget(written)
        label = None if operators is None else _label(operators, weights, labels)
        if label is not None:
            self._show(label, written, operators or set())

    def _show(self, label: str, tensor: Any, operators: set[str]) -> None:
        self._labels[tensor.data_ptr()] = label
        if label == "emb":
            self._halvings = 0
        again = operators == {"divide"}  # a halving by itself, of a residual that has been shown
        scale = np.float32(2.0**self._halvings if label.endswith(OF_THE_STREAM) else 1.0)
        if "divide" in operators:
            self._halvings += 1
            scale *= np.float32(2)
        if label in self._order and not again and operators:
            array = tensor.numpy().astype(np.float32)
            self._points.setdefault(label, []).append(array.reshape(-1, array.shape[-1]) * scale)

    def _write_wkv(self, tensors: list[Any]) -> None:
        """The recurrence: after the three sums it reads come its output and the three that it writes."""
        first = next(i for i, t in enumerate(tensors) if (self._weight(t) or "").endswith("time_first"))
        layer = str(self._weight(tensors[first])).rsplit(".", 1)[0]
        for tensor in tensors[first + 4 :]:
            self._forget(tensor)
        if len(tensors) == first + 8:
            self._show(f"{layer}.wkv", tensors[first + 4], {"wkv"})

    def _weight(self, tensor: Any) -> str | None:
        address = tensor.data_ptr()
        return self._weights.get(address, self._derived.get(address))

    def _forget(self, tensor: Any) -> None:
        self._labels.pop(tensor.data_ptr(), None)
        self._derived.pop(tensor.data_ptr(), None)


def words(name: str) -> set[str] | None:
    """Operators of a kernel by its name; None where a part of it is not known."""
    found: set[str] = set()
    end = 0
    for match in _WORD.finditer(name):
        if match.start() != end:
            return None
        end = match.end()
        if match[1] in _OPERATORS:
            found.add(match[1])
    return found if name and end == len(name) else None


def _label(operators: set[str], weights: set[str], labels: set[str]) -> str | None:
    """What a kernel has written, by its operators and what it reads; None where that is no point."""
    if weights == {"emb.weight"} and "take" in operators and operators == {"take"}:
        return "emb"
    stems = {weight.rsplit(".", 1)[0] for weight in weights}
    if len(stems) == 1 and operators == {"layer_norm"}:
        return stems.pop()
    if len(weights) == 1:
        return _of_weight(operators, weights.copy().pop(), labels)
    if weights or not labels:
        return None
    if len(labels) == 1 and not operators:
        return labels.copy().pop()
    return _by_rule(operators, labels)


def _of_weight(operators: set[str], weight: str, labels: set[str]) -> str | None:
    head, _, last = weight.rpartition(".")
    if last.startswith("time_mix_"):
        return _mixed(operators, f"{head}.x{last[-1]}")
    if "matmul" not in operators:
        return None
    if weight == "head.weight":
        return "logits" if operators == {"matmul"} else None
    _, layer, module = head.split(".", 2)
    taken, product = _PRODUCTS[module]
    rest = operators - {"matmul"}
    beside = labels - {f"blocks.{layer}.{taken}"}
    return _by_rule(rest, {f"blocks.{layer}.{product}", *beside}) if rest else f"blocks.{layer}.{product}"


def _mixed(operators: set[str], point: str) -> str:
    """The mixed input where products and sum are one kernel, else a part of it."""
    return point if {"multiply", "add"} <= operators else f"part of {point}"


def _by_rule(operators: set[str], labels: set[str]) -> str | None:
    parts = {label for label in labels if label.startswith("part of ")}
    if parts:
        return parts.pop()[len("part of ") :] if labels == parts and operators == {"add"} and len(parts) == 1 else None
    layers = {label.split(".")[1] for label in labels if label.startswith("blocks.")}
    # The residual before is read as well: where a point is added to it, its label is not part of the rule.
    named = {label.split(".", 2)[2] for label in labels if label.startswith("blocks.")}
    if "add" in operators:
        named -= {"att.residual", "ffn.residual", "ln0"}
        layers = {label.split(".")[1] for label in labels if label.split(".", 2)[-1] in named} or layers
    found = _RULES.get((" ".join(sorted(named)), " ".join(sorted(operators))))
    return f"blocks.{layers.pop()}.{found}" if found and len(layers) == 1 else None
