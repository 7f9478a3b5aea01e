"""Halving ncnn's weight file: what ``pnnx fp16=1`` should write, rounded to nearest and with subnormals.

pnnx cuts the low bits off and makes zeros of what is below 2**-14. A file is the weights of its layers in
the graph's order; a matrix product's begin with a tag.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from backends.ncnn_rwkv.param_file import Layer

_FLOAT32_TAG = bytes(4)
_FLOAT16_TAG = (0x01306B47).to_bytes(4, "little")

#: Weights converted at a time.
_BLOCK = 1 << 22


def halve(layers: Iterable[Layer], source: Path, target: Path) -> None:
    """Copy ``source`` to ``target``, matrices in half precision; raises ValueError if it is not of these layers."""
    with source.open("rb") as old, target.open("wb") as new:
        for layer in layers:
            if layer.kind == "InnerProduct":
                _matrix(old, new, _integer(layer, "2"))
            elif layer.kind == "LayerNorm":
                new.write(_read(old, 2 * 4 * _integer(layer, "0")))
            elif layer.kind == "MemoryData":
                new.write(_read(old, 4 * math.prod(_integer(layer, key, 1) or 1 for key in ("0", "1", "11", "2"))))
        if old.read(1):
            raise ValueError(f"{source} is longer than the weights of its layers")


def _matrix(old: BinaryIO, new: BinaryIO, count: int) -> None:
    if _read(old, 4) != _FLOAT32_TAG:
        raise ValueError("a matrix of the exported model is not in float32")
    new.write(_FLOAT16_TAG)
    for start in range(0, count, _BLOCK):
        block = np.frombuffer(_read(old, 4 * min(_BLOCK, count - start)), dtype="<f4")
        with np.errstate(over="ignore"):  # Inf is what such a weight becomes, and it is to be seen
            new.write(block.astype("<f2").tobytes())
    new.write(bytes(2 * count % 4))


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the exported model ends before the weights of its layers do")
    return data


def _integer(layer: Layer, key: str, default: int = 0) -> int:
    values = dict(parameter.split("=", 1) for parameter in layer.parameters)
    return int(values.get(key, default))
