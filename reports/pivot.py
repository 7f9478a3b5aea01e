"""Cells -> tables of hardware × quantization × backend, one for prefill and one for decode."""

from __future__ import annotations

from collections.abc import Sequence

from reports.cells import SPEEDS, Cell, scheme_class
from reports.tables import Table, speed

#: Order of quantization classes, widest first; others follow by name.
_CLASSES = ("f32", "f16", "bf16", "int8", "int5", "int4", "int3")

_KEYS = ("hardware", "quantization")


def pivots(cells: Sequence[Cell]) -> list[Table]:
    """Tables of the measured cells, apart for every model and workload, since those do not compare."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.first.kind == "measured" and (cell.first.workload is not None or cell.judged):
            groups.setdefault(_about(cell), []).append(cell)
    # A cell that never started has no workload; it belongs to every table of its model.
    refused = [cell for cells_ in groups.values() for cell in cells_ if cell.first.workload is None]
    return [
        _pivot(metric, about, [*own, *(cell for cell in refused if cell.first.model == own[0].first.model)])
        for about, own in groups.items()
        if own[0].first.workload is not None
        for metric in SPEEDS
        if any(cell.speed(metric) for cell in own)
    ]


def _about(cell: Cell) -> str:
    row = cell.first
    model = f"model {row.model}" + (" (synthetic weights)" if row.synthetic else "")
    if row.workload is None:
        return model
    batch = f", batch {row.workload.batch}" if row.workload.batch > 1 else ""
    return f"{model} · prompt {row.workload.prompt_tokens}, decode {row.workload.decode_tokens} tokens{batch}"


def _pivot(metric: str, about: str, cells: Sequence[Cell]) -> Table:
    backends = list(dict.fromkeys(cell.first.backend for cell in cells))
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    several = len({cell.first.threads for cell in cells} - {None}) > 1
    for cell in cells:
        key = (cell.hardware, scheme_class(cell.first) or cell.first.scheme)
        text = _entry(cell, metric, several)
        if text:
            places.setdefault(key, {}).setdefault(cell.first.backend, []).append(text)
    lines = [
        (*key, *("\n".join(dict.fromkeys(places[key].get(backend, ()))) for backend in backends))
        for key in sorted(places, key=lambda key: (key[0], _rank(key[1])))
    ]
    title = f"{metric} tok/s by hardware, quantization and backend · {about} · median, ± 95 % interval"
    return Table(title, (*_KEYS, *backends), tuple(lines), (), left=_KEYS)


def _rank(name: str) -> tuple[int, str]:
    return (_CLASSES.index(name) if name in _CLASSES else len(_CLASSES), name)


def _entry(cell: Cell, metric: str, several: bool) -> str:
    """``q4f16_1 1433 ±31%``; the verdict where there is no speed."""
    row = cell.speed(metric)
    name = cell.first.scheme + (f" ({cell.first.threads} threads)" if several and cell.first.threads else "")
    if row is None:
        return f"{name} {cell.judged}" if cell.judged else ""
    return f"{name} {speed(row)}"
