"""Figures written down by hand: a csv with a header, one figure a line.

    hardware,backend,model,scheme,metric,value,threads,prompt_tokens,decode_tokens,date,note
    m2,mlc-llm,3b-world,q4f16_1,decode,26.3,,256,64,2023-08-14,from the app's screen

``metric`` and ``value`` are needed; a column that is absent or a value that is empty comes from the options.
Lines that are empty or begin with ``#`` are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.names import did_you_mean
from harness.printed.figures import Figure, Lines, Reading, Rejected, Unusable, cells_of, number, shown, spread, whole
from harness.rows import METRIC_UNITS

NEEDED = ("metric", "value")
TEXTS = ("hardware", "backend", "backend_version", "model", "scheme", "date", "note")
NUMBERS: Mapping[str, int] = {"threads": 1, "prompt_tokens": 1, "decode_tokens": 0}
COLUMNS = (*NEEDED, "unit", *TEXTS, *NUMBERS, "sd")

#: What can be written down from another program: speeds, times and perplexity. Parity is judged, never imported.
METRICS = tuple(name for name, unit in METRIC_UNITS.items() if unit in ("tok/s", "s", "ppl", "bit/byte"))


def read(lines: Lines) -> Reading:
    """Every row under the header; without a usable header nothing but the reason."""
    kept = [(at, line) for at, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    if not kept:
        return Reading((), (), 0)
    (top, header_line), *body = kept
    try:
        header = _header(header_line)
    except Unusable as error:
        return Reading((), (Rejected(top, shown(header_line), str(error)),), len(body))
    figures: list[Figure] = []
    rejected: list[Rejected] = []
    for at, line in body:
        try:
            figures.append(_figure(_record(header, line), at, shown(line)))
        except Unusable as error:
            rejected.append(Rejected(at, shown(line), str(error)))
    return Reading(tuple(figures), tuple(rejected), 0)


def _header(line: str) -> list[str]:
    """Names of the columns. Raises :class:`Unusable`."""
    header = [name.strip().lower() for name in cells_of(line)]
    for name in header:
        if name not in COLUMNS:
            raise Unusable(f"no column {name!r}; {did_you_mean(name, COLUMNS)}columns: {', '.join(COLUMNS)}")
        if header.count(name) > 1:
            raise Unusable(f"the column {name!r} stands there twice")
    lacking = [name for name in NEEDED if name not in header]
    if lacking:
        raise Unusable(f"the header lacks {', '.join(lacking)}; columns: {', '.join(COLUMNS)}")
    return header


def _record(header: list[str], line: str) -> dict[str, str]:
    """Column -> value, empty ones left out. Raises :class:`Unusable`."""
    cells = cells_of(line)
    if len(cells) != len(header):
        raise Unusable(f"{len(cells)} values under {len(header)} columns")
    return {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}


def _figure(record: Mapping[str, str], line: int, text: str) -> Figure:
    for name in NEEDED:
        if name not in record:
            raise Unusable(f"{name} is empty")
    metric = record["metric"]
    if metric not in METRICS:
        hint = did_you_mean(metric, METRICS)
        raise Unusable(f"no metric {metric!r} to import; {hint}there are {', '.join(METRICS)}")
    unit = METRIC_UNITS[metric]
    if record.get("unit", unit) != unit:
        raise Unusable(f"{metric} is in {unit}, not {record['unit']}")
    says = {
        **{name: record[name] for name in TEXTS if name in record},
        **{name: whole(record[name], least) for name, least in NUMBERS.items() if name in record},
    }
    facts = {"sd": spread(record["sd"])} if "sd" in record else {}
    return Figure(metric, number(record["value"]), line, text, says, facts)
