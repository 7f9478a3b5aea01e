"""Edits of ncnn's text format (``.param``) for what pnnx has no option for: names of blobs, types of layers.

A file is a magic number, the numbers of layers and blobs, and one line a layer:
``Type name n_bottoms n_tops bottoms... tops... key=value...``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

MAGIC = "7767517"

#: A layer's feature mask (parameter 31): bit 2 keeps it out of bfloat16 storage.
_NO_BF16 = "31=4"

#: Cast from float32 to float32. It takes no bfloat16 blobs, so ncnn converts its input, which it then passes on.
_TO_FLOAT32 = ("0=1", "1=1")


@dataclass(frozen=True)
class Layer:
    """One line; ``bottoms`` and ``tops`` are the names of the blobs it reads and writes."""

    kind: str
    name: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def parse(text: str) -> list[Layer]:
    """Layers of a ``.param`` file; raises ValueError for anything else."""
    lines = text.split("\n")
    if not lines or lines[0].strip() != MAGIC:
        raise ValueError(f"not a .param file of ncnn: it starts with {lines[0][:20]!r}, not {MAGIC}")
    layers = []
    for line in filter(str.strip, lines[2:]):
        kind, name, n_bottoms, n_tops, *rest = line.split()
        a, b = int(n_bottoms), int(n_bottoms) + int(n_tops)
        layers.append(Layer(kind, name, tuple(rest[:a]), tuple(rest[a:b]), tuple(rest[b:])))
    return layers


def render(layers: Iterable[Layer]) -> str:
    """The text of a ``.param`` file."""
    lines = []
    blobs = 0
    for layer in layers:
        blobs += len(layer.tops)
        counts = (str(len(layer.bottoms)), str(len(layer.tops)))
        lines.append(" ".join([layer.kind, layer.name, *counts, *layer.bottoms, *layer.tops, *layer.parameters]))
    return "\n".join([MAGIC, f"{len(lines)} {blobs}", *lines, ""])


def renamed(layers: Iterable[Layer], names: Mapping[str, str]) -> list[Layer]:
    """The same graph with blobs called by other names."""

    def new(blobs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(blob, blob) for blob in blobs)

    return [replace(layer, bottoms=new(layer.bottoms), tops=new(layer.tops)) for layer in layers]


def kept_float32(layers: Iterable[Layer], parts: Iterable[tuple[Iterable[str], Iterable[str]]]) -> list[Layer]:
    """The same graph, in float32 in some parts of it where storage is bfloat16.

    parts  ``(sources, results)`` each: the layers on a way from a source blob to a result blob are kept

    ncnn converts blobs at layers that are in bfloat16 storage only. So the result of a matrix product is
    converted on its way in, and constants and inputs reach the part through no copy in bfloat16.
    """
    layers = list(layers)
    maker = {top: layer for layer in layers for top in layer.tops}
    region: set[int] = set()
    for sources, results in parts:
        region |= _downstream(layers, {_original(blob, maker) for blob in sources}) & _upstream(layers, set(results))
    produced_in = {top for i in region for top in layers[i].tops}
    kept: list[Layer] = []
    converted: dict[str, str] = {}
    for i, layer in enumerate(layers):
        if i not in region:
            constant = layer.kind == "Split" and maker[layer.bottoms[0]].kind in ("Input", "MemoryData")
            kept.append(_masked(layer) if constant else layer)
            continue
        for blob in layer.bottoms:
            if blob not in converted and blob not in produced_in and maker[blob].kind == "InnerProduct":
                converted[blob] = f"{blob}.float32"
                kept.append(Layer("Cast", f"float32_{blob}", (blob,), (converted[blob],), _TO_FLOAT32))
        kept.append(replace(_masked(layer), bottoms=tuple(converted.get(blob, blob) for blob in layer.bottoms)))
    return kept


def _original(blob: str, maker: Mapping[str, Layer]) -> str:
    """The blob of which this one is a copy; a blob used twice goes through a Split."""
    while maker[blob].kind == "Split":
        blob = maker[blob].bottoms[0]
    return blob


def _masked(layer: Layer) -> Layer:
    return replace(layer, parameters=(*layer.parameters, _NO_BF16))


def _downstream(layers: list[Layer], blobs: set[str]) -> set[int]:
    """Layers that depend on one of ``blobs``; the file is in order of execution."""
    reached, found = set(blobs), set()
    for i, layer in enumerate(layers):
        if reached & set(layer.bottoms):
            reached |= set(layer.tops)
            found.add(i)
    return found


def _upstream(layers: list[Layer], blobs: set[str]) -> set[int]:
    """Layers on which one of ``blobs`` depends."""
    wanted, found = set(blobs), set()
    for i in reversed(range(len(layers))):
        if wanted & set(layers[i].tops):
            wanted |= set(layers[i].bottoms)
            found.add(i)
    return found
