"""Published claims: explicit about what they leave out, and held against our own figures by a rule that is derived."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports.published
from harness.machine.known import profiles
from harness.recorded import every_recorded, measured_rows
from harness.rows import Row
from harness.samples import Workload
from harness.store import append
from reports.output import formatted
from reports.peak import with_peak_fraction
from reports.prediction import predicted_rows
from reports.published import Claim, beside, claims, claims_of, decision, published_rows, same_cell
from suites.selftest.conftest import Done

Bench = Callable[..., Done]


def claim(**fields: Any) -> Claim:
    """Of the a800's decode, with other fields."""
    (found,) = (c for c, _, _ in claims() if (c.hardware, c.scheme, c.metric) == ("a800", "q0f16", "decode"))
    return Claim(**{**vars(found), **fields})


def ours(value: float, low: float | None = None, high: float | None = None, **fields: Any) -> Row:
    return Row(
        **{
            "kind": "measured",
            "run": "r1",
            "time": "t",
            "hardware": "a800",
            "backend": "tvm",
            "model": "7b-world",
            "scheme": "q0f16",
            "metric": "decode",
            "value": value,
            "interval": None if low is None else (low, high),
            "verdict": "PASS",
            "workload": Workload(32, 8),
            **fields,
        }
    )


def test_every_record_names_every_field_and_has_a_source_that_can_be_opened() -> None:
    told = json.loads(Path(reports.published.__file__).with_name("published.json").read_text())
    fields = set(Claim.__dataclass_fields__)
    assert all(set(record) == fields for record in told["claims"])
    assert all(url.startswith("https://") for _, url, _ in claims())
    assert {c.source for c, _, _ in claims()} == set(told["sources"])


def test_what_is_not_stated_is_named() -> None:
    (decode,) = [row for row in published_rows("rtx3090") if row.metric == "decode"]
    assert decode.reason is not None
    assert "prompt length" in decode.reason
    assert "date" not in decode.extra["missing"]
    assert decode.interval is None


def test_readme_figures_of_a_processor_are_there_with_perplexity() -> None:
    rows = {(row.scheme, row.metric): row for row in published_rows("cpu")}
    assert rows["Q4_0", "decode"].value == pytest.approx(1000 / 76, rel=0.01)
    assert rows["FP16", "perplexity"].value == 15.623
    assert rows["Q5_1", "decode"].threads == 4
    assert len(rows) == 14


@pytest.mark.parametrize(
    ("printed", "unit", "low", "high"),
    [
        ("72.4", "tok/s", 72.35, 72.45),
        ("23", "tok/s", 22.5, 23.5),
        ("7.9", "ms/token", 1000 / 7.95, 1000 / 7.85),
        ("944", "ms/token", 1000 / 944.5, 1000 / 943.5),
    ],
)
def test_a_figure_stands_for_what_its_digits_allow(printed: str, unit: str, low: float, high: float) -> None:
    assert claim(printed=printed, unit=unit).bounds == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((72.0, 73.0), "reproduced"),
        ((72.45, 80.0), "reproduced"),
        ((72.46, 80.0), "exceeded"),
        ((60.0, 72.35), "reproduced"),
        ((60.0, 72.34), "contradicted"),
        (None, "undecided"),
    ],
)
def test_the_word_follows_from_the_intervals(interval: tuple[float, float] | None, word: str) -> None:
    row = ours(72.0, *interval) if interval else ours(72.0)
    assert decision(claim(), row) == word


def test_a_lower_perplexity_exceeds() -> None:
    perplexity = claim(metric="perplexity", unit="ppl", printed="15.623")
    assert decision(perplexity, ours(14.0, 13.9, 14.1, metric="perplexity")) == "exceeded"
    assert decision(perplexity, ours(17.0, 16.9, 17.1, metric="perplexity")) == "contradicted"


@given(st.floats(1, 1e3), st.floats(0, 50), st.floats(0, 50))
def test_exactly_one_word_and_mirrored_by_the_other_side(value: float, below: float, above: float) -> None:
    stated = claim(printed="100.0")
    row = ours(value, value - below, value + above)
    word = decision(stated, row)
    assert row.interval is not None
    low, high = row.interval
    least, most = stated.bounds
    assert (word == "exceeded") == (low > most)
    assert (word == "contradicted") == (high < least)


@pytest.mark.parametrize(
    "other",
    [
        {"verdict": "FAIL", "reason": "wrong"},
        {"kind": "recorded"},
        {"backend": "torch"},
        {"model": "7b"},
        {"scheme": "q4f16_1"},
        {"hardware": "a100"},
        {"workload": Workload(32, 8, batch=4)},
    ],
)
def test_only_the_same_cell_that_passed_counts(other: dict[str, Any]) -> None:
    assert same_cell(claim(), ours(70, 69, 71))
    assert not same_cell(claim(), ours(70, 69, 71, **other))
    assert not same_cell(claim(threads=4), ours(70, 69, 71, threads=2))


def test_our_own_figure_stands_beside_the_claim() -> None:
    rows = [ours(10, 9, 11), ours(80.0, 79, 81), ours(1, 0.9, 1.1, verdict="FAIL", reason="wrong")]
    (row,) = claims_of(rows)
    assert row.kind == "published"
    assert row.extra["ours"]["decision"] == "exceeded"
    text = formatted([row], "table")
    assert "80 ±1%: exceeded" in text
    assert "51 %" in text
    assert claims_of([]) == []


def test_a_report_shows_the_claim_beside_the_newest_figure_and_keeps_data_apart(bench: Bench, tmp_path: Path) -> None:
    store = str(tmp_path / "store.jsonl")
    rows = [ours(80, 79, 81, time="2026-11-02"), ours(60, 59, 61, run="r0", time="2026-11-01")]
    for row in [*rows, *claims_of(rows)]:  # the claim as it was when a run was written, beside another figure
        append(store, row)
    for kind in ("table", "md", "html"):
        text = bench("report", store, "--format", kind).out
        assert text.count("exceeded") == 1, kind
        assert "contradicted" not in text
    assert bench("report", store, "--format", "csv").out.count("published") == 1
    for names in ("mlc-llm", "tvm"):  # a claim is found by its own backend and by the one it is held against
        assert bench("report", store, "--backend", names).out.count("80 ±1%: exceeded") == 1
    append(store, ours(80, 79, 81, model="3b", time="2026-11-03"))
    assert "published" not in bench("report", store, "--model", "3b").out
    append(store, ours(85, 84, 86, run="r2", time="2026-11-04", verdict="FAIL", reason="wrong"))
    text = bench("report", store, "--model", "7b-world").out
    assert "FAIL" in text
    assert "exceeded" not in text
    page = bench("report", store, "--format", "html").out
    assert "made" in page
    assert "5 rows of" in page


def test_a_claim_is_of_no_second_machine_and_its_threads_are_told(bench: Bench, tmp_path: Path) -> None:
    store = str(tmp_path / "store.jsonl")
    append(store, ours_on_a_processor(hardware_detail={"name": "My CPU"}, time="2026-11-01"))
    append(store, ours(80, 79, 81, time="2026-11-01"))
    page = bench("report", store, "--format", "html").out
    assert 'data-hardware="cpu"' in page
    assert 'data-l="threads" data-v="4"' in page


def ours_on_a_processor(**fields: Any) -> Row:
    cell = {"hardware": "cpu", "backend": "rwkv.cpp", "model": "1b5", "scheme": "FP16", "threads": 4, "device": "cpu"}
    return ours(2.0, 1.9, 2.1, **{**cell, "hardware_detail": {"name": "AMD EPYC 9654"}, **fields})


def test_figures_of_any_processor_and_of_this_one_have_no_word_between_them() -> None:
    (row,) = claims_of([ours_on_a_processor()])
    told = row.extra["ours"]
    assert (told["decision"], told["value"]) == (None, 2.0)
    assert told["why"].startswith(
        "another machine: published of 4 cores, 8 threads, x86 AVX2; model not stated, measured"
    )
    text = formatted([row], "table")
    assert "2 ±5%: another machine" in text
    assert "measured on AMD EPYC 9654" in " ".join(text.split())
    assert "contradicted" not in text
    nameless = claims_of([ours_on_a_processor(hardware_detail=None)])
    assert [row.extra["ours"]["decision"] for row in nameless] == [None]


def test_the_same_processor_has_one() -> None:
    stated = claim(hardware="cpu", machine="AMD EPYC 9654", device="cpu", same_as=("rwkv.cpp",), model="1b5")
    found = beside(replace(stated, scheme="FP16"), stated.row("https://x.example", "x"), [ours_on_a_processor()])
    assert found.extra["ours"]["decision"] == "contradicted"
    assert found.extra["ours"]["why"] is None


@pytest.mark.parametrize("synthetic", [True, None])
def test_drawn_weights_have_no_perplexity_to_compare(synthetic: bool | None) -> None:
    fields = {"model": "169m", "metric": "perplexity", "workload": None}
    assert len(claims_of([ours_on_a_processor(synthetic=False, **fields)])) == 1
    assert claims_of([ours_on_a_processor(synthetic=synthetic, **fields)]) == []


def test_a_figure_of_a_card_that_is_not_here_is_predicted_with_its_basis() -> None:
    rows = {row.metric: row for row in predicted_rows("h200", ["7b-world"], ["q0f16"], [])}
    decode = rows["decode"]
    bandwidth = profiles()["h200"].read_bytes_per_s
    assert bandwidth is not None
    assert decode.weight_bytes is not None
    assert decode.roofline_fraction is not None
    assert decode.value == pytest.approx(decode.roofline_fraction * bandwidth.value / decode.weight_bytes)
    assert decode.extra["range"][0] <= decode.value <= decode.extra["range"][1]
    assert decode.kind == "predicted"
    assert {cell["cell"][0] for cell in decode.extra["basis"]} == {"a800", "m2"}
    assert decode.reason is not None
    assert "published or recorded for q0f16" in decode.reason


def test_a_recorded_figure_moves_the_prediction() -> None:
    row = Row(
        kind="recorded",
        hardware="a100",
        backend="other",
        model="7b-world",
        scheme="q0f16",
        scheme_class="f16",
        metric="decode",
        value=130.0,
    )
    fraction = with_peak_fraction(row).roofline_fraction
    assert fraction == pytest.approx(0.92, abs=0.02)
    (before,) = (r for r in predicted_rows("h200", ["7b-world"], ["q0f16"], []) if r.metric == "decode")
    (after,) = (r for r in predicted_rows("h200", ["7b-world"], ["q0f16"], [row]) if r.metric == "decode")
    assert after.extra["range"][1] > before.extra["range"][1]


def test_what_cannot_be_predicted_has_no_row() -> None:
    assert predicted_rows("cpu", ["7b"], ["all"], []) == []
    assert predicted_rows("nothing", ["7b"], ["all"], []) == []
    assert {row.metric for row in predicted_rows("h200", ["7b"], ["Q4_K"], [])} == {"prefill"}  # its bytes are unknown
    (row,) = [r for r in predicted_rows("rtx3060ti", ["7b-world"], ["q0f32"], []) if r.metric == "decode"]
    assert row.reason is not None
    assert "do not fit" in row.reason


def test_hardware_that_is_not_here_shows_all_three_kinds_and_is_3(bench: Bench, tmp_path: Path) -> None:
    store = tmp_path / "rows.jsonl"
    append(store, ours(80.0, 79.0, 81.0))
    done = bench("--hardware", "a800", "--quant", "q0f16", "--store", str(store))
    assert done.code == 3
    assert "published figures, not measured here" in done.out
    assert "predicted from the roofline, measured nowhere" in done.out
    assert "exceeded" in done.out
    assert [row.value for row in measured_rows(store, "a800")] == [80.0]
    assert measured_rows(store, "m2") == []
    assert every_recorded(store) == []
