"""Nothing measured is lost: signals, a full disk, several runs at once, streams that fail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.collect import Collector
from harness.interrupt import terminable
from harness.measure import DecodeTimer
from harness.progress import Progress
from harness.rows import Row
from harness.samples import Taken
from harness.store import StoreError, read
from harness.turns import Turns
from suites.selftest.conftest import Done

Bench = Callable[..., Done]


@pytest.fixture
def quick(small: str) -> tuple[str, ...]:
    return ("--model", small, "--backend", "numpy", "--quant", "fp32", "--threads", "1", "--quick")


def stop_decode(monkeypatch: pytest.MonkeyPatch, stop: Callable[[], Any]) -> None:
    turn = Turns.turn

    def stopped(self: Turns, count: int, settle: bool) -> Taken:
        if isinstance(self._timer, DecodeTimer):
            stop()
        return turn(self, count, settle)

    monkeypatch.setattr(Turns, "turn", stopped)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "code", "words"),
    [
        (interrupt, 130, "interrupted"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "ended by SIGTERM"),
        (lambda: os.kill(os.getpid(), signal.SIGHUP), 129, "ended by SIGHUP"),
    ],
)
def test_an_interrupted_run_keeps_and_prints_what_it_has(
    stop: Callable[[], Any],
    code: int,
    words: str,
    quick: tuple[str, ...],
    bench: Bench,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_decode(monkeypatch, stop)
    done = bench(*quick, "--format", "json")
    assert done.code == code
    assert done.err.splitlines()[-1] == f"rwkv-bench: {words}"
    metrics = [row["metric"] for row in json.loads(done.out)["rows"]]
    assert metrics[:4] == ["parity", "state_parity", "load", "first_call"]
    assert [row.metric for row in read(state / "rows.jsonl")] == metrics
    with terminable():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_store_that_fills_up_ends_the_run_with_what_it_has(
    quick: tuple[str, ...], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import collect

    appended: list[Any] = []

    def append(path: Path, row: Any) -> None:
        if len(appended) == 3:
            raise StoreError("cannot write results to here: No space left on device")
        appended.append(row)

    monkeypatch.setattr(collect, "append", append)
    done = bench(*quick, "--format", "json")
    assert done.code == 2
    assert len(json.loads(done.out)["rows"]) == 3
    assert done.err.splitlines()[-1].endswith("No space left on device")


def test_two_runs_share_a_store(small: str, tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "rows.jsonl"
    row = Row(kind="recorded", hardware="cpu", backend="b", model="m", scheme="s", metric="decode", value=1.0)

    def work() -> None:
        collector = Collector(path, Progress(io.StringIO(), (), False), lambda rows: "")
        for _ in range(20):
            collector.add(row, False)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path)) == 60


COMMAND = [sys.executable, "-c", "import sys, harness.cli; sys.exit(harness.cli.main())"]


def environment(state: Path) -> dict[str, str]:
    """That of this test: ``state`` has set the folders."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_ctrl_c_in_the_middle_of_a_run(quick: tuple[str, ...], state: Path) -> None:
    endless = [*COMMAND, *quick, "--repeats", "10000", "--prompt-tokens", "4096"]
    # A shell starts background jobs with SIGINT ignored; this process must not inherit that.
    running = subprocess.Popen(
        endless,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(state),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    store = state / "rows.jsonl"
    deadline = time.monotonic() + 60
    while not (store.exists() and '"first_call"' in store.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "rwkv-bench: interrupted"
    assert "PASS" in out
    assert [row.metric for row in read(store)][:2] == ["parity", "state_parity"]


SHELL = """
bench() { "$PYTHON" -c 'import sys, harness.cli; sys.exit(harness.cli.main())' "$@"; }
good() { bench parity --model "$MODEL" --backend numpy --quant fp32 --threads 1 "$@"; }
bad() { bench parity --model "$MODEL" --backend faulty --device exception --threads 1 "$@"; }
"""

#: How a shell leaves the streams -> what the exit status must be.
STREAMS = {
    "bad | true; exit ${PIPESTATUS[0]}": 4,
    "good >&-": 2,
    "good 2>&-": 0,
    "good 2>/dev/full": 0,
    "good --format csv >/dev/full": 2,
}


@pytest.mark.parametrize("line", STREAMS)
def test_streams_that_fail_cost_neither_rows_nor_a_traceback(line: str, small: str, state: Path) -> None:
    if "/dev/full" in line and not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    words = {**environment(state), "PYTHON": sys.executable, "MODEL": small}
    done = subprocess.run(["bash", "-c", SHELL + line], capture_output=True, text=True, env=words, check=False)
    assert done.returncode == STREAMS[line]
    assert "Traceback" not in done.stderr
    assert len(read(state / "rows.jsonl")) == (1 if line.startswith("bad") else 2)


def test_a_terminal_that_goes_away_does_not_end_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no terminal")

    with Progress(Gone(), (), False) as progress:
        progress.done("PASS")
