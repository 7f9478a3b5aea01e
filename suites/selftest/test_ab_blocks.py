"""Blocks of ab: samples that take turns, one side stopped, wrong results, processes that die."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import harness.ab
import harness.ab_workers
from harness.ab_checkouts import Side
from harness.ab_parity import parity_rows
from harness.ab_workers import LEAST, MOST, Block, BlockFailed, BlockWrong, measure
from suites.selftest.ab_repository import ADAPTER, git, sides, spec


def measure_block(side: Side, asked: Mapping[str, Any], timeout: float = 600.0) -> Block:
    """One block by itself, as where memory does not hold two."""
    (found,) = measure([(side, asked)], timeout)
    if isinstance(found, BlockFailed):
        raise found
    assert found is not None
    return found


def test_a_block_runs_the_code_of_its_side(untouched: Path, small: str) -> None:
    with sides(untouched) as (base, head):
        fast = measure_block(base, spec(base.root, small))
        assert set(fast.ns) == {"decode"}
        assert len(fast.ns["decode"]) == 3
        with pytest.raises(BlockFailed, match=r"status 1: .*no scheme q9"):
            measure_block(head, spec(head.root, small, scheme="q9"))
        with pytest.raises(BlockFailed, match=r"no end after 0\.01 s"):
            measure_block(head, spec(head.root, small), timeout=0.01)


#: Of an adapter: writes down when it is called with one token, by the process that is.
DIARY = """
    def forward(self, tokens, state):
        import os, time
        if len(tokens) == 1:
            with open({file!r}, "a") as file:
                file.write(f"{{time.time()}} {{os.getpid()}}\\n")
"""


def test_samples_of_a_pair_alternate_there_and_back(untouched: Path, small: str, tmp_path: Path) -> None:
    """While one side is measured the other does nothing."""
    diary = tmp_path / "diary"
    (untouched / "mine.py").write_text(
        ADAPTER.replace("    def forward(self, tokens, state):\n", DIARY.lstrip("\n").format(file=str(diary)))
    )
    git(untouched, "commit", "-q", "-a", "-m", "a diary")
    with sides(untouched, base="HEAD") as both:
        found = measure([(side, spec(side.root, small, decode_tokens=1, repeats=4)) for side in both])
    assert [len(block.ns["decode"]) for block in found if isinstance(block, Block)] == [4, 4]
    calls = [line.split()[1] for line in diary.read_text().splitlines()]
    a, _ = dict.fromkeys(calls)
    # Each turn is a settling call and a sample; before the turns both warm up, and after them both check, side by side.
    turns = "".join("A" if pid == a else "B" for pid in calls)
    assert "AABBBBAAAABBBBAA" in turns or "BBAAAABBBBAAAABB" in turns, turns


@pytest.mark.parametrize(("start_s", "samples"), [(0.1, LEAST), (4.0, 10), (4.2, 12), (60.0, MOST)])
def test_as_many_samples_as_take_half_as_long_as_starting(
    monkeypatch: pytest.MonkeyPatch, start_s: float, samples: int
) -> None:
    """Rounds of two workers, 0.1 s each; an even number, so that each is first as often as second."""
    taken: list[str] = []

    class Stand:
        def __init__(self, name: str) -> None:
            self.name = name

        def turn(self) -> None:
            taken.append(self.name)

    class Clock:
        monotonic = staticmethod(lambda: 0.1 * len(taken))

    monkeypatch.setattr(harness.ab_workers, "time", Clock)
    workers: Any = [Stand("a"), Stand("b")]
    harness.ab_workers._turns(workers, None, start_s, 1e9)
    assert taken == ["a", "b", "b", "a"] * (samples // 2)
    taken.clear()
    harness.ab_workers._turns(workers, 3, start_s, 1e9)
    assert taken == ["a", "b", "b", "a", "a", "b"]
    taken.clear()
    harness.ab_workers._turns(workers, None, 60.0, 4.4)  # half of the four seconds that are left, 0.4 s for two
    assert len(taken) == 20


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="states of processes are read from /proc")
def test_one_is_stopped_while_the_other_is_measured(
    untouched: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Any] = []
    seen: list[str] = []
    tell = harness.ab_workers._Worker._tell

    def told(self: Any, what: bytes) -> None:
        known.extend([] if self in known else [self])
        if what == b"t":
            for other in known:
                stat = Path(f"/proc/{other._process._process.pid}/stat").read_text()
                seen.append(stat.rpartition(")")[2].split()[0])
        tell(self, what)

    monkeypatch.setattr(harness.ab_workers._Worker, "_tell", told)
    with sides(untouched) as both:
        measure([(side, spec(side.root, small, repeats=2)) for side in both])
    assert seen == ["T"] * 8


KILLED = """
import sys
import harness.ab_workers as ab_workers
from harness.ab_checkouts import Side

def turns(workers, *rest):
    print(*(worker._process._process.pid for worker in workers), flush=True)
    sys.stdin.read()

ab_workers._turns = turns
side = Side("base", {root!r}, "", sys.executable, ({root!r}, {top!r}), {top!r})
ab_workers.measure([(side, {asked!r})] * 2)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="states of processes are read from /proc")
def test_stopped_processes_end_with_one_that_is_killed(untouched: Path, small: str, tmp_path: Path) -> None:
    top = str(Path(harness.ab_workers.__file__).parents[1])
    code = KILLED.format(root=str(untouched), top=top, asked=spec(untouched, small, repeats=2))
    about: dict[str, Any] = {"cwd": top, "env": {**os.environ, "TMPDIR": str(tmp_path)}, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **about
    ) as parent:
        assert parent.stdout is not None
        pids = parent.stdout.readline().split()
        assert len(pids) == 2
        parent.kill()
    end = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_side_that_dies_leaves_the_other_without_a_block_and_without_blame(untouched: Path, small: str) -> None:
    dies = "        self.n = getattr(self, 'n', 0) + 1\n        if self.n > 9:\n            import os; os._exit(5)\n"
    (untouched / "mine.py").write_text(ADAPTER.replace("        return out\n", f"{dies}        return out\n"))
    git(untouched, "commit", "-q", "-a", "-m", "dies")
    with sides(untouched) as both:
        found = measure([(side, spec(side.root, small, repeats=50)) for side in both])
    assert found[0] is None
    assert isinstance(found[1], BlockFailed)
    assert str(found[1]) == "status 5: no output"


#: What an adapter does wrong in calls of more than 260 tokens, and what is said of it.
WRONG = {
    "np.full_like(out[0], np.nan)": "prefill: logit 0 is nan at step 0 of warm-up 0",
    "np.zeros_like(out[0])": "timed prefill (against short calls)",
}


def breaks_when_long(root: Path, how: str) -> None:
    """Head's adapter gives wrong logits for long calls; its short calls and its state are right."""
    lines = f"        if len(tokens) > 260:\n            out = {how}, out[1]\n        return out\n"
    (root / "mine.py").write_text(ADAPTER.replace("        return out\n", lines))
    git(root, "commit", "-q", "-a", "-m", "wrong")


@pytest.mark.parametrize("how", WRONG)
def test_a_block_gives_no_time_for_what_is_wrong(untouched: Path, small: str, state: Path, how: str) -> None:
    breaks_when_long(untouched, how)
    with sides(untouched) as (base, head):
        long = {"metrics": ["prefill", "decode"], "prompt_tokens": 300, "repeats": 1}
        assert set(measure_block(base, spec(base.root, small, **long)).ns) == {"prefill", "decode"}
        assert set(measure_block(head, spec(head.root, small, **long | {"prompt_tokens": 8})).ns)
        with pytest.raises(BlockWrong, match=re.escape(WRONG[how])):
            measure_block(head, spec(head.root, small, **long))


def test_what_decode_has_chosen_is_checked(untouched: Path, small: str, state: Path) -> None:
    """An adapter that is right until it has been asked for sixty single steps."""
    steps = "        self.n = getattr(self, 'n', 0) + (len(tokens) == 1)\n        return (-out[0], out[1]) if self.n"
    (untouched / "mine.py").write_text(ADAPTER.replace("        return out\n", f"{steps} > 60 else out\n"))
    git(untouched, "commit", "-q", "-a", "-m", "wrong")
    with sides(untouched) as (_, head):
        asked = spec(head.root, small, decode_tokens=32)
        with pytest.raises(BlockWrong, match=r"^decode after timing|^timed decode"):
            measure_block(head, asked)


@pytest.mark.parametrize("how", WRONG)
def test_parity_is_of_the_workload_that_is_timed(untouched: Path, small: str, state: Path, how: str) -> None:
    breaks_when_long(untouched, how)
    verdicts = {}
    with sides(untouched) as both:
        for side in both:
            words = ["--backend", str(side.root / "mine.py"), "--model", small, "--quant", "fp32", "--threads", "1"]
            rows = parity_rows(side, [*words, "--prompt-tokens", "300", "--decode-tokens", "4"])
            verdicts[side.name] = {row["metric"]: row["verdict"] for row in rows}
    assert set(verdicts["base"].values()) == {"PASS"}
    assert verdicts["head"]["parity"] == "FAIL"
