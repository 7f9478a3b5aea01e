"""Exit status of a run: what its rows, and what was asked for by name, come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from harness.plan import ALL, Request
from harness.rows import Row
from reference.schemes import SCHEMES

PASSED, FAILED, BAD_INPUT, NOT_AVAILABLE, CRASHED, INTERRUPTED = 0, 1, 2, 3, 4, 130


class Ran(NamedTuple):
    """What a cell that could run was: it answers for the names that asked for it."""

    backend: str
    model: str
    scheme: str
    device: str
    hardware: str
    host: str | None = None


def exit_code(codes: Iterable[int]) -> int:
    """Of several, the first of 2, 4, 1, 3; 0 if there is none."""
    found = set(codes)
    return next((code for code in (BAD_INPUT, CRASHED, FAILED, NOT_AVAILABLE) if code in found), PASSED)


def row_code(row: Row, named: bool) -> int:
    """What one row means; ``named``: its very cell was asked for, no part of it by ``all``."""
    if row.verdict in ("CRASHED", "TIMEOUT"):
        return CRASHED
    if row.verdict == "UNSUPPORTED" and row.first_bad:  # a library of the user's that is not one
        return BAD_INPUT
    if row.verdict == "FAIL":
        return FAILED
    return NOT_AVAILABLE if named and row.verdict in ("UNAVAILABLE", "UNSUPPORTED") else PASSED


def ran(rows: Sequence[Row]) -> set[Ran]:
    """The cells of ``rows`` that could run, whatever came of it."""
    return {
        Ran(row.backend, row.model, row.scheme, row.device or "", row.hardware, (row.hardware_detail or {}).get("host"))
        for row in rows
        if row.verdict not in (None, "UNAVAILABLE", "UNSUPPORTED")
    }


def unmet(request: Request, found: Iterable[Ran], absent: Sequence[str] = ()) -> list[str]:
    """Names that were asked for and that no cell of ``found`` answers, as ``--option name``.

    ``absent`` is hardware already known not to be here, which needs no second word.
    """
    found = list(found)
    asked = (
        ("--backend", request.backends, lambda name, cell: name == cell.backend),
        ("--model", request.models, lambda name, cell: name == cell.model),
        ("--quant", request.schemes, lambda name, cell: name in (cell.scheme, _scheme_class(cell.scheme))),
        ("--device", request.devices, lambda name, cell: name in (cell.device, cell.device.split(":")[0])),
        ("--hardware", request.hardware, lambda name, cell: name in ("local", cell.hardware, cell.host)),
    )
    return [
        f"{option} {name}"
        for option, names, answers in asked
        for name in dict.fromkeys(names)
        if name != ALL and name not in absent and not any(answers(name, cell) for cell in found)
    ]


def _scheme_class(scheme: str) -> str:
    return SCHEMES[scheme].scheme_class if scheme in SCHEMES else ""
