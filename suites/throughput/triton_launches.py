"""Every kernel launch of the Triton backend for a model's shape, recorded without a GPU and without the weights.

The model runs on torch's ``meta`` device, where tensors have shapes and types and nothing is computed; launching a
kernel writes down its arguments instead. So what is compiled ahead of time is what would be launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from backends.triton_cuda.matrix import Matrix
from backends.triton_cuda.model import Model, Tap
from backends.triton_cuda.stored import Layer, Stored
from backends.triton_cuda.types import TYPES
from reference.config import Config
from reference.schemes import Packed, codec_of

META = torch.device("meta")

_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """What a kernel is compiled for.

    what       where it is launched first: ``decode``, ``batch of 4``, ``prompt of 512``, ``traced 16``
    signature  argument -> Triton's name of its type, ``constexpr`` included
    constants  values of those
    aligned    positions of pointers and integers that are multiples of 16
    options    number of warps and the like
    """

    kernel: Any
    what: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for launches that one compiled kernel serves."""
        return repr((self.kernel.fn.__name__, self.signature, self.constants, self.aligned, self.options))


def launches(config: Config, scheme: str, prompts: tuple[int, ...], batch: int = 4) -> list[Launch]:
    """Every different launch of a step with arg-max, of one and of ``batch`` sequences, and of prompts of some lengths.

    Traced are one token and the first of ``prompts``.
    """
    found: dict[str, Launch] = {}
    model = Model(config, TYPES[scheme], META, _skeleton(config, scheme))
    with torch.inference_mode():
        for what, count in (("decode", 1), (f"batch of {batch}", batch)):
            step = model.buffers(count)
            with _recorded(what, found):
                model.step(step)
                model.choose(step)
        past = torch.empty(1, config.n_layer, 5, config.n_embd, device=META)
        passes: list[tuple[str, int, Tap | None]] = [(f"prompt of {length}", length, None) for length in prompts]
        passes += [(f"traced {length}", length, _not_looked_at) for length in (1, prompts[0])]
        for what, length, tap in passes:
            ids = torch.zeros(1, length, dtype=torch.int64, device=META)
            with _recorded(what, found):
                model.head(model.hidden(ids, past, torch.empty_like(past), tap)[-1:])
    return list(found.values())


def _not_looked_at(name: str, value: torch.Tensor) -> None:
    """A tap; values have none here."""


@contextmanager
def _recorded(what: str, found: dict[str, Launch]) -> Iterator[None]:
    """Launches are written down under ``what``, the first of each kind, and not made."""
    usual = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = _launch(self, what, arguments, named)
        found.setdefault(launch.key, launch)

    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = usual


def _launch(kernel: Any, what: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **named}
    signature, constants, aligned = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given.pop(name)
        kind = "constexpr" if parameter.is_constexpr else _kind(value)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif _address(value) % 16 == 0:
            aligned.append(i)
    return Launch(kernel, what, signature, constants, tuple(aligned), given)


def _kind(value: Any) -> str:
    """Triton makes a constant of None and of an integer 1."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _address(value: Any) -> int:
    """An integer itself; of a tensor, its offset in memory that torch aligns to 512 bytes; never aligned: a float."""
    if isinstance(value, torch.Tensor):
        return int(value.storage_offset()) * value.element_size()
    return value if isinstance(value, int) else 1


def _skeleton(config: Config, scheme: str) -> Stored:
    """The weights of a scheme without their values; one layer stands for all."""
    c, f = config.n_embd, config.n_ffn
    codec = codec_of(scheme)

    def matrix(name: str, results: int, columns: int) -> Matrix:
        kept: Any = codec.format(name)
        if not isinstance(kept, Packed):
            return Matrix(torch.empty(results, columns, dtype=_STORED[kept.stored], device=META), results, columns)
        packing: Any = kept.packing
        kn, groups = packing.layout == "KN", -(-columns // packing.group)

        def array(width: int, kind: torch.dtype) -> torch.Tensor:
            return torch.empty((width, results) if kn else (results, width), dtype=kind, device=META)

        words = array(groups * packing.bits, torch.int32)
        return Matrix(words, results, columns, array(groups, torch.float16), packing.bits, kn)

    def vectors(n: int) -> torch.Tensor:
        return torch.empty(n, c, device=META)

    att, ffn = "blocks.0.att.", "blocks.0.ffn."
    layer = Layer(
        att_norm=vectors(2),
        att_mu=vectors(3),
        decay=vectors(1)[0],
        bonus=vectors(1)[0],
        kvr=matrix(att + "key.weight", 3 * c, c),
        output=matrix(att + "output.weight", c, c),
        ffn_norm=vectors(2),
        ffn_mu=vectors(2),
        kr=matrix(ffn + "key.weight", f + c, c),
        value=matrix(ffn + "value.weight", c, f),
        unit=1.0,
    )
    embedding, head = matrix("emb.weight", config.n_vocab, c), matrix("head.weight", config.n_vocab, c)
    return Stored(embedding, vectors(2), (layer,), vectors(2), head)
