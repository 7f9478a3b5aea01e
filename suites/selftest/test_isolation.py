"""A backend that takes its process with it becomes a row; nothing else is lost, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from backends.api import Unavailable
from backends.deadly import FAULTS, LATE
from harness.isolation import start
from harness.isolation.environments import Environment
from harness.models import open_model
from harness.session import open_session
from suites.selftest.processes import MAIN, ROOT, Place, eventually, signalled, stop

TIMEOUT = 3

_BY_NOBODY = ", which nobody here sent: out of memory is the usual cause"

#: Fault -> verdict, and what the reason says besides where it happened.
EXPECTED: dict[str, tuple[str, str]] = {
    "segfault": ("CRASHED", r"^killed by SIGSEGV during [a-z ]+; last words: deadly: about to read address 0$"),
    "abort": ("CRASHED", r"^killed by SIGABRT during [a-z ]+; last words: GGML_ASSERT: deadly\.c:1: false$"),
    "kill": (
        "CRASHED",
        rf"^killed by SIGKILL during [a-z ]+{_BY_NOBODY}$",
    ),
    "exit": ("CRASHED", r"^exited with status 0 without an answer during [a-z ]+$"),
    "status": ("CRASHED", r"^exited with status 7 during [a-z ]+; last words: deadly: cannot go on$"),
    "busy": ("TIMEOUT", rf"^no sign of life for {TIMEOUT} s during [a-z ]+; killed$"),
    "sleep": ("TIMEOUT", rf"^no sign of life for {TIMEOUT} s during [a-z ]+; killed$"),
    "stop": ("TIMEOUT", rf"^no sign of life for {TIMEOUT} s during [a-z ]+; killed$"),
    "orphan": ("CRASHED", r"^killed by SIGKILL during"),
    "escape": ("CRASHED", r"^killed by SIGKILL during"),
    "daemon": ("CRASHED", r"^killed by SIGKILL during"),
    "forge": ("CRASHED", r"^sent an answer to something that was not asked during [a-z ]+$"),
    "fork": ("CRASHED", r"^killed by SIGKILL during"),
    "shut": ("CRASHED", r"^closed its channel during [a-z ]+ and went on running; killed$"),
    "memory": ("CRASHED", r"^MemoryError; traceback in .+\.npz$"),
    "flood": ("CRASHED", r"^killed by SIGABRT during [a-z ]+; last words: .*deadly: drowned$"),
    "noise": ("PASS", ""),
    "litter": ("CRASHED", r"^killed by SIGKILL during"),
}


class Ran(NamedTuple):
    """One run over every fault, and a sound backend after them."""

    code: int
    rows: list[dict[str, Any]]
    stored: list[dict[str, Any]]
    err: str
    place: Place


def run_all(kinds: str, small: str, folder: Path) -> tuple[subprocess.Popen[str], Place]:
    place = Place(folder / (kinds or "early"))
    devices = ",".join([*(kinds + name for name in FAULTS), "cpu"])
    sizes = ("--prompt-tokens", "8", "--decode-tokens", "64", "--repeats", "6", "--threads", "1")
    what = ("run", "--backend", "deadly,numpy", "--device", devices, "--quant", "fp32", "--model", small)
    where = ("--isolate", "--timeout", str(TIMEOUT), "--format", "json", "--store", str(place.store))
    return place.start(*what, *sizes, *where), place


@pytest.fixture(scope="module")
def ran(small: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Early and late faults, side by side."""
    folder = tmp_path_factory.mktemp("isolation")
    started = {kinds: run_all(kinds, small, folder) for kinds in ("", LATE)}
    found = {}
    for kinds, (process, place) in started.items():
        out, err = process.communicate(timeout=180)
        stored = [json.loads(line) for line in place.store.read_text().splitlines()]
        found[kinds] = Ran(process.returncode, json.loads(out)["rows"], stored, err, place)
    return found


def test_every_fault_is_expected_here() -> None:
    assert set(EXPECTED) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_the_first_call_is_one_row(fault: str, ran: dict[str, Ran]) -> None:
    verdict, reason = EXPECTED[fault]
    rows = [row for row in ran[""].rows if row["device"] == fault]
    if verdict == "PASS":
        assert {row["verdict"] for row in rows} == {"PASS"}
        return
    (row,) = rows
    assert (row["verdict"], row["metric"], row["value"], row["isolated"]) == (verdict, "first_call", None, True)
    assert re.search(reason, row["reason"]), row["reason"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_timing_keeps_what_came_before(fault: str, ran: dict[str, Ran]) -> None:
    verdict, reason = EXPECTED[fault]
    rows = [row for row in ran[LATE].rows if row["device"] == LATE + fault]
    by_metric = {row["metric"]: row for row in rows}
    for metric in ("parity", "load", "first_call", "prefill"):
        assert (by_metric[metric]["verdict"], by_metric[metric]["isolated"]) == ("PASS", True)
    assert by_metric["prefill"]["value"] > 0
    decode = by_metric["decode"]
    assert decode["verdict"] == verdict
    assert re.search(reason, decode["reason"] or ""), decode["reason"]
    assert (decode["value"] is None) == (verdict != "PASS")


@pytest.mark.parametrize("kinds", ["", LATE])
def test_the_cell_after_them_all_runs_and_the_status_is_4(kinds: str, ran: dict[str, Ran]) -> None:
    found = ran[kinds]
    assert found.code == 4
    sound = {row["metric"]: row["verdict"] for row in found.rows if row["backend"] == "numpy"}
    assert sound["parity"] == sound["decode"] == "PASS"


@pytest.mark.parametrize("kinds", ["", LATE])
def test_every_row_was_on_disk(kinds: str, ran: dict[str, Ran]) -> None:
    def named(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        return [(row["device"], row["metric"], row["verdict"]) for row in rows]

    assert named(ran[kinds].stored) == named(ran[kinds].rows)


@pytest.mark.parametrize("kinds", ["", LATE])
def test_no_process_and_no_file_is_left(kinds: str, ran: dict[str, Ran]) -> None:
    """Not even by those who start daemons, or write into the temporary folder."""
    assert ran[kinds].place.left() == []
    assert ran[kinds].place.children() == []
    assert _told_of(ran[kinds].place) == []


def _told_of(place: Place) -> list[list[str]]:
    """Command lines that name our temporary folder: all that is left of us in a daemon."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if any(str(place.temporary) in word for word in line)]


def test_the_daemon_is_such_that_only_its_command_line_tells_of_us(place: Place) -> None:
    """Where nothing looks for it, it stays."""
    code = "import os; os.environ['TMPDIR'] += '/x'; from backends.deadly import FAULTS; FAULTS['daemon']()"
    done = subprocess.run([sys.executable, "-c", code], env=place.environment, check=False)
    assert done.returncode == -signal.SIGKILL
    told = [one for one in psutil.process_iter() if _names(one, f"{place.temporary}/x")]
    try:
        assert len(told) == 1
        assert (place.children(), told[0].environ(), os.getsid(told[0].pid) == os.getsid(0)) == ([], {}, False)
    finally:
        stop(told)


def _names(process: psutil.Process, word: str) -> bool:
    with suppress(psutil.Error):
        return word in process.cmdline()
    return False


@pytest.mark.parametrize("kinds", ["", LATE])
def test_what_a_backend_prints_reaches_nobody_raw(kinds: str, ran: dict[str, Ran]) -> None:
    assert "Traceback" not in ran[kinds].err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ran[kinds].err)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Folders, and the certainty that nothing runs on after a test that failed."""
    made = Place(tmp_path)
    yield made
    stop(made.children())


def busy(place: Place, small: str, backends: str = "deadly", devices: str = "busy") -> subprocess.Popen[str]:
    """The command line, with a child that has struck."""
    what = ("parity", "--backend", backends, "--device", devices, "--quant", "fp32", "--model", small, "--isolate")
    process = place.start(*what, "--store", str(place.store))

    def at_work() -> bool:
        """The late fault waits for a request; one in C takes all of its core."""
        return any(child.cpu_times().user > 1.0 for child in place.children())

    if not eventually(at_work, 30):
        process.kill()
        pytest.fail(f"the child never got to work: {process.communicate()[1]}")
    return process


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_ends_the_run_at_once_however_busy_the_child(
    number: int, code: int, words: str, place: Place, small: str
) -> None:
    process = busy(place, small)
    assert signalled(process, number) < 5
    _, err = process.communicate()
    assert process.returncode == code
    assert words in err
    assert "Traceback" not in err
    assert (place.children(), place.left()) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause", [0, 0.01, 0.1])
def test_signals_in_quick_succession_are_one(number: int, pause: float, place: Place, small: str) -> None:
    """As of somebody who keeps the keys pressed: the rows, the words and the status are those of the first."""
    process = busy(place, small, "numpy,deadly", "cpu,busy")
    for _ in range(8):
        process.send_signal(number)
        time.sleep(pause)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (128 + number, False)
    assert err.splitlines()[-1].startswith("rwkv-bench: ")
    assert "PASS" in out
    assert (place.children(), place.left()) == ([], [])


def test_a_signal_that_comes_later_counts_anew() -> None:
    """Inside the block, where a backend may have swallowed the first; after it, it does what it always does."""
    code = """\
import os, signal, sys, time
from harness.interrupt import AT_ONCE_SECONDS, Terminated, terminable

number = int(sys.argv[1])
told = []
try:
    with terminable():
        for pause in (0, AT_ONCE_SECONDS + 0.1):
            time.sleep(pause)
            try:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            except KeyboardInterrupt as error:
                told.append(type(error).__name__)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    os.kill(os.getpid(), number)
print(told, flush=True)
time.sleep(AT_ONCE_SECONDS + 0.1)
os.kill(os.getpid(), number)
time.sleep(10)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number, name in ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")):
        command = [sys.executable, "-c", code, str(int(number))]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.stdout == f"{[name, name]}\n", done.stderr
        assert done.returncode == -number


def test_killing_the_run_leaves_no_orphan_though_it_never_lets_python_run(place: Place, small: str) -> None:
    process = busy(place, small)
    signalled(process, signal.SIGKILL)
    assert eventually(lambda: not place.children(), 5)
    # A killed process cannot tidy up; the next run does.
    assert place.left() != []
    done = place.run("parity", "--backend", "numpy", "--quant", "fp32", "--model", small, "--isolate")
    assert done.returncode == 0
    assert place.left() == []


HOG = """\
from backends.api import BackendInfo
from reference.numerics import Arithmetic

INFO = BackendInfo("hog", "takes all memory there is", "a test", ("cpu",), {"fp32": Arithmetic()})


class Session:
    def forward(self, tokens, state):
        taken = []
        while True:
            taken.append(bytearray(b"x") * (1 << 24))


def load(checkpoint, scheme, device, threads):
    return Session()
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with 600 MB of memory for all that is in it."""
    path = Path("/sys/fs/cgroup/memory") / f"rwkv-bench-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text("600000000")
    except OSError as error:
        pytest.skip(f"a memory limit needs a writable control group, version 1: {error}")
    yield path
    assert eventually(lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


def test_the_kernel_out_of_memory_ends_the_child_and_not_the_run(group: Path, place: Place, small: str) -> None:
    """Parent and child are in the group that has no more; the next cell runs."""
    hog = place.store.with_name("hog.py")
    hog.write_text(HOG)
    argv = ["parity", "--backend", f"{hog},numpy", "--quant", "fp32", "--model", small, "--isolate", "--format", "json"]
    shell = f'echo $$ > {group}/cgroup.procs; exec "$0" -c "$@"'
    command = ["bash", "-c", shell, sys.executable, MAIN, *argv]
    done = subprocess.run(command, env=place.environment, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 4
    rows = json.loads(done.stdout)["rows"]
    assert [row["verdict"] for row in rows] == ["CRASHED", "PASS", "PASS"]
    assert rows[0]["reason"].startswith(f"killed by SIGKILL during forward{_BY_NOBODY}")
    assert (place.children(), place.left()) == ([], [])


def test_closed_standard_streams_do_not_end_up_as_the_channel(place: Place, small: str) -> None:
    argv = ["parity", "--backend", "numpy", "--quant", "fp32", "--model", small, "--isolate"]
    output = place.temporary.parent / "table.json"
    shell = 'exec "$0" -c "$1" "${@:2}" <&- >&- 2>&-'
    command = ["bash", "-c", shell, sys.executable, MAIN, *argv, "--format", "json", "--output", str(output)]
    done = subprocess.run(command, env=place.environment, check=False, timeout=60)
    assert done.returncode == 0
    assert {row["verdict"] for row in json.loads(output.read_text())["rows"]} == {"PASS"}


def test_a_shell_that_ignores_the_death_of_children_is_told_of_it(place: Place, small: str) -> None:
    """``trap '' CHLD`` is inherited, and makes the kernel forget how a child ended."""
    argv = ["parity", "--backend", "deadly", "--device", "segfault", "--model", small, "--isolate"]
    command = ["bash", "-c", 'trap \'\' CHLD; exec "$0" -c "$@"', sys.executable, MAIN, *argv]
    done = subprocess.run(command, env=place.environment, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 4
    assert "killed by SIGSEGV" in done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONPATH": "/nonexistent", "PYTHONHOME": "/nonexistent"},
        {"LC_ALL": "C", "LANG": "C"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"},
        {"PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONINSPECT": "1"},
    ],
    ids=["a python elsewhere", "locale C", "locale POSIX without UTF-8", "strict python"],
)
def test_the_users_environment_does_not_reach_the_child(
    environment: dict[str, str], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONHOME would end this very process as well, so it is set once this one runs."""

    model = tmp_path / "модель é 模型.safetensors"
    shutil.copy(small, model)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open_session("numpy", str(model), "fp32", threads=1, isolate=True) as opened:
        assert opened.session.forward([1, 2], None)[0].shape == (256,)


def test_relative_paths_and_another_working_folder(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    (tmp_path / "elsewhere").mkdir()
    shutil.copy(small, tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    with open_session("numpy", "./m.safetensors", "fp32", threads=1, isolate=True) as opened:
        expected, _ = opened.session.forward([1, 2], None)
    model = open_model("./m.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with open_session("numpy", model, "fp32", threads=1, isolate=True) as opened:
        assert (opened.session.forward([1, 2], None)[0] == expected).all()


@pytest.mark.parametrize("script", ["#!/bin/sh\necho 'no module encodings' >&2\nexit 1\n", "#!/no/such/python\n"])
def test_an_environment_that_does_not_start_is_said_with_its_cure(
    script: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of the Python that it was made from."""
    python = tmp_path / "numpy-0123" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(script)
    python.chmod(0o755)
    monkeypatch.setattr(start, "environment", lambda name, backend: Environment(python, "3.11.0", ()))
    with (
        pytest.raises(Unavailable, match=r"^numpy: its environment does not start: ") as caught,
        open_session("numpy", small, "fp32", isolate=True),
    ):
        pytest.fail("it must not start")
    words = "exited with status 1 during starting; last words: no module encodings"
    assert words in caught.value.reason or "No such file" in caught.value.reason
    assert caught.value.how_to_get_it == f"delete {tmp_path / 'numpy-0123'} and run rwkv-bench setup numpy"
