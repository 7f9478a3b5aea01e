"""The row: nothing is lost on the way through JSON, nothing wrong gets in."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.rows import FIELDS, KINDS, METRIC_UNITS, SCHEMA, VERDICTS, Row, RowError, cell, document, identity, line
from harness.samples import Workload
from reference.errors import InputError

NAMES = {"hardware": "cpu", "backend": "torch", "model": "tiny", "scheme": "fp32", "run": "r1", "time": "2024-01-01"}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


def row(**fields: Any) -> Row:
    """A good row with some fields changed."""
    return Row(**{"kind": "measured", "metric": "decode", "value": 12.5, **NAMES, **fields})


def full() -> Row:
    """A row with every field set."""
    return row(
        hardware_detail={"name": "Xeon", "cpus": 4},
        backend_version="2.4",
        model_sha256="ab" * 32,
        synthetic=False,
        config={"n_layer": 2, "n_embd": 64},
        scheme_class="f32",
        arithmetic="fp32",
        device="cpu",
        threads=4,
        isolated=True,
        cpus="0-3",
        driver="loop",
        workload=Workload(256, 64, 1),
        unit="tok/s",
        interval=(12.0, 13.0),
        samples=(5_000_000_000, 5_100_000_000),
        steps=((1, 2), (3, 4)),
        blocks=({"start": 0, "count": 1, "noise": {"load": 0.5}}, {"start": 1, "count": 1, "disturbed": "steal"}),
        warmup=(9_000_000_000,),
        percentiles={"p50": 0.1},
        sampling={"repeats": 2},
        session="ab12",
        peak_bytes=1 << 33,
        weight_bytes=1 << 20,
        roofline_fraction=0.25,
        stopped="repeats reached",
        command="rwkv-bench run",
        verdict="PASS",
        reason="because",
        statistic="rms",
        error=0.5,
        bound=0.75,
        first_bad={"check": "x", "where": [1, 2]},
        checks=[{"check": "x", "error": 0.5}],
        quality={"text": "x", "ids_sha256": "ab", "positions": 4},
    )


def test_the_fields_are_those_of_the_format() -> None:
    text = """kind run time hardware hardware_detail backend backend_version model model_sha256 synthetic config
    scheme scheme_class arithmetic device threads isolated cpus driver workload metric unit value interval samples
    peak_bytes weight_bytes roofline_fraction stopped command verdict reason error bound first_bad
    checks quality"""
    measuring = ("blocks", "warmup", "percentiles", "sampling", "session")
    assert [name for name in FIELDS if name not in ("steps", "statistic", *measuring)] == text.split()
    assert SCHEMA == 1
    assert KINDS == ("measured", "recorded", "published", "predicted")
    assert VERDICTS == ("PASS", "FAIL", "UNSUPPORTED", "UNAVAILABLE", "CRASHED", "TIMEOUT")


class TestRoundTrip:
    def test_every_field(self) -> None:
        before = full()
        assert all(getattr(before, name) is not None for name in FIELDS)
        record = json.loads(json.dumps(before.to_dict(), allow_nan=False))
        assert list(record) == list(FIELDS)
        assert record["workload"] == {"prompt_tokens": 256, "decode_tokens": 64, "batch": 1}
        assert Row.from_dict(record) == before

    def test_least_fields(self) -> None:
        assert Row.from_dict(row().to_dict()) == row()

    def test_unknown_fields_are_written_back(self) -> None:
        record = {**full().to_dict(), "colour": {"deep": [1, None]}, "extra": 3}
        record["workload"] = {**record["workload"], "beams": 2}
        found = Row.from_dict(record)
        assert found.workload == Workload(256, 64, 1)
        assert found.extra == {"colour": {"deep": [1, None]}, "extra": 3, "workload": {"beams": 2}}
        assert found.to_dict() == record
        assert Row.from_dict(found.to_dict()) == found

    @given(
        st.dictionaries(
            st.text().filter(lambda name: name not in (*FIELDS, "schema")),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
            max_size=4,
        ),
        st.text(),
    )
    def test_any_unknown_field_on_one_ascii_line(self, unknown: dict[str, Any], reason: str) -> None:
        found = Row.from_dict({**row(reason=reason).to_dict(), **unknown})
        text = line(found)
        assert text.isascii()
        assert text.count("\n") == 1
        record = json.loads(text)
        assert record.pop("schema") == SCHEMA
        assert Row.from_dict(record) == found

    def test_document(self) -> None:
        assert document([row(), full()]) == {"schema": 1, "rows": [row().to_dict(), full().to_dict()]}
        assert document([]) == {"schema": 1, "rows": []}

    def test_numpy_becomes_plain(self) -> None:
        found = row(value=np.float32(0.5), samples=np.array([1, 2]), threads=np.int64(3), config={"a": np.arange(2)})
        assert (found.value, found.samples, found.threads, found.config) == (0.5, (1, 2), 3, {"a": [0, 1]})
        json.dumps(found.to_dict(), allow_nan=False)


class TestNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
    @pytest.mark.parametrize("name", ["value", "error", "bound", "roofline_fraction"])
    def test_becomes_null_with_a_reason(self, name: str, bad: float) -> None:
        found = row(verdict="FAIL", **{name: bad})
        assert getattr(found, name) is None
        assert found.reason == f"not finite: {name} ({float(bad)})"
        assert "NaN" not in line(found)
        assert "Infinity" not in line(found)
        assert Row.from_dict(found.to_dict()) == found

    def test_a_reason_that_was_there_stays(self) -> None:
        assert row(value=math.nan, reason="it broke").reason == "it broke; not finite: value (nan)"

    def test_a_list_with_a_hole_is_no_list(self) -> None:
        found = row(samples=(1, math.nan), interval=(1.0, math.inf), steps=((1, math.nan),))
        assert (found.samples, found.interval, found.steps) == (None, None, None)
        assert found.reason == "not finite: interval[1] (inf), samples[1] (nan), steps[0][1] (nan)"

    def test_deep_inside(self) -> None:
        found = row(first_bad={"values": [1.0, math.inf]}, extra={"mine": math.nan})
        assert found.first_bad == {"values": [1.0, None]}
        assert found.reason == "not finite: extra.mine (nan), first_bad.values[1] (inf)"

    @pytest.mark.parametrize("name", ["value", "error", "bound"])
    def test_never_passes(self, name: str) -> None:
        with pytest.raises(RowError, match=f"PASS, yet not finite: {name}"):
            row(verdict="PASS", **{name: math.nan})


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"kind": "guessed"}, "kind is 'guessed'; known: measured, recorded, published, predicted"),
            ({"metric": "decoed"}, "did you mean 'decode'"),
            ({"metric": "prefill", "unit": "ms"}, "prefill is in 'tok/s', not 'ms'"),
            ({"verdict": "pass"}, "verdict is 'pass'"),
            ({"driver": "fast"}, "driver is 'fast'; known: loop, greedy"),
            ({"verdict": "PASS", "kind": "published"}, "a published row has none"),
            ({"verdict": "FAIL", "kind": "predicted"}, "a predicted row has none"),
            ({"verdict": "PASS", "error": 2.0, "bound": 1.0}, "error 2.0 is above bound 1.0"),
            ({"run": None}, "says its run and time"),
            ({"time": None}, "says its run and time"),
            ({"value": None}, "no value, no samples and no reason"),
            ({"value": "fast"}, "value is 'fast'; a number or null is expected"),
            ({"value": True}, "value is True"),
            ({"threads": 2.5}, "threads is 2.5; an integer or null is expected"),
            ({"threads": True}, "threads is True"),
            ({"isolated": 1}, "isolated is 1; true, false or null is expected"),
            ({"backend": None}, "backend is None; text is expected"),
            ({"reason": 3}, "reason is 3"),
            ({"interval": (2.0, 1.0)}, "interval is"),
            ({"interval": (1.0,)}, "interval is"),
            ({"samples": 5}, "samples is 5"),
            ({"samples": ["1"]}, "samples is"),
            ({"steps": (1, 2)}, "steps is"),
            ({"samples": (1, 2), "blocks": ({"start": 0, "count": 1},)}, "blocks is"),
            ({"samples": (1, 2), "blocks": ({"start": 1, "count": 1}, {"start": 0, "count": 1})}, "blocks is"),
            ({"samples": (1, 2), "blocks": ({"start": 0},)}, "blocks is"),
            ({"samples": (1, 2), "blocks": (2,)}, "blocks is"),
            ({"config": [1]}, "config is"),
            ({"config": {1: 2}}, "config has the key 1"),
            ({"first_bad": object()}, "first_bad holds a object; JSON has no such type"),
            ({"workload": {"prompt_tokens": 1}}, "workload is"),
            ({"extra": {"value": 1}}, "'value' cannot be an extra field"),
            ({"extra": {"schema": 1}}, "'schema' cannot be an extra field"),
        ],
    )
    def test_with_one_line(self, fields: dict[str, Any], says: str) -> None:
        with pytest.raises(RowError) as raised:
            row(**fields)
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
        assert isinstance(raised.value, InputError)

    @pytest.mark.parametrize("name", ["kind", "hardware", "backend", "model", "scheme", "metric"])
    def test_missing(self, name: str) -> None:
        record = row().to_dict()
        del record[name]
        with pytest.raises(RowError, match=f"field '{name}' is missing"):
            Row.from_dict(record)

    @pytest.mark.parametrize(
        ("workload", "says"),
        [
            (5, "an object of integers"),
            ({"prompt_tokens": "8", "decode_tokens": 2}, "an object of integers"),
            ({"prompt_tokens": 8}, "no 'decode_tokens'"),
            ({"prompt_tokens": 0, "decode_tokens": 2}, "prompt_tokens is 0"),
        ],
    )
    def test_workload(self, workload: Any, says: str) -> None:
        with pytest.raises(RowError, match=says):
            Row.from_dict({**row().to_dict(), "workload": workload})


def test_a_row_without_a_number_says_why_or_has_samples() -> None:
    assert row(value=None, reason="no such device").value is None
    assert row(value=None, samples=(1, 2)).value is None
    assert row(metric="parity", value=None, error=0.1).value is None


@pytest.mark.parametrize(("metric", "unit"), METRIC_UNITS.items())
def test_unit_follows_the_metric(metric: str, unit: str) -> None:
    assert row(metric=metric).unit == unit


def test_identity_and_cell() -> None:
    a = full()
    assert identity(a) == identity(Row.from_dict(a.to_dict()))
    assert cell(a) == cell(row(**{**vars(a), "run": "r2", "metric": "prefill"}))
    for change in ({"run": "r2"}, {"time": "t2"}, {"metric": "prefill"}, {"driver": "greedy"}, {"threads": 1}):
        assert identity(row(**{**vars(a), **change})) != identity(a)
    assert cell(row(**{**vars(a), "workload": Workload(1, 1)})) != cell(a)
    other = {**vars(a), "quality": {"text": "x", "ids_sha256": "cd", "positions": 4}}
    assert cell(row(**other)) != cell(a)  # another text is another cell
    assert cell(row(**{**vars(a), "quality": {**(a.quality or {}), "blocks": 8}})) == cell(a)
    assert len({identity(a), identity(row())}) == 2  # hashable
