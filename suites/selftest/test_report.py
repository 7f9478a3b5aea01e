"""``rwkv-bench report``: files joined, cells told apart, nothing mixed, nothing dropped unsaid."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.rows import Row, document, line
from harness.samples import Workload
from harness.store import StoreError, read
from reports.cell_history import histories
from reports.cells import cells, ordered
from reports.page_data import record
from reports.page_html import page
from reports.pivot import pivots
from reports.plots import fastest, fronts
from reports.points import frontier_point, pareto, roofline_points
from reports.recommend import workload_of
from reports.report_md import markdown_report
from reports.results import Results, read_results
from reports.summary import headline
from suites.selftest.conftest import Done
from suites.selftest.report_rows import (
    BANDWIDTH,
    HOSTILE,
    cell,
    claim,
    many,
    quality,
    realistic,
    recorded,
    refused,
)

Bench = Callable[..., Done]


def store(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(map(line, rows)))
    return str(path)


class TestJoining:
    def test_a_copy_is_dropped_once_and_named(self, tmp_path: Path) -> None:
        rows = cell()
        a, b = store(tmp_path / "a.jsonl", [*rows, rows[2]]), str(tmp_path / "b.json")
        Path(b).write_text(json.dumps(document(rows[:2]), indent=1))
        found = read_results([a, b])
        assert found.rows == tuple(rows)
        assert found.said == (
            f"3 rows left out as copies: {a}, row 6 (of {a}, row 3); {b}, row 1 (of {a}, row 1); "
            f"{b}, row 2 (of {a}, row 2)",
        )

    def test_a_row_that_somebody_changed_is_named(self, tmp_path: Path) -> None:
        rows = cell()
        changed = replace(rows[3], value=1e6)
        found = read_results([store(tmp_path / "a.jsonl", rows), store(tmp_path / "b.jsonl", [changed])])
        assert found.rows == tuple(rows)
        assert "b.jsonl, row 1 differs from " in found.said[0]
        assert found.said[0].endswith("though run, time and cell are the same: left out")

    def test_claims_without_a_run_are_copies_only_if_all_is_equal(self, tmp_path: Path) -> None:
        found = read_results([store(tmp_path / "a.jsonl", [claim(), claim(value=70.0), claim()])])
        assert [row.value for row in found.rows] == [72.4, 70.0]
        assert len(found.said) == 1

    def test_a_cut_line_and_an_empty_file_are_said(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(map(line, cell())) + '{"schema":1,"ki')
        (tmp_path / "empty.jsonl").touch()
        found = read_results([path, tmp_path / "empty.jsonl"])
        assert len(found.rows) == 5
        assert found.said == (
            f"{path}, line 6: never finished, its writer was killed; left out",
            f"{tmp_path / 'empty.jsonl'}: no rows in it",
        )

    def test_one_file_that_is_not_ours_ends_it(self, tmp_path: Path) -> None:
        (tmp_path / "b.json").write_text('{"machine_info": {}, "benchmarks": []}')
        with pytest.raises(StoreError, match=r"b\.json: not a file of rwkv-bench results but a record of pytest"):
            read_results([store(tmp_path / "a.jsonl", cell()), tmp_path / "b.json"])

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 11), max_size=30), st.integers(1, 4))
    def test_every_row_is_kept_once_or_said(
        self, tmp_path_factory: pytest.TempPathFactory, picks: list[int], files: int
    ) -> None:
        known = [*cell(), *cell(run=1), claim(), recorded()]
        folder = tmp_path_factory.mktemp("join")
        paths = [store(folder / str(i), [known[n] for n in picks[i::files]]) for i in range(files)]
        found = read_results(paths)
        assert sorted(map(line, found.rows)) == sorted({line(known[n]) for n in picks})
        dropped = [int(n) for text in found.said for n in re.findall(r"^(\d+) rows? left out as copies", text)]
        assert len(found.rows) + sum(dropped) == len(picks)


class TestCells:
    def test_the_newest_run_stands_and_the_others_are_its_history(self) -> None:
        found = cells([*cell(run=1), *cell(run=0), *cell(run=2)])
        assert len(found) == 1
        assert found[0].first.run == "run-2"
        assert [rows[0].run for rows in found[0].earlier] == ["run-0", "run-1"]

    def test_a_run_that_could_not_start_replaces_no_measured_one(self) -> None:
        gone = replace(cell(run=5)[0], verdict="UNAVAILABLE", error=None, bound=None, reason="its environment is gone")
        (found,) = cells([*cell(run=1), gone])
        assert (found.verdict, found.first.run) == ("PASS", "run-1")
        crashed = replace(gone, verdict="CRASHED")
        assert [c.verdict for c in cells([*cell(run=1), crashed])] == ["CRASHED"]

    def test_machines_under_one_short_name_are_two(self) -> None:
        other = [replace(row, hardware_detail={"name": "Intel Xeon"}) for row in cell()]
        assert [c.hardware for c in cells([*cell(), *other])] == ["cpu (AMD EPYC 9654)", "cpu (Intel Xeon)"]

    @pytest.mark.parametrize("field", ["model_sha256", "model", "threads", "scheme", "backend", "device", "isolated"])
    def test_what_differs_is_another_cell(self, field: str) -> None:
        value: Any = {"threads": 4, "isolated": True}.get(field, "other")
        assert len(cells([*cell(), *(replace(row, **{field: value}) for row in cell(run=1))])) == 2

    def test_kinds_never_share_a_cell(self) -> None:
        row = replace(claim(), hardware="cpu", model="169m", backend="torch", scheme="fp16")
        kinds = [c.first.kind for c in cells([*cell(), row, replace(row, kind="predicted"), recorded()])]
        assert kinds == ["measured", "published", "predicted", "recorded"]

    def test_a_refusal_stays_until_the_same_ran(self) -> None:
        assert [c.verdict for c in cells([refused("onnx"), *cell("torch")])] == ["UNAVAILABLE", "PASS"]
        assert [c.verdict for c in cells([refused("torch", run=0), *cell("torch", run=1)])] == ["PASS"]
        assert [c.verdict for c in cells([refused("torch", run=2), *cell("torch", run=1)])] == ["UNAVAILABLE", "PASS"]

    def test_a_verdict_without_speed_is_folded_only_if_it_passes(self) -> None:
        alone = replace(cell()[0], workload=Workload(32, 0), run="p", time="2026-12-01")
        assert len(cells([*cell(), alone])) == 1
        bad = replace(alone, verdict="FAIL", error=1.0)
        assert [c.verdict for c in cells([*cell(), bad])] == ["PASS", "FAIL"]
        assert len(cells([alone])) == 1

    def test_quality_stands_beside_the_speed_and_alone_if_there_is_none(self) -> None:
        (found,) = cells([*cell(), quality("torch", "fp16", 1e-6)])
        kl = found.quality_of("kl_divergence")
        assert kl is not None
        assert kl.value == 1e-6
        assert found.row("kl_divergence") is None
        other = cells([*cell(), quality("onnx", "fp16", 1e-6)])
        assert [c.first.backend for c in other] == ["torch", "onnx"]
        assert other[0].quality_of("kl_divergence") is None

    def test_a_failed_cell_has_no_speed_even_if_a_row_holds_one(self) -> None:
        rows = cell()
        rows[0] = replace(rows[0], verdict="FAIL", error=1.0)
        (found,) = cells(rows)
        assert (found.judged, found.speed("decode"), found.speed("prefill")) == ("FAIL", None, None)
        text = page([found], "t", (), "")
        shown = re.findall(r'<td[^>]*class="speed"[^>]*>(.*?)</td>', text)
        assert shown == ['<span class="pill FAIL">FAIL</span>'] * 2

    def test_every_row_of_every_cell_is_there(self) -> None:
        rows = realistic()
        found = cells(rows)
        kept = {id(row) for c in found for row in (*c.rows, *c.quality, *(r for run in c.earlier for r in run))}
        assert kept == {id(row) for row in rows}
        assert sorted(map(id, ordered(found))) == sorted(map(id, found))


def by_workload() -> list[Row]:
    """Two backends alone, and the slower one with a batch that makes it the fastest in tokens."""
    batch = Workload(256, 64, batch=8)
    rows = [*cell("torch"), *cell("onnx"), *cell("torch", speed=9.0, workload=batch)]
    return [*rows, quality("torch", "fp16", 0.02), quality("onnx", "fp16", 0.03)]


class TestPoints:
    def test_speeds_of_two_workloads_are_not_ranked(self) -> None:
        found = cells(by_workload())
        known = [(each, point) for each in found if (point := frontier_point(each)) is not None]
        held = [{(each.first.backend, workload_of(each)) for each, _, _ in own} for own, _ in fronts(known)]
        assert held == [{("torch", "256+64"), ("onnx", "256+64")}, {("torch", "256+64×8")}]
        assert [len(best) for _, best in fronts(known)] == [2, 1]
        timed = [(each, row) for each in found if (row := each.speed("decode")) is not None]
        assert {workload_of(each) for each, _ in fastest(timed)[:2]} == {"256+64", "256+64×8"}

    def test_roofline_of_decode_is_bandwidth_times_intensity(self) -> None:
        (found,) = cells(cell("onnx", "Q8_0", "a800"))
        points = {point["metric"]: point for point in roofline_points(found)}
        decode = points["decode"]
        assert decode["roof"] / decode["x"] == pytest.approx(BANDWIDTH["a800"])
        assert decode["y"] / decode["roof"] == pytest.approx(decode["fraction"], rel=1e-6)
        assert points["prefill"]["x"] > 50 * decode["x"]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=12))
    def test_frontier_holds_all_that_nothing_beats_and_no_other(self, points: list[tuple[int, int, int]]) -> None:
        best = set(pareto(points))
        for i, point in enumerate(points):
            beaten = [p for p in points if p != point and all(a >= b for a, b in zip(p, point, strict=True))]
            assert (i in best) == (not beaten)

    def test_history_is_in_order_of_time_and_marks_a_change(self) -> None:
        rows = [row for run in range(20) for row in cell(run=run, speed=1.0 if run < 10 else 0.8)]
        (past,) = histories(cells(rows))
        assert [point["run"] for point in past["decode"]] == [f"run-{run}" for run in range(20)]
        assert [i for i, point in enumerate(past["decode"]) if "changed" in point] == [10]
        assert past["decode"][10]["changed"]["ratio"] == pytest.approx(0.8, rel=0.05)
        steady = histories(cells([row for run in range(20) for row in cell(run=run)]))
        assert not [point for points in steady[0].values() for point in points if "changed" in point]

    def test_one_run_has_no_history(self) -> None:
        assert histories(cells(cell())) == [{}]


class TestPivot:
    def test_hardware_quantization_and_backend(self) -> None:
        tables = pivots(cells([*realistic()]))
        prefill, decode = tables
        assert prefill.title.startswith("prefill tok/s by hardware, quantization and backend · model 169m (synthetic")
        assert decode.header[:2] == ("hardware", "quantization")
        by_key = {(each[0], each[1]): dict(zip(decode.header, each, strict=True)) for each in decode.lines}
        assert re.fullmatch(r"q4f16_1 \d+ ±\d+%", by_key["cpu", "int4"]["onnx"])
        assert by_key["cpu", "int8"]["numpy"] == "Q8_0 FAIL"
        assert by_key["cpu", "f16"]["ncnn"] == "fp16 UNAVAILABLE"
        assert by_key["m2", "int4"]["onnx"] == ""
        assert [key[1] for key in by_key if key[0] == "cpu"] == ["f32", "f16", "int8", "int4"]

    def test_workloads_do_not_share_a_table(self) -> None:
        assert len(pivots(cells([*cell(), *cell(workload=Workload(64, 16))]))) == 4


class TestDocuments:
    def test_markdown_holds_its_shape_against_hostile_text(self) -> None:
        text = markdown_report(Results(tuple(realistic()), ("a.jsonl",), (HOSTILE,)), "a | b <b>")
        assert "<script" not in text
        assert "<img" not in text
        tables = re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE)
        assert len(tables) == 6
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
        assert "\n- 46 cells measured: 44 PASS, 1 FAIL, 1 UNAVAILABLE\n" in text

    def test_what_failed_comes_before_what_is_fast(self) -> None:
        lines = headline(cells(realistic()))
        assert lines[1] == "kept apart from what was measured: 1 published, 1 predicted, 1 recorded"
        assert lines[2].startswith("numpy Q8_0 on cpu: FAIL, <script>")
        assert lines[4].startswith("fastest that pass, 169m on a800: decode 17870 tok/s (onnx q4f16_1)")

    def test_the_fastest_of_one_workload_is_not_the_fastest_of_all(self) -> None:
        lines = headline(cells(by_workload()))
        assert [re.sub(r"[\d.]+ tok/s", "x", line) for line in lines[1:]] == [
            "fastest that pass, 169m on cpu, 256+64 tokens: decode x (onnx fp16), prefill x (onnx fp16)",
            "fastest that pass, 169m on cpu, 256+64×8 tokens: decode x (torch fp16), prefill x (torch fp16)",
        ]

    def test_details_say_what_was_left_out_and_how_to_repeat_it(self) -> None:
        (found,) = cells(cell())
        facts = dict(record(found, 0, 0, {})["facts"])
        assert facts["command"] == "rwkv-bench run --backend torch --quant fp16"
        assert facts["weights"] == "synthetic"
        times = {each["metric"]: each for each in record(found, 0, 0, {})["times"]}
        assert times["decode"]["blocks"] == "2 of 12 blocks left out (2 others)"
        assert times["decode"]["out"] == [3, 7]
        assert re.fullmatch(r"p50 \S+ ms · p90 \S+ ms · p99 \S+ ms", times["decode"]["steps"])
        assert re.fullmatch(r"\d+ % of read bandwidth, 38\.0 GB/s", times["decode"]["roofline"])
        assert len(times["prefill"]["samples"]) == 12

    def test_a_metric_without_a_place_is_listed_and_is_no_verdict_on_the_cell(self) -> None:
        slope = replace(
            cell()[0], metric="length_slope", unit="", error=None, bound=None, verdict="UNSUPPORTED", reason="too few"
        )
        (found,) = cells([*cell(), slope])
        assert (found.verdict, found.judged) == ("PASS", "")
        assert dict(record(found, 0, 0, {})["facts"])["length slope"] == "too few"
        (found,) = cells([*cell(), replace(slope, value=12.0, interval=(-3.0, 20.0), verdict="PASS", reason=None)])
        assert dict(record(found, 0, 0, {})["facts"])["length slope"] == "12 (-3 to 20) ns/token"

    def test_samples_beyond_what_can_be_seen_are_thinned_and_counted(self) -> None:
        (found,) = cells(cell(samples=1000))
        times = record(found, 0, 0, {})["times"]
        assert {len(each["samples"]) for each in times if each["n"] > 1} == {200}
        assert {each["n"] for each in times} == {1000, 1}

    def test_the_page_is_one_file_that_fetches_nothing(self) -> None:
        text = page(cells(realistic()), f"t {HOSTILE}", (HOSTILE,), "")
        outside = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
        assert not re.findall(r"""\b(?:src|href)=["'](?!#|data:)""", outside)
        assert not re.findall(r"url\(|@import|fetch\(|XMLHttp|import\(", text)
        assert text.count("<script") == text.count("</script>") == 2
        assert "<img" not in text
        data = text.split('id="cells">')[1].split("</script>")[0]
        assert [each["kind"] for each in json.loads(data)].count("measured") == 46

    def test_numbers_of_other_kinds_are_in_sections_of_their_own(self) -> None:
        text = page(cells(realistic()), "t", (), "")
        sections = dict(re.findall(r'aria-labelledby="h-(\w+)">(.*?)</section>', text, re.DOTALL))
        assert list(sections) == ["measured", "recorded", "published", "predicted"]
        for kind, figure in (("recorded", "26.3"), ("published", "72.4"), ("predicted", "131")):
            assert [k for k in sections if f">{figure}<" in sections[k] or f" {figure} tok/s" in sections[k]] == [kind]


class TestCommand:
    def test_files_filters_and_formats(self, bench: Bench, tmp_path: Path) -> None:
        a, b = store(tmp_path / "a.jsonl", cell()), store(tmp_path / "b.jsonl", [*cell("onnx", "Q8_0"), *cell()])
        done = bench("report", a, b, "--format", "csv", "--quant", "int8")
        assert done.code == 0
        assert {each["backend"] for each in csv.DictReader(io.StringIO(done.out))} == {"onnx"}
        assert "5 rows left out as copies" in done.err
        joined = tmp_path / "all.jsonl"
        assert bench("report", a, b, "--output", str(joined)).code == 0
        assert read(joined) == [*cell(), *cell("onnx", "Q8_0")]
        again = json.loads(bench("report", str(joined), "--format", "json").out)
        assert len(again["rows"]) == 10

    def test_table_md_and_html_by_the_name_of_the_file(self, bench: Bench, tmp_path: Path) -> None:
        a = store(tmp_path / "a.jsonl", realistic())
        assert "decode tok/s" in bench("report", a).out.replace("\n", " ")
        for name, start in (("r.md", "# all of it\n"), ("r.html", "<!doctype html>")):
            out = tmp_path / name
            assert bench("report", a, "--output", str(out), "--title", "all of it").code == 0
            assert out.read_text(encoding="utf-8").startswith(start)

    def test_the_picture(self, bench: Bench, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="not installed: pip install matplotlib")
        image = pytest.importorskip("matplotlib.image")
        a = store(tmp_path / "a.jsonl", realistic())
        out = tmp_path / "r.png"
        assert bench("report", a, "--output", str(out)).code == 0
        pixels = image.imread(out)
        assert pixels.shape[1] >= 1200
        # Colours of four backends are in it; a picture of empty axes has none.
        seen = {tuple(round(float(x) * 255) for x in pixel[:3]) for row in pixels[::4] for pixel in row[::4]}
        assert {(0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7), (0x6A, 0x4B, 0xC4)} <= seen

    def test_without_results_the_own_store_or_a_line(self, bench: Bench, state: Path) -> None:
        done = bench("report")
        assert (done.code, done.out) == (2, "")
        assert "no results are given, and there is no store" in done.err
        state.mkdir(parents=True)
        store(state / "rows.jsonl", cell())
        assert "torch" in bench("report").out

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--backend", "onxx"], "no row of 5 has --backend onxx; there are torch"),
            (["--backend", "torch", "--quant", "Q4_0"], "there are fp16"),
            (["--format", "pdf"], "no format 'pdf'; there are table"),
            (["--output", "no/such/r.html"], "the folder .*no/such does not exist"),
        ],
    )
    def test_mistakes_are_one_line(self, bench: Bench, tmp_path: Path, argv: list[str], says: str) -> None:
        done = bench("report", store(tmp_path / "a.jsonl", cell()), *argv)
        assert (done.code, done.out) == (2, "")
        assert re.search(says, done.err)
        assert done.err.count("\n") == 1

    def test_a_result_file_is_never_written_over(self, bench: Bench, tmp_path: Path) -> None:
        a = store(tmp_path / "a.jsonl", cell())
        done = bench("report", a, "--output", a)
        assert done.code == 2
        assert "it is the store of measured rows" in done.err
        assert read(a) == cell()

    def test_fp16_and_f16_are_one_class(self, bench: Bench, tmp_path: Path) -> None:
        rows = [*cell("tvm", "q0f16", scheme_class="f16"), *cell("tvm", "Q8_0")]
        done = bench("report", store(tmp_path / "a.jsonl", rows), "--quant", "fp16", "--format", "csv")
        assert {each["scheme"] for each in csv.DictReader(io.StringIO(done.out))} == {"q0f16"}


def test_a_thousand_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long it takes; what the figure is on a quiet machine is in docs/reports.md."""
    path = store(tmp_path / "many.jsonl", many(1000))
    began, cpu = time.perf_counter(), time.process_time()
    found = read_results([path])
    text = page(cells(found.rows), "many", found.said, "")
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    with capsys.disabled():
        sys.stdout.write(f"\n1,000 rows: page of {len(text) / 1e6:.1f} MB in {wall:.2f} s ({cpu:.2f} s of CPU)\n")
    assert len(found.rows) == 1000
    assert text.count('<tr class="cell"') == 200
