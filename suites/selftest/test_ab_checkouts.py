"""Checkouts of two revisions: each with its own code, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.ab_checkouts import CheckoutError, within
from harness.ab_parity import parity_rows
from suites.selftest.ab_repository import sides


def test_both_sides_have_their_own_code(untouched: Path) -> None:
    with sides(untouched) as (base, head):
        assert (base.root / "speed.py").read_text() == "STEPS = 1\n"
        assert head.root == untouched
        assert "HEAD~1 (" in base.revision
        assert head.revision == "working tree"
        assert within(base, untouched, str(untouched / "mine.py")) == str(base.root / "mine.py")
        assert within(base, untouched, "numpy") == "numpy"
    assert not base.root.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_checkouts_are_taken_back_however_it_ends(untouched: Path, error: type[BaseException]) -> None:
    seen: list[Path] = []

    def end() -> None:
        with sides(untouched, "main~1", "main") as both:
            seen.extend(side.root for side in both if side.root.exists())
            raise error

    with pytest.raises(error):
        end()
    assert len(seen) == 2
    assert not any(root.exists() for root in seen)


def test_what_cannot_be_checked_out(untouched: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckoutError, match="no revision 'mian'"), sides(untouched, "mian"):
        pass
    with pytest.raises(CheckoutError, match="no such folder"), sides(tmp_path / "nowhere"):
        pass
    with pytest.raises(CheckoutError, match="not a git repository"), sides(tmp_path):
        pass
    with sides(untouched) as (base, _), pytest.raises(CheckoutError, match="both sides would run the same file"):
        within(base, untouched, str(tmp_path / "other.py"))


def test_parity_of_a_side_comes_from_its_own_code(untouched: Path, small: str) -> None:
    with sides(untouched) as (base, _):
        words = ["--backend", str(base.root / "mine.py"), "--model", small, "--quant", "fp32", "--threads", "1"]
        rows = parity_rows(base, words)
    assert {row["metric"] for row in rows} >= {"parity", "prefill", "decode"}
    assert {row["verdict"] for row in rows} == {"PASS"}
