"""The summary of skipped tests: nothing lost, each reason once."""

from __future__ import annotations

import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from suites.skips import folded, reason_of

WHY = ["no CUDA driver here; it needs: a GPU", "built on no machine, model unknown"]
CELLS = st.builds(
    "{} {} on cpu, model tiny: {}".format, *map(st.sampled_from, (["triton", "a b"], ["fp16", "fp32"], WHY))
)


def test_cells_of_one_backend_that_lack_the_same_are_one_line() -> None:
    reasons = [f"triton {scheme} on cuda:0, model a/b.pth: {WHY[0]}" for scheme in ("fp16", "q4f16_1", "fp16")]
    told = [(reason, f"test_cells.py:{i}") for i, reason in enumerate(reasons)]
    assert folded([*told, ("root may write everything", "test_x.py:9")]) == [
        f"    3 triton (fp16, q4f16_1) on cuda:0: {WHY[0]}",
        "    1 root may write everything (test_x.py:9)",
    ]


@given(st.lists(st.one_of(CELLS, st.sampled_from(["x\ny", "not there: get it"]))))
def test_every_test_is_counted_and_every_reason_said(reasons: list[str]) -> None:
    lines = folded((reason, "") for reason in reasons)
    assert sum(int(line[:5]) for line in lines) == len(reasons)
    assert len(lines) <= len({re.sub(" fp..", "", reason) for reason in reasons})
    for reason, count in Counter(" ".join(reason.rpartition("tiny: ")[2].split()) for reason in reasons).items():
        assert sum(int(line[:5]) for line in lines if line.endswith(reason)) == count


def test_reasons_as_pytest_keeps_them() -> None:
    assert reason_of(("suites/file.py", 3, "Skipped: no GPU")) == ("no GPU", "file.py:3")
    assert reason_of("anything else") == ("anything else", "")
