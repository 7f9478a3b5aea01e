"""``rwkv-bench ab``: checkouts that leave nothing behind, pairs in random order, answers, what ends it early."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness.ab
import harness.ab_workers
import reports.ab_work
from harness.ab_checkouts import CheckoutError, Side, checkouts, within
from harness.ab_parity import parity_rows
from harness.ab_workers import LEAST, MOST, Block, BlockFailed, BlockWrong, measure
from harness.options import parse
from harness.store import read
from reports.verdict.blocks import read_rows
from suites.selftest.conftest import Done

Bench = Callable[..., Done]

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
    import sys

    return checkouts(root, base, head, (sys.executable, sys.executable))


@pytest.fixture
def untouched(repository: Path) -> Iterator[Path]:
    """Afterwards the repository is as it was."""
    yield repository
    assert git(repository, "worktree", "list").count("\n") == 1
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "branch", "--list").split() == ["*", "main"]


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


def spec(root: Path, model: str, **more: Any) -> dict[str, Any]:
    known = {"backend": str(root / "mine.py"), "model": model, "scheme": "fp32", "device": "cpu", "threads": 1}
    return {**known, "seed": 0, "prompt_tokens": 8, "decode_tokens": 4, "repeats": 3, "metrics": ["decode"], **more}


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


class Machine:
    """Stands in for processes: block times with noise that lasts, head slower by ``slowdown``; a block takes 1 s."""

    def __init__(
        self, slowdown: float = 0.0, ends: int | None = None, broken: str | None = None, wrong: str | None = None
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.slowdown, self.ends, self.broken, self.wrong = slowdown, ends, broken, wrong
        self.right_for, self.crowded = 40, False
        self.asked: list[list[str]] = []
        self.calls: list[str] = []
        self.samples: list[int | None] = []
        self.level = 0.0
        self.clock = 0.0

    def monotonic(self) -> float:
        return self.clock

    def measure(self, asked: Sequence[tuple[Side, Mapping[str, Any]]]) -> list[Block | BlockFailed | None]:
        """Of the first that fails, and of none after it."""
        found: list[Block | BlockFailed | None] = [None] * len(asked)
        if len(asked) == 2 and self.crowded:
            self.clock += 1.0
            return [BlockFailed("killed by SIGKILL: no output"), None]
        for i, (side, spec) in enumerate(asked):
            try:
                found[i] = self.block(side, spec)
            except BlockFailed as error:
                found[i] = error
                break
        return found

    def block(self, side: Side, asked: Mapping[str, Any]) -> Block:
        self.calls.append(side.name)
        self.samples.append(asked["repeats"])
        self.clock += 1.0
        if self.ends is not None and len(self.calls) > self.ends:
            raise KeyboardInterrupt
        if self.broken in (side.name, "both"):
            raise BlockFailed("killed by SIGSEGV: no more words")
        if self.wrong == side.name and len(self.calls) > self.right_for:
            raise BlockWrong("prefill: logit 0 is nan at step 0 of sample 0")
        self.level = 0.9 * self.level + self.rng.normal(0, 0.05)  # drift far larger than the difference
        slow = 1 / (1 - self.slowdown) if side.name == "head" else 1.0
        ns = {
            metric: tuple(int(1e7 * slow * np.exp(self.level + self.rng.normal(0, 0.004))) for _ in range(3))
            for metric in asked["metrics"]
        }
        return Block(ns, dict.fromkeys(ns, "loop") | {"prefill": None}, "1.0")

    def parity(self, side: Side, words: list[str]) -> list[dict[str, Any]]:
        self.asked.append(list(words))
        return [{"scheme": "fp32", "verdict": "PASS", "reason": "worst position"}]


@pytest.fixture
def ab(bench: Bench, untouched: Path, small: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command in the repository, with a machine that is made up."""
    monkeypatch.chdir(untouched)

    def run(machine: Machine, *words: str) -> Done:
        monkeypatch.setattr(reports.ab_work, "measure", machine.measure)
        monkeypatch.setattr(reports.ab_work, "parity_rows", machine.parity)
        for module in (reports.ab_work, harness.ab):
            monkeypatch.setattr(module, "time", machine)
        common = ("--backend", "mine.py", "--model", small, "--threads", "1")
        return bench("ab", "--base", "HEAD~1", *common, "--seed", "3", *words)

    return run


def test_a_slowdown_far_below_the_drift_is_seen(ab: Callable[..., Done]) -> None:
    machine = Machine(slowdown=0.05)
    done = ab(machine, "--format", "json")
    told = json.loads(done.out)
    assert done.code == 1
    assert told["paired"] is True
    assert {it["decision"] for it in told["cells"]} == {"SLOWER"}
    assert all(it["ratio"] == pytest.approx(0.95, abs=0.03) for it in told["cells"])


def test_no_difference_is_answered_and_rows_are_kept(ab: Callable[..., Done], tmp_path: Path) -> None:
    done = ab(Machine(), "--store", str(tmp_path / "rows.jsonl"), "--effect", "20%", "--margin", "10%")
    assert done.code == 0
    assert "2 of 2 no slower" in done.out
    assert "pairs of blocks" in done.out
    rows = read(tmp_path / "rows.jsonl")
    assert {row.extra["ab"]["side"] for row in rows} == {"base", "head"}
    commits = {row.extra["ab"]["side"]: row.extra["revision"] for row in rows}
    assert commits == {side: git(Path(), "rev-parse", "--short=10", at).strip() for side, at in SIDES.items()}
    blocks = {len(series.times) for series in read_rows(rows[:2]).series.values()}
    assert len(blocks) == 1
    assert blocks.pop() >= 10


def test_a_fair_coin_says_who_is_first(ab: Callable[..., Done]) -> None:
    machine = Machine()
    ab(machine, "--effect", "20%", "--margin", "10%")
    firsts = machine.calls[::2]
    assert set(zip(firsts, machine.calls[1::2], strict=True)) == {("base", "head"), ("head", "base")}
    rng = random.Random(3)
    expected = []
    for _ in firsts:
        order = [0]
        rng.shuffle(order)
        expected.append("head" if rng.random() < 0.5 else "base")
    assert firsts == expected


def test_ctrl_c_shows_what_was_measured(ab: Callable[..., Done]) -> None:
    done = ab(Machine(slowdown=0.3, ends=61))
    assert done.code == 130 or "REGRESSION" in done.out
    early = ab(Machine(ends=7))
    assert early.code == 130
    assert "UNDECIDED" in early.out
    assert "interrupted" in early.err


def test_a_head_that_crashes_is_a_regression(ab: Callable[..., Done]) -> None:
    done = ab(Machine(broken="head"))
    assert done.code == 1
    assert "PASS → CRASHED" in done.out
    assert "SIGSEGV" in done.out
    base = ab(Machine(broken="base"))
    assert base.code == 4
    assert "cannot be measured in base" in base.out


def test_what_both_sides_fail_at_is_no_regression(ab: Callable[..., Done]) -> None:
    for seed in range(4):  # whichever is asked first
        done = ab(Machine(broken="both"), "--seed", str(seed))
        assert done.code == 4
        assert "cannot be measured in base" in done.out
        assert "cannot be measured in head" in done.out
        assert "REGRESSION" not in done.out


def test_what_fails_only_beside_the_other_is_measured_alone(ab: Callable[..., Done]) -> None:
    machine = Machine()
    machine.crowded = True
    done = ab(machine, "--effect", "20%", "--margin", "10%")
    assert done.code == 0
    assert "2 of 2 no slower" in done.out
    assert machine.samples[1::2] == [3] * len(machine.samples[::2])
    told = " ".join(done.out.split())
    assert "each side alone, one after the other, since beside the other" in told
    assert "killed by SIGKILL: no output" in told


def test_a_block_that_is_wrong_takes_the_speed_away(ab: Callable[..., Done], tmp_path: Path) -> None:
    """Also the one of a reading before, after 12 pairs."""
    store = tmp_path / "rows.jsonl"
    done = ab(Machine(wrong="head"), "--effect", "1.1%", "--store", str(store))
    assert done.code == 1
    assert "PASS → FAIL" in done.out
    assert "is wrong in head: prefill: logit 0 is nan" in done.out
    assert "tok/s" not in done.out
    rows = {(row.extra["ab"]["side"], row.metric): row for row in read(store)}
    assert {rows["head", metric].value for metric in ("prefill", "decode")} == {None}
    assert {rows["head", metric].verdict for metric in ("prefill", "decode")} == {"FAIL"}
    assert rows["base", "decode"].value is not None
    base = ab(Machine(wrong="base"), "--effect", "1.1%")
    assert "is wrong in base" in base.out
    assert "FAIL → PASS" in base.out


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_block_that_is_wrong_from_the_first_is_answered_too(
    ab: Callable[..., Done], tmp_path: Path, side: str
) -> None:
    store = tmp_path / "rows.jsonl"
    machine = Machine(wrong=side)
    machine.right_for = 0
    done = ab(machine, "--store", str(store))
    assert done.code == (1 if side == "head" else 4)
    assert f"is wrong in {side}: prefill: logit 0 is nan" in done.out
    assert {(row.extra["ab"]["side"], row.value, row.verdict) for row in read(store)} == {(side, None, "FAIL")}


def test_parity_is_asked_for_the_lengths_that_are_timed(ab: Callable[..., Done]) -> None:
    machine = Machine()
    ab(machine, "--prompt-tokens", "300", "--decode-tokens", "5", "--effect", "20%", "--margin", "10%")
    for words in machine.asked:
        assert words[words.index("--prompt-tokens") + 1] == "300"
        assert words[words.index("--decode-tokens") + 1] == "5"
    assert len(machine.asked) == 2


def test_a_head_that_is_wrong_is_not_timed(ab: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    bad = {"base": "PASS", "head": "FAIL"}
    monkeypatch.setattr(
        Machine, "parity", staticmethod(lambda side, words: [{"scheme": "fp32", "verdict": bad[side.name]}])
    )
    done = ab(machine)
    assert done.code == 1
    assert machine.calls == []
    assert "PASS → FAIL" in done.out


@pytest.mark.parametrize("verdict", ["UNAVAILABLE", "UNSUPPORTED"])
def test_what_head_has_lost_is_a_regression(
    ab: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    """Both sides ran on one machine: what base can be judged by is there."""
    said = {"base": {"verdict": "PASS"}, "head": {"verdict": verdict, "reason": "no kernel"}}
    monkeypatch.setattr(Machine, "parity", staticmethod(lambda side, words: [{"scheme": "fp32", **said[side.name]}]))
    done = ab(Machine(), "--minutes", "1")
    assert done.code == 1
    assert f"PASS → {verdict}" in done.out
    assert "no kernel" in done.out


def test_the_last_reading_waits_for_the_end_of_the_time(ab: Callable[..., Done]) -> None:
    """Three readings, after 12, 24 and 48 pairs, leave a small effect open; 421 pairs, when time is over, do not."""
    machine = Machine()
    machine.rng = np.random.default_rng(1)
    found = json.loads(ab(machine, "--minutes", "14", "--effect", "1.1%", "--format", "json").out)
    assert len(machine.calls) == 2 * 14 * 30 + 2  # the pair that began in time is finished
    assert {it["decision"] for it in found["cells"]} == {"NO SLOWER"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "mian"), "no revision 'mian'"),
        (("--base", "HEAD", "--minutes", "0"), "--minutes is 0"),
        (("--base", "HEAD", "--base-python", "python0"), "no interpreter python0"),
        (("--base", "HEAD", "--setup", "echo so it goes >&2; exit 3"), "status 3: so it goes"),
        (("--base", "mian", "--store", "no folder/rows.jsonl"), "no folder"),
        (("--base", "HEAD", "--hardware", "a800"), "both sides run on this machine"),
        ((), "--base"),
    ],
)
def test_what_cannot_be_is_told(
    bench: Bench, untouched: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(untouched)
    done = bench("ab", *words, "--backend", "numpy", "--quant", "fp32")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_of_it(bench: Bench, untouched: Path, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes, real parity: twice the work takes twice the time."""
    monkeypatch.chdir(untouched)
    done = bench(
        "ab", "--base", "HEAD~1", "--backend", "mine.py", "--model", small, "--threads", "1", "--format", "json"
    )
    told = json.loads(done.out)
    assert done.code == 1
    assert {(it["metric"], it["decision"]) for it in told["cells"]} == {("prefill", "SLOWER"), ("decode", "SLOWER")}
    assert all(0.3 < it["ratio"] < 0.8 for it in told["cells"])
    assert [it["head"] for it in told["parity"]] == ["PASS"]


def test_parity_of_a_side_comes_from_its_own_code(untouched: Path, small: str) -> None:
    with sides(untouched) as (base, _):
        words = ["--backend", str(base.root / "mine.py"), "--model", small, "--quant", "fp32", "--threads", "1"]
        rows = parity_rows(base, words)
    assert {row["metric"] for row in rows} >= {"parity", "prefill", "decode"}
    assert {row["verdict"] for row in rows} == {"PASS"}


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
