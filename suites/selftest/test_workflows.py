"""The workflows that run ab: nothing of a fork on a runner of one's own, and only commands that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from harness.options import parse


@pytest.mark.parametrize("name", ["bench", "gpu"])
def test_no_fork_runs_code_on_a_runner_of_ones_own(name: str) -> None:
    """Every job whose runner a variable names has the condition that pull requests come from the repository itself."""
    text = (Path(__file__).parents[2] / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    jobs = re.findall(r"(?ms)^  (\w+):\n(.*?)(?=^  \w+:\n|\Z)", text.split("\njobs:\n")[1])
    own = {job: body for job, body in jobs if re.search(r"runs-on:.*vars\.", body)}
    assert len(own) == 2
    for body in own.values():
        condition = " ".join(body.split("if: >-")[1].split("runs-on:")[0].split())
        assert "github.event.pull_request.head.repo.full_name == github.repository" in condition
        assert "github.event_name != 'pull_request' ||" in condition
    hosted = [body for body in own.values() if "macos" in body]
    assert all("continue-on-error: ${{ vars.MPS_RUNNER == '' }}" in body for body in hosted)


def test_the_workflow_asks_for_what_there_is() -> None:
    """Every comparison of the GitHub workflow is a command line that this version takes."""
    root = Path(__file__).parents[2]
    script = (root / ".ci" / "compare").read_text(encoding="utf-8")
    common = next(line for line in script.splitlines() if line.startswith("rwkv-bench ab "))
    workflow = (root / ".github" / "workflows" / "bench.yml").read_text(encoding="utf-8")
    asked = re.findall(r"run: \.ci/compare (.*)", workflow)
    assert len(asked) == 3
    for words in asked:
        line = common.replace('"$@"', words).replace('"$base"', "HEAD~1")
        parsed = parse(shlex.split(line)[1:])
        assert parsed.command == "ab"
        assert parsed.also == ["verdict.xml"]
        assert parsed.base == "HEAD~1"
