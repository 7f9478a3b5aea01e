"""Writing an ONNX graph whose weights lie in one file beside it, which the runtime maps into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import onnx
from onnx import TensorProto, helper

#: Tensors start at multiples of this, as mapping on any system (Windows: 64 KiB) wants.
_ALIGNMENT = 1 << 16
#: Tensors below this many bytes are kept in the graph itself.
_SMALL = 1 << 10

_OPSET, _IR, _CONTRIB = 17, 8, "com.microsoft"
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}

#: Name, element type, shape (``None``: of any rank; a name in it: of any length).
Value = tuple[str, int, Optional[Sequence[Union[int, str]]]]  # noqa: UP007, UP045 - Python 3.9 evaluates it


class WeightFile:
    """Tensors appended to one file; a graph beside it refers to them by name."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file: BinaryIO = path.open("wb")
        self.tensors: dict[str, TensorProto] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor."""
        data = np.ascontiguousarray(array)
        tensor = TensorProto(name=name, dims=data.shape, data_type=_TYPES[data.dtype.name])
        if data.nbytes < _SMALL:
            tensor.raw_data = data.tobytes()
        else:
            offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
            self._file.seek(offset)
            self._file.write(data.data)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._name), ("offset", offset), ("length", data.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
        self.tensors[name] = tensor

    def close(self) -> None:
        """Everything is written."""
        self._file.close()


class Graph:
    """Nodes appended one after the other; a result is numbered unless the caller names it.

    A ``parent`` makes it a branch or a loop's body: it sees what the parent has computed, and keeps its
    constants there.
    """

    def __init__(self, weights: WeightFile, parent: Graph | None = None, name: str = "") -> None:
        self._weights = weights
        self._name = name
        self._nodes: list[Any] = []
        self._used: dict[str, TensorProto] = {} if parent is None else parent._used
        self._count = 0

    def inner(self, name: str) -> Graph:
        """The beginning of a branch or body; ``name`` is one of its own."""
        return Graph(self._weights, self, name)

    def weight(self, name: str) -> str:
        """A tensor of the weight file, as an input of nodes."""
        self._used[name] = self._weights.tensors[name]
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 vector."""
        return self._constant(TensorProto.INT64, [len(values)], values)

    def integer(self, value: int) -> str:
        """A constant int64 without dimensions."""
        return self._constant(TensorProto.INT64, [], [value])

    def scalar(self, value: float) -> str:
        """A constant float32 without dimensions."""
        return self._constant(TensorProto.FLOAT, [], [value])

    def op(self, kind: str, *inputs: str, to: str = "", attributes: dict[str, Any] | None = None) -> str:
        """Append a node of one result; its name."""
        return self.ops(kind, *inputs, to=(to,), attributes=attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: str,
        to: Sequence[str | None],
        attributes: dict[str, Any] | None = None,
        domain: str = "",
    ) -> list[str]:
        """Append a node with a result for each of ``to`` (empty: numbered; ``None``: not wanted); their names."""
        names = []
        for name in to:
            self._count += 1
            names.append("" if name is None else name or f"{self._name}{kind}_{self._count}")
        node = helper.make_node(kind, list(inputs), names, name=names[0], domain=domain, **attributes or {})
        self._nodes.append(node)
        return names

    def contrib(self, kind: str, *inputs: str, to: Sequence[str | None] = ("",), **attributes: Any) -> list[str]:
        """Append a node of ONNX Runtime's own operators."""
        return self.ops(kind, *inputs, to=to, attributes=attributes, domain=_CONTRIB)

    def body(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Any:
        """What was appended, as the attribute of an If or a Scan."""
        return helper.make_graph(self._nodes, self._name, *_infos(inputs, outputs))

    def save(self, path: Path, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        """Write the graph."""
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        constants = list(self._used.values())
        graph = helper.make_graph(self._nodes, path.stem, *_infos(inputs, outputs), initializer=constants)
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=_IR, producer_name="rwkv-bench"), str(path))

    def _constant(self, kind: int, shape: list[int], values: Sequence[float]) -> str:
        name = "_".join(["constant", str(kind), *map(str, shape), *(f"{value:g}" for value in values)])
        self._used[name] = helper.make_tensor(name, kind, shape, values)
        return name


def _infos(*sides: Sequence[Value]) -> list[list[Any]]:
    return [[helper.make_tensor_value_info(*value) for value in values] for values in sides]
