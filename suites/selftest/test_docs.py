"""What the pages say is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from harness.length_scaling import DRAWS as DRAWN
from harness.machine.known import profiles
from harness.tolerance import DRAWS, FLOOR, K
from reference.numerics import CHAIN

ROOT = Path(__file__).parents[2]
TOLERANCE = (ROOT / "docs" / "tolerance.md").read_text(encoding="utf-8")


def test_the_page_on_the_bound_names_the_constants_in_use() -> None:
    numbers = {1: "one", 2: "two", 3: "three", 4: "four"}
    assert f"**K·e**, K = {K:g}" in TOLERANCE
    assert f"K = {K:g}\n" in TOLERANCE  # the header of the recorded calibration
    assert f"a chain of {CHAIN} partial sums" in TOLERANCE
    assert f"largest of {numbers[DRAWS]} such runs" in TOLERANCE
    assert f"under {numbers[int(FLOOR)]} roundings" in TOLERANCE


def test_clean_stands_below_the_bound_and_faults_in_fp32_above_it_in_the_recorded_calibration() -> None:
    lines = re.findall(r"^(\w+ \w+), (.+?) +\d+ +(\S+) +\S+ +\S+ +\S+ +(\S+)$", TOLERANCE, re.MULTILINE)
    assert len(lines) > 20
    for cell, what, least, largest in lines:
        if what == "clean":
            assert float(largest) < K, cell
        elif cell.endswith("fp32"):
            assert float(least) > K, (cell, what)


def test_the_page_on_hardware_has_the_figures_of_the_profiles() -> None:
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert set(lines) == set(profiles())
    for name, profile in profiles().items():
        cells = [cell.strip() for cell in lines[name].split("|")][3:9]
        figures = [profile.read_bytes_per_s, *profile.flops.values(), profile.memory_bytes]
        units = (1e9, 1e12, 1e12, 1e12, 1e12, 1e9)
        shown = ["–" if f is None else f"{f.value / unit:.4g}" for f, unit in zip(figures, units, strict=True)]
        assert cells == shown, name
        assert all(figure is None or figure.source.url in page for figure in figures)
    assert f"{DRAWN:,} permutations" in page.replace("\n", " ")


def test_no_page_has_a_place_left_to_fill_in() -> None:
    for page in ROOT.glob("**/*.md"):
        if not any(part.startswith(".") for part in page.relative_to(ROOT).parts):
            assert not re.search(
                r"\b[A-Z]{4,}_[A-Z]+\b(?![=`])|\bTODO\b|\bCALIBRATION\b", page.read_text(encoding="utf-8")
            ), page
