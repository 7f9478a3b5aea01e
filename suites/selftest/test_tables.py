"""Rows -> tables: what stands where, in every format, at every width."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from harness.rows import Row
from harness.samples import Workload
from reports.output import formatted
from reports.tables import speed_table, summary, tables
from reports.terminal import render

BASE = Row(
    kind="measured",
    run="r",
    time="2024-01-01T00:00:00+00:00",
    hardware="cpu",
    hardware_detail={"name": "Some CPU"},
    backend="numpy",
    model="tiny",
    scheme="fp32",
    device="cpu",
    threads=2,
    workload=Workload(256, 64),
    metric="parity",
    reason="decode (position 3): rms error 2.10e-06 <= bound 6.60e-06",
    verdict="PASS",
)


def cell(**changes: Any) -> list[Row]:
    """Rows of a cell that passed."""
    base = replace(BASE, **changes)
    speed: dict[str, Any] = {"reason": None, "unit": "", "peak_bytes": 23 << 20}
    return [
        replace(base, value=2.1e-6, error=2.1e-6, bound=6.6e-6),
        replace(base, **speed, metric="prefill", value=9123.4, interval=(9000.0, 9305.9)),
        replace(base, **speed, metric="time_to_first_token", value=0.0281),
        replace(base, **speed, metric="decode", value=61.04, driver="loop"),
    ]


def failed(**changes: Any) -> list[Row]:
    """Rows of a cell that did not pass: no speed."""
    base = replace(BASE, verdict="FAIL", reason="decode: NaN at position 39, token 7; bundle /b/x.npz", **changes)
    return [base, *(replace(base, metric=m, unit="", reason="not timed: NaN") for m in ("prefill", "decode"))]


def refused(**changes: Any) -> list[Row]:
    return [replace(BASE, verdict="UNSUPPORTED", reason="it has no such scheme", threads=None, **changes)]


MIXED = [
    *refused(scheme="q4f16_1"),
    *cell(),
    *failed(backend="faulty"),
    *refused(scheme="Q4_0"),
    *cell(scheme="bf16"),
]


def test_one_line_a_cell_and_what_all_share_in_the_title() -> None:
    table = speed_table([*cell(), *cell(scheme="bf16")])
    assert table.title == "model tiny · cpu (Some CPU) · 2 threads · prompt 256, decode 64 tokens"
    names = ("backend", "scheme", "parity", "error ≤ bound", "prefill tok/s", "decode tok/s", "1st token", "memory")
    assert table.header == names
    assert table.lines[0] == ("numpy", "fp32", "PASS", "2.1e-6 ≤ 6.6e-6", "9123 ±2%", "61.0", "28.1 ms", "23 MiB")
    assert table.notes == ()


def test_what_differs_has_a_column() -> None:
    table = speed_table([*cell(), *cell(model="169m", synthetic=True, threads=1)])
    assert table.header[:4] == ("model", "backend", "scheme", "threads")
    assert [line[:4] for line in table.lines] == [("tiny", "numpy", "fp32", "2"), ("169m", "numpy", "fp32", "1")]
    assert "(synthetic weights)" in speed_table(cell(model="169m", synthetic=True)).title


def test_what_a_timed_cell_leaves_open_is_not_said_of_it() -> None:
    table = speed_table([*cell(threads=2), *cell(threads=None, scheme="fp16")])
    assert "thread" not in table.title
    at = table.header.index("threads")
    assert [line[at] for line in table.lines] == ["2", ""]
    assert "2 threads" in speed_table([*cell(threads=2), *refused(scheme="fp16")]).title


def test_a_failure_has_its_verdict_where_a_speed_would_stand() -> None:
    table = speed_table(MIXED)
    by_scheme = {(line[0], line[1]): line[2:] for line in table.lines}
    assert by_scheme["faulty", "fp32"] == ("FAIL", "", "FAIL", "FAIL", "", "")
    assert by_scheme["numpy", "Q4_0"] == ("UNSUPPORTED", "", "-", "-", "", "")
    assert [line[2] for line in table.lines] == ["PASS", "FAIL", "PASS", "UNSUPPORTED", "UNSUPPORTED"]
    assert "threads" not in table.header  # what never started has no number of threads


def test_a_failure_while_timing_is_a_failure_of_the_cell() -> None:
    rows = cell()
    rows[3] = replace(rows[3], verdict="FAIL", value=None, reason="sample 2, step 7: logit 3 is nan")
    assert speed_table(rows).lines[0][2] == "FAIL"
    assert summary(rows) == "FAIL: sample 2, step 7: logit 3 is nan"


def test_every_reason_is_a_note_once() -> None:
    assert speed_table(MIXED).notes == (
        "faulty fp32: FAIL: decode: NaN at position 39, token 7; bundle /b/x.npz",
        "numpy q4f16_1, Q4_0: UNSUPPORTED: it has no such scheme",
    )


def test_parity_alone_has_no_speed_columns() -> None:
    assert speed_table(cell()[:1]).header == ("backend", "scheme", "parity", "error ≤ bound")


def test_recorded_rows_without_a_device_are_one_cell() -> None:
    rows = [replace(row, kind="recorded", device=None, threads=None) for row in cell()]
    assert len(speed_table(rows).lines) == 1


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (cell(), "PASS, prefill 9123 tok/s, decode 61.0 tok/s"),
        (cell()[:1], "PASS"),
        (failed(), "FAIL: decode: NaN at position 39, token 7; bundle /b/x.npz"),
    ],
)
def test_a_cell_in_one_line(rows: list[Row], text: str) -> None:
    assert summary(rows) == text


CLAIM = Row(
    kind="published",
    hardware="a800",
    backend="mlc-llm",
    model="7b-world",
    scheme="q0f16",
    metric="decode",
    value=72.4,
    extra={"source": "https://example.org/readme"},
)


def test_what_others_have_published_is_a_table_of_its_own() -> None:
    measured, published = tables([*cell(), CLAIM])
    assert len(measured.lines) == 1
    assert published.title == "published figures, not measured here"
    assert published.lines[0][-2:] == ("72.4 tok/s", "published")
    assert published.notes == ("source: https://example.org/readme",)
    assert tables([]) == []


@given(st.integers(40, 220))
def test_nothing_is_wider_than_asked(width: int) -> None:
    lines = render(speed_table(MIXED), width).splitlines()
    assert max(map(cell_len, lines)) <= width


def test_80_columns_hold_intervals_and_do_without_the_least() -> None:
    text = render(speed_table(MIXED), 80)
    assert text.endswith("not shown for lack of width: 1st token\n")
    assert re.search(r"PASS +2\.1e-6 ≤ 6\.6e-6 +9123 ±2% +61\.0 +23 MiB\n", text)


def test_columns_go_one_after_the_other() -> None:
    gone = []
    for width in (120, 80, 70, 60):
        note = re.search(r"lack of width: (.*)", render(speed_table(MIXED), width).replace("\n", " "))
        gone.append([name.strip() for name in note.group(1).split(", ")] if note else [])
    assert gone == [[], ["1st token"], ["1st token", "memory"], ["1st token", "memory", "error ≤ bound"]]


def test_a_path_in_a_note_is_never_broken() -> None:
    path = "/a/" + "long-" * 30 + "name.npz"
    rows = [replace(row, reason=f"NaN; bundle {path}") for row in failed()[:1]]
    assert path in render(speed_table(rows), 60)


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" not in formatted(MIXED, "table")
    assert "\x1b[32mPASS" in formatted(MIXED, "table", 100, colour=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in formatted(MIXED, "table", 100, colour=True)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in formatted(MIXED, "table", 60, colour=True)


def test_markdown_escapes_what_would_end_a_cell() -> None:
    text = formatted(cell(backend="a|b.py"), "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "a\\|b.py" in lines[2]


def test_csv_has_every_row_with_its_workload_interval_and_source() -> None:
    records = list(csv.DictReader(io.StringIO(formatted([*cell(backend='a,"b\n'), CLAIM], "csv"))))
    assert [record["metric"] for record in records] == ["parity", "prefill", "time_to_first_token", "decode", "decode"]
    assert records[0]["backend"] == 'a,"b\n'
    assert (records[1]["interval_low"], records[1]["prompt_tokens"]) == ("9000.0", "256")
    assert records[-1]["source"] == "https://example.org/readme"


def test_published_figures_have_a_source_and_no_verdict() -> None:
    from reports.published import published_rows

    rows = published_rows("a800")
    assert {row.kind for row in rows} == {"published"}
    assert all(row.extra["source"].startswith("https://") and row.verdict is None for row in rows)
    assert {row.scheme for row in published_rows("a800", ["int4"])} == {"q4f16_1"}
    assert published_rows("a800", ["Q8_0"]) == []


def test_what_a_dying_process_said_gives_the_terminal_no_orders() -> None:
    rows = [replace(row, reason="a\x1b[2J\rb\u2028c\x9bd") for row in failed()[:1]]
    text = render(speed_table(rows), 80)
    assert "FAIL: a [2J b c d\n" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", text)


def timed(left_out: int, scheme: str = "fp32", fraction: float | None = 0.68) -> list[Row]:
    """A cell with blocks, percentiles and a roofline, as a new version writes them."""
    rows = cell(scheme=scheme)
    blocks = tuple(
        {"start": i, "count": 1, "disturbed": "steal" if i < left_out else None, "left_out": i < left_out}
        for i in range(8)
    )
    decode = replace(
        rows[3],
        samples=(1e9,) * 8,
        blocks=blocks,
        percentiles={"p50": 0.016, "p99": 0.0214},
        roofline_fraction=fraction,
    )
    return [*rows[:3], decode]


def test_roofline_and_slow_steps_have_a_column_where_a_row_has_them() -> None:
    table = speed_table([*timed(0), *failed(scheme="bf16")])
    assert table.header[-2:] == ("roofline", "p99 step")
    assert [line[-2:] for line in table.lines] == [("-/68 %", "21.4 ms"), ("", "")]
    assert "roofline: prefill as a share of the matrix rate / decode of read bandwidth" in table.notes
    assert "roofline" not in speed_table(timed(0, fraction=None)).header


def test_blocks_left_out_are_counted_with_their_reason() -> None:
    assert (
        "3 of 16 blocks left out, taken while the machine did something else: 3 steal"
        in speed_table([*timed(2), *timed(1, "bf16")]).notes
    )
    assert not any("blocks" in note for note in speed_table([*timed(0)]).notes)


def test_figures_that_rest_on_disturbed_blocks_are_named() -> None:
    rows = timed(8)
    used = tuple({**block, "left_out": False} for block in rows[3].blocks or ())
    notes = speed_table([*rows[:3], replace(rows[3], blocks=used)]).notes
    assert any(
        note.startswith("disturbed throughout, so nothing could be left out: numpy fp32 decode;") for note in notes
    )


def test_80_columns_keep_the_roofline_longer_than_the_rest() -> None:
    text = render(speed_table(timed(0)), 80)
    assert "-/68 %" in text
    assert text.replace("\n", " ").endswith("not shown for lack of width: p99 step, 1st token ")


def test_recorded_cells_with_a_verdict_never_stand_among_measured_ones() -> None:
    measured, elsewhere = tables([*cell(), *(replace(row, kind="recorded") for row in cell(backend="far"))])
    assert elsewhere.title.startswith("recorded, not measured in this run · ")
    assert (len(measured.lines), len(elsewhere.lines)) == (1, 1)
