"""The record of one result: the row that is stored, compared and reported.

A row holds only what JSON holds. A NaN or an infinity given to it becomes null and is named in
``reason``; it can neither be stored as a number nor pass.

    RowError (InputError)    a field that is missing, unknown by name or of the wrong type
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from harness.samples import GREEDY, LOOP, Workload
from reference.errors import InputError

SCHEMA = 1

KINDS = ("measured", "recorded", "published", "predicted")
VERDICTS = ("PASS", "FAIL", "UNSUPPORTED", "UNAVAILABLE", "CRASHED", "TIMEOUT")
DRIVERS = (LOOP, GREEDY)

#: Metric -> unit of ``value`` and ``interval``. ``nrms``: in units of truth's spread over the vocabulary
#: (logits), or of truth's RMS (state).
METRIC_UNITS: dict[str, str] = {
    "prefill": "tok/s",
    "decode": "tok/s",
    "time_to_first_token": "s",
    "first_call": "s",
    "load": "s",
    "parity": "nrms",
    "state_parity": "nrms",
    "perplexity": "ppl",
    "bits_per_byte": "bit/byte",
    "kl_divergence": "nat/token",
    "top1_agreement": "fraction",
    "top5_agreement": "fraction",
    "lambada_accuracy": "fraction",
    "length_slope": "ns/token",
}


class RowError(InputError):
    """A row that breaks the schema, explained in one line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result of one cell; field names are those of the JSON.

    run, time        which run and when (ISO 8601); a measured row needs both
    cpus             the CPUs (and the memory) that its process was bound to, if it was
    unit             the metric's (:data:`METRIC_UNITS`); filled in if left empty
    value, interval  median (of times) or mean, and its 95 % interval, in ``unit``
    samples          raw: nanoseconds for times and rates, the metric's own unit else
    steps            decode by ``loop``: nanoseconds of every step of every sample
    blocks           which samples were taken together: ``{start, count, time, seconds, noise, disturbed, left_out}``,
                     with what else the machine did (:mod:`harness.noise`); samples of one block are not independent
    warmup           samples taken first and found to be warm-up (:mod:`harness.warmup`), not among ``samples``
    percentiles      decode by ``loop``: p50, p90 and p99 of a step, in seconds
    sampling         what measuring was asked for (:class:`harness.samples.Sampling`)
    session          names what was asked of a cell and by which code, for ``--resume`` (:mod:`harness.resume`)
    peak_bytes       growth of resident memory since before load (:mod:`harness.memory`); null for a cell whose process
                     had loaded others before and grew by less than its weights
    error, bound     parity: the error that is largest against its bound, and what it may be
    statistic        parity: which error that is, such as ``worst position`` (:mod:`harness.tolerance`)
    first_bad        parity, quality: any JSON value that says where
    checks           parity: every way the prompt was run, with its error and bound
    quality          on which text: name, hash of its ids, positions, context (:mod:`harness.quality.rows`)
    extra            fields this version does not know, kept and written back
    """

    kind: str
    run: str | None = None
    time: str | None = None
    hardware: str
    hardware_detail: Mapping[str, Any] | None = None
    backend: str
    backend_version: str | None = None
    model: str
    model_sha256: str | None = None
    synthetic: bool | None = None
    config: Mapping[str, Any] | None = None
    scheme: str
    scheme_class: str | None = None
    arithmetic: str | None = None
    device: str | None = None
    threads: int | None = None
    isolated: bool | None = None
    cpus: str | None = None
    driver: str | None = None
    workload: Workload | None = None
    metric: str
    unit: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] | None = None
    steps: tuple[tuple[int, ...], ...] | None = None
    blocks: tuple[Mapping[str, Any], ...] | None = None
    warmup: tuple[float, ...] | None = None
    percentiles: Mapping[str, float] | None = None
    sampling: Mapping[str, Any] | None = None
    session: str | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    roofline_fraction: float | None = None
    stopped: str | None = None
    command: str | None = None
    verdict: str | None = None
    reason: str | None = None
    statistic: str | None = None
    error: float | None = None
    bound: float | None = None
    first_bad: Any = None
    checks: Any = None
    quality: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        not_finite: list[str] = []
        for name in _NUMERIC_OR_NESTED:
            self._set(name, _plain(getattr(self, name), name, not_finite))
        for name in _LISTS:
            self._set(name, _tuples(getattr(self, name)))
            if any(bad.startswith(f"{name}[") for bad in not_finite):
                self._set(name, None)
        if not_finite:
            named = "not finite: " + ", ".join(not_finite[:3]) + (", ..." if len(not_finite) > 3 else "")
            self._set("reason", f"{self.reason}; {named}" if self.reason else named)
        if not self.unit:
            self._set("unit", METRIC_UNITS.get(self.metric, ""))
        _check_types(self)
        _check_meaning(self, not_finite)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Every field in plain JSON types, unknown ones included; the schema number is not in it."""
        out = {name: _listed(getattr(self, name)) for name in FIELDS}
        kept = dict(self.extra)
        if self.workload is not None:
            out["workload"] = {**vars(self.workload), **kept.pop("workload", {})}
        return {**out, **kept}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Row:
        """The row of a decoded JSON object. Raises :class:`RowError`."""
        missing = [name for name in _REQUIRED if name not in record]
        if missing:
            raise RowError(f"row: field {missing[0]!r} is missing")
        known = {name: value for name, value in record.items() if name in FIELDS}
        extra = {name: value for name, value in record.items() if name not in FIELDS}
        if record.get("workload") is not None:
            known["workload"], more = _workload(record["workload"])
            extra.update({"workload": more} if more else {})
        return Row(**known, extra=extra)


#: Names of all known fields, in the order they are written.
FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Row) if f.name != "extra")

_REQUIRED = ("kind", "hardware", "backend", "model", "scheme", "metric")
_FLAGS = ("synthetic", "isolated")
_INTEGERS = ("threads", "peak_bytes", "weight_bytes")
_NUMBERS = ("value", "roofline_fraction", "error", "bound")
_OBJECTS = ("hardware_detail", "config", "quality", "percentiles", "sampling", "extra")
_LISTS = ("interval", "samples", "steps", "blocks", "warmup")
_NUMERIC_OR_NESTED = (*_FLAGS, *_INTEGERS, *_NUMBERS, *_OBJECTS, *_LISTS, "first_bad", "checks")
_TEXTS = tuple(name for name in FIELDS if name not in (*_NUMERIC_OR_NESTED, "workload"))


def line(row: Row) -> str:
    """One line of the JSONL store, its newline included: pure ASCII, strict JSON, schema first."""
    return json.dumps({"schema": SCHEMA, **row.to_dict()}, allow_nan=False, separators=(",", ":")) + "\n"


def document(rows: Iterable[Row]) -> dict[str, Any]:
    """The JSON document of several rows: ``{"schema": 1, "rows": [...]}``."""
    return {"schema": SCHEMA, "rows": [row.to_dict() for row in rows]}


def cell(row: Row) -> tuple[Any, ...]:
    """What was measured on what: equal for two rows that may be compared with each other."""
    return (
        *(row.backend, row.scheme, row.hardware, row.device, row.model, row.workload),
        *(row.threads, row.isolated, row.driver, _text(row)),
    )


def _text(row: Row) -> str | None:
    """Which text quality was measured on."""
    found = (row.quality or {}).get("ids_sha256")
    return None if found is None else str(found)


def identity(row: Row) -> tuple[Any, ...]:
    """Equal for two rows only if one is a copy of the other: run, time, kind, metric and cell."""
    return (row.run, row.time, row.kind, row.metric, *cell(row))


def _plain(value: Any, at: str, not_finite: list[str]) -> Any:
    """``value`` in JSON's types; what is not finite becomes None and its place is noted."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        not_finite.append(f"{at} ({value})")
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RowError(f"row: {at} has the key {key!r}; JSON keys are text")
        return {key: _plain(item, f"{at}.{key}", not_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{at}[{i}]", not_finite) for i, item in enumerate(value)]
    raise RowError(f"row: {at} holds a {type(value).__name__}; JSON has no such type")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _workload(record: Any) -> tuple[Workload, dict[str, Any]]:
    """A workload from JSON, and its unknown fields."""
    names = [f.name for f in fields(Workload)]
    if not isinstance(record, Mapping) or not all(_is_int(record.get(name, 1)) for name in names):
        raise RowError(f"row: workload is {record!r}; an object of integers {', '.join(names)} is expected")
    for name in ("prompt_tokens", "decode_tokens"):
        if name not in record:
            raise RowError(f"row: workload has no {name!r}")
    try:
        known = Workload(**{name: record[name] for name in names if name in record})
    except InputError as error:
        raise RowError(f"row: {error}") from None
    return known, {name: value for name, value in record.items() if name not in names}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_number(item) for item in value)


def _are_blocks(value: Any, row: Row) -> bool:
    """Whether every sample lies in one block, in order; else a statistic over blocks would be of something else."""
    end = 0
    for block in value if isinstance(value, tuple) else [None]:
        if not isinstance(block, Mapping) or not all(_is_int(block.get(name)) for name in ("start", "count")):
            return False
        if block["start"] != end or block["count"] < 0:
            return False
        end += block["count"]
    return end == len(row.samples or ())


def _check_types(row: Row) -> None:
    def need(names: Iterable[str], expected: str, good: Any) -> None:
        for name in names:
            value = getattr(row, name)
            optional = name not in _REQUIRED and name not in ("unit", "extra")
            if not (value is None and optional) and not good(value):
                raise RowError(f"row: {name} is {value!r}; {expected}{' or null' if optional else ''} is expected")

    need(_TEXTS, "text", lambda value: isinstance(value, str))
    need(_FLAGS, "true, false", lambda value: isinstance(value, bool))
    need(_INTEGERS, "an integer", _is_int)
    need(_NUMBERS, "a number", _is_number)
    need(_OBJECTS, "an object", lambda value: isinstance(value, Mapping))
    need(["workload"], "a workload", lambda value: isinstance(value, Workload))
    need(["samples", "warmup"], "a list of numbers", _is_numbers)
    need(["interval"], "a pair [low, high]", lambda v: _is_numbers(v) and len(v) == 2 and v[0] <= v[1])
    need(["steps"], "a list of lists of numbers", lambda v: isinstance(v, tuple) and all(map(_is_numbers, v)))
    need(["blocks"], "a list of objects with start and count, one after the other", lambda v: _are_blocks(v, row))


def _check_meaning(row: Row, not_finite: list[str]) -> None:
    _one_of("kind", row.kind, KINDS)
    _one_of("metric", row.metric, tuple(METRIC_UNITS))
    if row.unit != METRIC_UNITS[row.metric]:
        raise RowError(f"row: {row.metric} is in {METRIC_UNITS[row.metric]!r}, not {row.unit!r}")
    if row.driver is not None:
        _one_of("driver", row.driver, DRIVERS)
    if row.kind == "measured" and not (row.run and row.time):
        raise RowError("row: a measured row says its run and time")
    if row.verdict is not None:
        _one_of("verdict", row.verdict, VERDICTS)
        if row.kind in ("published", "predicted"):
            raise RowError(f"row: verdict is {row.verdict}; a {row.kind} row has none, nothing was run")
    if row.verdict == "PASS":
        _check_pass(row, not_finite)
    if row.value is None and row.error is None and not row.samples and not row.reason:
        raise RowError(f"row: {row.metric} has no value, no samples and no reason why")
    for name in row.extra:
        if name == "schema" or (name in FIELDS and name != "workload"):
            raise RowError(f"row: {name!r} cannot be an extra field; the format gives it a meaning")


def _check_pass(row: Row, not_finite: list[str]) -> None:
    wrong = [name for name in not_finite if name.startswith(("value ", "error ", "bound "))]
    if wrong:
        raise RowError(f"row: verdict is PASS, yet not finite: {', '.join(wrong)}")
    if row.error is not None and row.bound is not None and not row.error <= row.bound:
        raise RowError(f"row: verdict is PASS, yet error {row.error} is above bound {row.bound}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RowError(f"row: {name} is {value!r}; {hint}known: {', '.join(known)}")
