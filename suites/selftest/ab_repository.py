"""Somebody's repository with two commits of an adapter, which ab compares."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.ab_checkouts import checkouts

ADAPTER = """
import numpy as np
import reference
from backends.api import BackendInfo
from reference import Arithmetic

INFO = BackendInfo("mine", "the reference, called by hand", "a test", ("cpu",), {"fp32": Arithmetic()})

class Session:
    def __init__(self, weights):
        from speed import STEPS  # a module of theirs

        self.weights, self.steps = weights.in_memory(np.float32), STEPS

    def forward(self, tokens, state):
        for _ in range(self.steps):
            out = reference.forward(self.weights, tokens, state)
        return out

def load(checkpoint, scheme, device, threads):
    return Session(checkpoint)
"""


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of somebody's adapter and a module of theirs; the second takes twice as long."""
    root = tmp_path / "theirs and more"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / "mine.py").write_text(ADAPTER)
    for steps in (1, 2):
        (root / "speed.py").write_text(f"STEPS = {steps}\n")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", f"{steps} steps")
    return root


SIDES = {"base": "HEAD~1", "head": "HEAD"}


def sides(root: Path, base: str = "HEAD~1", head: str | None = None) -> Any:

    return checkouts(root, base, head, (sys.executable, sys.executable))


@pytest.fixture
def untouched(repository: Path) -> Iterator[Path]:
    """Afterwards the repository is as it was."""
    yield repository
    assert git(repository, "worktree", "list").count("\n") == 1
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "branch", "--list").split() == ["*", "main"]


def spec(root: Path, model: str, **more: Any) -> dict[str, Any]:
    known = {"backend": str(root / "mine.py"), "model": model, "scheme": "fp32", "device": "cpu", "threads": 1}
    return {**known, "seed": 0, "prompt_tokens": 8, "decode_tokens": 4, "repeats": 3, "metrics": ["decode"], **more}
