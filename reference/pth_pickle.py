"""The pickle inside a ``.pth``: an interpreter that cannot execute anything, and a writer.

``pickle.loads`` calls whatever a file names. Here :mod:`pickletools` splits the pickle into opcodes
and the few that ``torch.save`` uses for a state dict are carried out on plain data. A global is never
imported: the five names torch writes are recognised, any other is refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pickle import encode_long
from typing import Any

from reference.tensor_file import is_sizes, quoted

#: Class of a torch storage -> our stored type, or the name of a type that RWKV-4 inference does not take.
_STORAGES = {
    "FloatStorage": "f32",
    "HalfStorage": "f16",
    "BFloat16Storage": "bf16",
    "DoubleStorage": "f64",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_STORAGE_CLASS = {stored: name for name, stored in _STORAGES.items()}

_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ALLOWED = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *(f"torch {name}" for name in _STORAGES)}


class PickleError(Exception):
    """A pickle that is not a state dict; the message completes "its data.pkl ..."."""


@dataclass(frozen=True)
class Global:
    """An allowed name; inert."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of ``numel`` elements of type ``stored`` in the archive member ``data/<key>``."""

    stored: str
    key: str
    numel: int


@dataclass(frozen=True)
class TorchTensor:
    """A view into a storage; ``offset`` and ``strides`` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def loads(data: bytes) -> Any:
    """What the pickle holds: dicts, lists, numbers, strings and :class:`TorchTensor`.

    Raises :class:`PickleError`; never imports, calls or allocates anything the pickle asks for.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise PickleError(f"is damaged or no torch checkpoint ({quoted(str(error))})") from None
    return machine.result


class _Machine:
    """The stack machine of the pickle protocol, restricted to what ``torch.save`` writes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSH:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise PickleError(f"uses the pickle opcode {opcode}, which no state dict needs; refused, nothing was run")

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop(self) -> Any:
        # What lies below the last mark belongs to it.
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def replace(self, n: int, make: Callable[[list[Any]], Any]) -> None:
        items = [self.pop() for _ in range(n)][::-1]
        self.stack.append(make(items))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items are set on something that is not a dict")
        for i in range(0, len(items), 2):
            if not isinstance(items[i], (str, int)):
                raise ValueError("a dict key is neither a string nor an integer")
            target[items[i]] = items[i + 1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("something is appended to what is not a list")
        self.stack[-1].extend(items)

    def build(self) -> None:
        # The state of an OrderedDict is module metadata (`_metadata`); nothing here needs it.
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("state is set on something that is not a dict")

    def stop(self) -> None:
        self.result = self.pop()


def _global(name: object) -> Global:
    if name not in _ALLOWED:
        dotted = quoted(name).replace(" ", ".")
        raise PickleError(f"asks for {dotted}, which no state dict needs; refused, nothing was run")
    return Global(str(name))


def _stack_global(items: list[Any]) -> Global:
    module, name = items
    return _global(f"{module} {name}")


def _reduce(items: list[Any]) -> Any:
    function, arguments = items
    if not (isinstance(function, Global) and isinstance(arguments, tuple)):
        raise ValueError("something that is no function is called")
    if function.name == _ORDERED_DICT and not arguments:
        return {}
    if function.name == _REBUILD_TENSOR and len(arguments) in (6, 7):
        storage, offset, shape, strides = arguments[:4]
        sizes_ok = is_sizes(shape) and is_sizes(strides) and len(shape) == len(strides)
        if isinstance(storage, Storage) and sizes_ok and is_sizes((offset,)):
            return TorchTensor(storage, offset, tuple(shape), tuple(strides))
    if function.name == _REBUILD_PARAMETER and len(arguments) == 3 and isinstance(arguments[0], TorchTensor):
        return arguments[0]
    raise ValueError(f"{function.name} is called in a way torch does not")


def _persistent(items: list[Any]) -> Storage:
    kind, storage_class, key, _, numel = items[0]
    stored = _STORAGES.get(storage_class.name[len("torch ") :]) if isinstance(storage_class, Global) else None
    if kind != "storage" or stored is None or not isinstance(key, str) or not is_sizes((numel,)):
        raise ValueError("a storage is described in a way torch does not")
    return Storage(stored, key, numel)


_PUSH = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.replace(1, tuple),
    "TUPLE2": lambda m, _: m.replace(2, tuple),
    "TUPLE3": lambda m, _: m.replace(3, tuple),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "BINPUT": lambda m, index: m.memoize(index),
    "LONG_BINPUT": lambda m, index: m.memoize(index),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, name: m.stack.append(_global(name)),
    "STACK_GLOBAL": lambda m, _: m.replace(2, _stack_global),
    "REDUCE": lambda m, _: m.replace(2, _reduce),
    "BINPERSID": lambda m, _: m.replace(1, _persistent),
    "BUILD": lambda m, _: m.build(),
    "STOP": lambda m, _: m.stop(),
}


def dumps(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The pickle of a state dict of contiguous tensors ``(name, stored type, shape)``.

    Tensor number i lies in ``data/<i>``. Protocol 2, as ``torch.save`` writes, without memo.
    """
    entries = []
    for i, (name, stored, shape) in enumerate(tensors):
        strides, numel = [], 1
        for n in reversed(shape):
            strides.append(numel)
            numel *= n
        storage = b"(" + _text("storage") + _name(f"torch {_STORAGE_CLASS[stored]}") + _text(str(i)) + _text("cpu")
        storage += _int(numel) + b"tQ"
        view = _int(0) + _ints(shape) + _ints(strides[::-1])
        hooks = _name(_ORDERED_DICT) + b")R"
        entries.append(_text(name) + _name(_REBUILD_TENSOR) + b"(" + storage + view + b"\x89" + hooks + b"tR")
    return b"\x80\x02" + _name(_ORDERED_DICT) + b")R(" + b"".join(entries) + b"u."


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _name(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _int(n: int) -> bytes:
    if n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    data = encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data


def _ints(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
