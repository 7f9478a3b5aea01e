"""Rows say which commit they are of, and a report's history shows it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import revision as module
from harness.revision import revision
from reports.row_fields import revision as shown
from suites.selftest.conftest import Done
from suites.selftest.report_rows import cell

Bench = Callable[..., Done]


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a repository with one commit and a tag."""
    root = tmp_path / "theirs"
    root.mkdir()
    git(root, "init", "-q")
    (root / "kernel.py").write_text("1\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")
    git(root, "tag", "-a", "v1", "-m", "v1")
    monkeypatch.chdir(root)
    for name in ("RWKV_BENCH_REVISION", "GITHUB_SHA"):
        monkeypatch.delenv(name, raising=False)
    module.of_checkout.cache_clear()
    return root


def test_the_commit_of_the_folder(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert revision() == head[:10]
    (checkout / "kernel.py").write_text("2\n")
    module.of_checkout.cache_clear()
    assert revision() == f"{head[:10]}-dirty"


def test_what_is_told_comes_first_and_what_ci_says_last(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_SHA", "0123456789abcdef")
    assert revision() == git(checkout, "rev-parse", "HEAD")[:10]
    monkeypatch.setenv("RWKV_BENCH_REVISION", "llama-b4711")
    assert revision() == "llama-b4711"
    monkeypatch.delenv("RWKV_BENCH_REVISION")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision() == "0123456789"
    monkeypatch.delenv("GITHUB_SHA")
    assert revision() is None


def test_two_commits_are_a_history(checkout: Path, small: str, bench: Bench) -> None:
    one = ("--model", small, "--backend", "numpy", "--quant", "fp32", "--threads", "1", "--quick")
    commits = []
    for text in ("2\n", "3\n"):
        (checkout / "kernel.py").write_text(text)
        git(checkout, "commit", "-q", "-a", "-m", text)
        module.of_checkout.cache_clear()
        commits.append(git(checkout, "rev-parse", "HEAD")[:10])
        assert bench(*one, "--store", "rows.jsonl").code == 0
    rows = [json.loads(line) for line in (checkout / "rows.jsonl").read_text().splitlines()]
    assert {row["revision"] for row in rows} == set(commits)
    assert bench("report", "rows.jsonl", "--output", "report.html").code == 0
    page = (checkout / "report.html").read_text()
    assert all(f'"rev":"{commit}"' in page.replace('": "', '":"') for commit in commits)


@pytest.mark.parametrize(
    ("told", "text"),
    [("0123456789-dirty", "0123456789-dirty"), ("0" * 40, "0" * 12), ("0" * 40 + "-dirty", "0" * 12 + "-dirty")],
)
def test_a_changed_checkout_is_shown_as_one(told: str, text: str) -> None:
    row = cell()[0]
    object.__setattr__(row, "extra", {"revision": told})
    assert shown(row) == text
