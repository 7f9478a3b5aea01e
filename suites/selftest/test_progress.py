"""What stderr shows while a run goes on: lines that stay, and on a terminal one that lives."""

from __future__ import annotations

import io
import re

import pytest

from harness.hardware import Hardware
from harness.measure import Workload
from harness.plan import Cell
from harness.progress import Progress

CPU, GPU = Hardware("cpu", "cpu", ""), Hardware("h200", "cuda:0", "")


def cell(scheme: str = "fp32", model: str = "tiny", hardware: Hardware = CPU) -> Cell:
    return Cell(model, "numpy", scheme, hardware, 1, Workload(8, 8))


def shown(cells: list[Cell], live: bool) -> str:
    stream = io.StringIO()
    with Progress(stream, cells, live) as progress:
        for one in cells:
            for phase in ("loading", "parity"):
                progress.tell(one, phase)
            progress.done("PASS")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([cell(), cell("bf16")], ["numpy fp32", "numpy bf16"]),
        ([cell(), cell(hardware=GPU)], ["numpy fp32 on cpu", "numpy fp32 on h200"]),
        ([cell(), cell(model="7b")], ["numpy fp32 tiny", "numpy fp32 7b"]),
    ],
)
def test_each_result_is_a_line_that_says_what_differs(cells: list[Cell], labels: list[str]) -> None:
    lines = [re.sub(r", \d+ s\]", "]", line) for line in shown(cells, live=False).splitlines()]
    assert lines == [f"[{i}/2] {label}: PASS" for i, label in enumerate(labels, 1)]


def test_a_terminal_also_sees_the_phase_and_keeps_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = shown([cell(), cell("bf16")], live=True)
    for words in ("numpy fp32: PASS", "numpy bf16: PASS", "0/2"):
        assert words in text


def test_nothing_to_run_shows_nothing() -> None:
    assert shown([], live=True) == ""
