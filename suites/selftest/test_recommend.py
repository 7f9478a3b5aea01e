"""``rwkv-bench recommend``: limits hold by whole intervals, unknown is named, nothing unproven is recommended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.rows import Row, line
from harness.samples import Workload
from reports.cells import cells
from reports.recommend import AIMS, Advice, Limits, recommend
from suites.selftest.conftest import Done
from suites.selftest.report_rows import cell, claim, failed, quality, realistic, recorded, refused

Bench = Callable[..., Done]

MIB = 2**20


def made(
    scheme: str = "fp16",
    decode: float = 50.0,
    spread: float = 0.0,
    peak: int | None = 100 * MIB,
    kl: float | None = 1e-3,
    backend: str = "torch",
    **fields: Any,
) -> list[Row]:
    """A passing cell with just these figures; ``spread``: half of its interval, in tok/s."""
    parity, _, _, row, _ = cell(backend, scheme, **fields)
    interval = (decode - spread, decode + spread) if spread else None
    bare = replace(row, value=decode, interval=interval, samples=None, steps=None, blocks=None, percentiles=None)
    rows = [replace(parity, weight_bytes=None), replace(bare, peak_bytes=peak, weight_bytes=None)]
    return rows if kl is None else [*rows, quality(backend, scheme, kl)]


def only(rows: Sequence[Row], limits: Limits | None = None, aim: str = "decode") -> Advice:
    (found,) = recommend(cells(rows), limits or Limits(), aim)
    return found


def why(found: Advice) -> dict[str, tuple[str, ...]]:
    return {each.name: each.why for each in found.candidates}


class TestLimits:
    def test_the_fastest_of_those_that_meet_them(self) -> None:
        rows = [
            *made("fp32", 40.0),
            *made("fp16", 60.0),
            *made("Q8_0", 90.0, kl=0.2),
            *made("q4f16_1", 80.0, peak=900 * MIB),
        ]
        found = only(rows, Limits(memory=500 * MIB, speed=50, kl=0.05))
        assert found.best is not None
        assert found.best.name == "torch fp16"
        assert why(found) == {
            "torch fp16": (),
            "torch Q8_0": ("KL 0.2, over 0.05",),
            "torch q4f16_1": ("memory 900 MiB, over 500 MiB",),
            "torch fp32": ("decode 40.0 tok/s, under 50.0",),
        }

    def test_the_whole_interval_must_hold(self) -> None:
        found = only(made("fp16", 52.0, spread=4.0), Limits(speed=50))
        assert found.best is None
        assert why(found) == {"torch fp16": ("decode 52.0 tok/s, but its interval begins at 48.0, under 50.0",)}
        assert only(made("fp16", 52.0, spread=1.9), Limits(speed=50)).best is not None
        near = only(made("fp16", kl=0.048), Limits(kl=0.05))  # its interval ends a tenth above
        assert why(near) == {"torch fp16": ("KL 0.048, but its interval ends at 0.0528, over 0.05",)}

    def test_a_limit_that_is_met_exactly_is_met(self) -> None:
        assert only(made(decode=50.0, peak=100 * MIB), Limits(memory=100 * MIB, speed=50)).best is not None

    def test_what_is_unknown_is_named_and_meets_nothing(self) -> None:
        rows = made(peak=None, kl=None)
        assert only(rows).best is not None
        found = only(rows, Limits(memory=1e15, speed=1, kl=1e9))
        assert found.best is None
        assert why(found)["torch fp16"] == (
            "memory unknown",
            "divergence unknown (rwkv-bench quality measures it)",
        )
        slow = [row for row in rows if row.metric != "decode"]
        assert why(only([*slow, replace(rows[1], metric="prefill", unit="")], Limits(speed=1)))["torch fp16"] == (
            "decode speed unknown",
        )

    def test_memory_is_never_less_than_the_weights(self) -> None:
        rows = [replace(row, weight_bytes=300 * MIB) for row in made(peak=2 * MIB)]
        assert why(only(rows, Limits(memory=200 * MIB)))["torch fp16"] == ("memory 300 MiB, over 200 MiB",)


class TestNeverRecommended:
    @pytest.mark.parametrize("verdict", ["FAIL", "CRASHED", "TIMEOUT", "UNSUPPORTED", "UNAVAILABLE"])
    def test_another_verdict(self, verdict: str) -> None:
        rows = [replace(row, verdict=verdict, error=None, bound=None) for row in made(kl=None)]
        found = only(rows)
        assert found.best is None
        assert why(found)["torch fp16"][0].startswith(verdict)

    def test_one_bad_row_of_the_cell(self) -> None:
        rows = made()
        assert only([*rows, replace(rows[0], metric="state_parity", verdict="FAIL", error=1.0)]).best is None

    def test_one_that_failed_in_a_run_as_new(self) -> None:
        worse = replace(
            made(run=1)[0], workload=Workload(999, 0), verdict="FAIL", error=1.0, time="2026-11-30T00:00:00+00:00"
        )
        found = only([*made(), worse])
        assert found.best is None
        assert ("another run of it says FAIL",) in [each.why for each in found.candidates]
        older = replace(worse, time="2026-10-30T00:00:00+00:00")
        assert only([*made(), older]).best is not None

    def test_claims_and_figures_without_a_verdict(self) -> None:
        assert recommend(cells([claim(), claim("predicted")]), Limits()) == []
        found = only([recorded()])
        assert (found.best, why(found)) == (None, {"mlc-llm q4f16_1": ("never judged: its parity is unknown",)})

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["PASS", "FAIL", "CRASHED", "UNSUPPORTED"]),
                st.floats(1, 100),
                st.floats(0, 30),
                st.one_of(st.none(), st.integers(1, 1000)),
                st.one_of(st.none(), st.floats(0, 1)),
            ),
            min_size=1,
            max_size=6,
        ),
        st.sampled_from(AIMS),
    )
    def test_whatever_the_store_holds(self, cases: list[Any], aim: str) -> None:
        """By a rule written down a second time: the recommended cell is among, and best of, those that meet all."""
        limits, rows, meeting = Limits(memory=500 * MIB, speed=30.0, kl=0.5), [], {}
        for i, (verdict, decode, spread, peak, kl) in enumerate(cases):
            spread = min(spread, decode * 0.9)
            own = made(f"s{i}", decode, spread, None if peak is None else peak * MIB, kl)
            rows += [
                replace(row, verdict=verdict, error=None, bound=None) if row.quality is None else row for row in own
            ]
            known = peak is not None and kl is not None and verdict == "PASS" and aim != "prefill"
            if known and decode - spread >= 30 and peak <= 500 and kl * 1.1 <= 0.5:
                merit = {"decode": decode, "memory": -peak, "quality": -kl}[aim]
                meeting[f"torch s{i}"] = merit
        found = only(rows, limits, aim)
        assert {each.name for each in found.candidates if not each.why} == set(meeting)
        assert (found.best is None) == (not meeting)
        if found.best is not None:
            assert meeting[found.best.name] == max(meeting.values())
        assert all(each.why for each in found.candidates if each.cell.verdict != "PASS")


class TestFrontier:
    def test_over_what_is_known(self) -> None:
        rows = [*made("fp32", 40.0, kl=1e-9), *made("fp16", 60.0, kl=1e-6), *made("Q8_0", 55.0, kl=1e-4)]
        found = only([*rows, *made("q4f16_1", 99.0, kl=None)])
        assert [each.name for each in found.candidates if each.on_frontier] == ["torch fp16", "torch fp32"]
        assert found.aside == (
            "the frontier is over speed, memory, quality; 1 cell that passes is left aside: one of these is unknown"
        )
        plain = only([*made("fp32", 40.0, kl=None), *made("fp16", 60.0, kl=None)])
        assert plain.aside == "the frontier is over speed, memory; quality unknown of every cell"

    def test_overlapping_intervals_are_not_told_apart(self) -> None:
        rows = [*made("fp16", 60.0, 3.0), *made("fp32", 56.0, 2.0), *made("Q8_0", 50.0, 2.0)]
        found = only(rows)
        assert [each.name for each in found.alike] == ["torch fp32"]


class TestWorkloads:
    def test_prompts_and_batches_are_not_ranked_against_each_other(self) -> None:
        works = (Workload(64, 16), Workload(512, 16), Workload(64, 16, 8))
        rows = [
            row for i, work in enumerate(works) for row in made("fp16", 50.0 * (i + 1), workload=work, run=i, kl=None)
        ]
        rows += [*made("fp32", 70.0, workload=works[0], run=9, kl=None), refused("ncnn")]
        found = recommend(cells(rows), Limits())
        assert [(it.workload, it.best and it.best.name) for it in found] == [
            ("64+16", "torch fp32"),
            ("512+16", "torch fp16"),
            ("64+16×8", "torch fp16"),
        ]
        assert all(any("ncnn" in each.name for each in it.candidates) for it in found)

    def test_threads_are_ranked_and_named(self) -> None:
        found = only([*made("fp16", 50.0, threads=1, kl=None), *made("fp16", 80.0, threads=4, run=1, kl=None)])
        assert [each.name for each in found.candidates] == ["torch fp16 (4 threads)", "torch fp16 (1 thread)"]

    def test_a_table_for_each(self, bench: Bench, tmp_path: Path) -> None:
        rows = [
            row
            for i, threads in enumerate((1, 4))
            for tokens in (64, 512)
            for row in made("fp16", 50.0, workload=Workload(tokens, 16), threads=threads, run=i, kl=None)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(map(line, rows)))
        text = bench("recommend", str(tmp_path / "rows.jsonl")).out
        assert "169m on cpu, 64+16 tokens: use torch fp16 (" in text
        assert "169m on cpu, 512+16 tokens: use torch fp16 (" in text
        assert "4 threads" in text


class TestCommand:
    def store(self, tmp_path: Path, rows: Sequence[Row]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(map(line, rows)))
        return str(path)

    def test_as_the_design_writes_it(self, bench: Bench, tmp_path: Path) -> None:
        path = self.store(tmp_path, realistic())
        limits = ["--max-memory", "4GiB", "--min-speed", "20", "--max-kl", "0.05"]
        done = bench("recommend", *limits, path, "--hardware", "cpu", "--format", "json")
        assert done.code == 0
        found = json.loads(done.out)
        assert found["limits"] == {"max_memory": 4 * 2**30, "min_speed": 20, "max_kl": 0.05, "for": "decode"}
        (advice,) = found["recommended"]
        assert (advice["best"]["backend"], advice["best"]["scheme"]) == ("onnx", "q4f16_1")
        assert {each["scheme"] for each in advice["frontier"]} == {"fp32", "fp16", "Q8_0", "q4f16_1"}
        reasons = {(each["backend"], each["scheme"]): each["why_not"] for each in advice["cells"]}
        assert reasons["torch", "fp32"] == ["decode 14.1 tok/s, under 20.0"]
        assert reasons["numpy", "Q8_0"][0].startswith("FAIL: ")
        assert reasons["ncnn", "fp16"] == ["UNAVAILABLE: ncnn is not installed; rwkv-bench setup ncnn"]
        text = bench("recommend", *limits, path, "--hardware", "cpu").out
        assert "169m on cpu: use onnx q4f16_1, best in decode" in text
        assert "measured by: rwkv-bench run --backend onnx --quant q4f16_1" in text
        assert max(map(len, bench("recommend", *limits, path, "--format", "md").out.splitlines())) > 80

    def test_nothing_meets_the_limits(self, bench: Bench, tmp_path: Path) -> None:
        path = self.store(tmp_path, [*cell(), *failed("onnx"), refused("ncnn")])
        done = bench("recommend", path, "--min-speed", "1e9")
        assert done.code == 3
        assert "nothing is recommended: of 3 cells none passes and is known to have decode of 1000000000" in done.err
        assert "nothing meets the limits" in done.out

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--max-memory", "4GX"], "'4GX' is not a size; 4GiB, 600MB and 2147483648 are"),
            (["--max-memory", "0"], "'0' is not a size"),
            (["--min-speed", "nan"], "'nan' is not a number above 0"),
            (["--for", "beauty"], "invalid choice: 'beauty'"),
        ],
    )
    def test_mistakes(self, bench: Bench, argv: list[str], says: str) -> None:
        done = bench("recommend", *argv)
        assert (done.code, done.out) == (2, "")
        assert says in done.err

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("4GiB", 4 * 2**30), ("4G", 4e9), ("600 mb", 6e8), ("1.5gib", 1.5 * 2**30), ("123", 123.0), ("2k", 2000.0)],
    )
    def test_sizes(self, text: str, expected: float) -> None:
        from reports.command_recommend import _bytes

        assert _bytes(text) == expected
