"""A child process: it ends with all it has started when it must, and nothing of it stays."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from harness.isolation import leftovers, start
from harness.isolation.archive import BOOT, code_archive
from harness.isolation.child import Child, ChildDied, ChildTimedOut, alone
from harness.session import Opened, open_session
from suites.selftest.processes import ROOT, eventually


def test_two_hundred_sessions_leave_no_descriptor_thread_process_or_folder(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The children are a few lines of Python; what is counted is ours."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def once(kill: bool) -> None:
        made = child("print('x' * 100); os.read(fd, 1)")
        if kill:
            made.kill()
        else:
            made.channel.send_bytes(b"x")
            made.end()

    once(True)
    gc.collect()
    before = _held()
    for number in range(200):
        once(number % 2 == 0)
    gc.collect()
    assert _held() == before
    assert os.listdir(tmp_path) == []


def _held() -> tuple[int, int, int]:
    """Open descriptors, threads, children that were not collected."""
    children = subprocess.run(["ps", "--no-headers", "--ppid", str(os.getpid())], capture_output=True, text=True)
    ours = [line for line in children.stdout.splitlines() if not line.rstrip().endswith(" ps")]
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(ours)


def child(code: str, timeout: float = 20) -> Child:
    """A child that greets, and then runs ``code`` with its descriptor as ``fd``."""
    greet = r"fd = int(sys.argv[1]); os.write(fd, b'\n\x93rwkv-bench frames 1\n')"
    made = Child([sys.executable, "-I", "-S", "-c", f"import os, sys, time; {greet}\n{code}"], {}, timeout)
    with made.waiting("starting"):
        made.channel.await_greeting()
    return made


def test_a_child_that_cannot_be_started_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = _held()
    with pytest.raises(FileNotFoundError):
        Child(["/no/such/python"], {})
    with pytest.raises(ValueError, match="more than 0 is needed"):
        Child([sys.executable], {}, float("nan"))
    assert _held() == before
    assert os.listdir(tmp_path) == []


def test_a_thread_that_cannot_be_started_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = _held()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            Child([sys.executable, "-c", "import time; time.sleep(100)"], {})
    gc.collect()
    assert _held() == before
    assert os.listdir(tmp_path) == []


def test_a_session_opened_by_a_thread_outlives_it(small: str) -> None:
    """A child that the kernel ties to its parent *thread* would be killed when that one ends."""
    with ExitStack() as stack:
        found: list[Opened] = []
        opening = threading.Thread(
            target=lambda: found.append(
                stack.enter_context(open_session("numpy", small, "fp32", threads=1, isolate=True))
            )
        )
        opening.start()
        opening.join()
        time.sleep(0.3)
        assert found[0].session.forward([1], None)[0].shape == (256,)


def test_who_is_dead_stays_dead_and_says_why() -> None:
    """Its descriptors may be another file's by then: nothing is read from or written to them."""
    gone = child("os.kill(os.getpid(), 11)")
    with pytest.raises(ChildDied, match="killed by SIGSEGV during a request"), gone.waiting("a request"):
        gone.channel.receive()
    with pytest.raises(ChildDied, match="killed by SIGSEGV during a request"), gone.waiting("another"):
        pytest.fail("nothing may be asked")
    late = child("time.sleep(100)", 0.5)
    for _ in range(2):
        words = r"no sign of life for 0\.5 s during a request"
        with pytest.raises(ChildTimedOut, match=words), late.waiting("a request"):
            late.channel.receive()


def test_an_interrupted_request_ends_the_child() -> None:
    """What comes next on the channel would be the answer to the request before."""
    asked = child("time.sleep(100)")
    with pytest.raises(KeyboardInterrupt), asked.waiting("a request"):
        raise KeyboardInterrupt
    with pytest.raises(ChildDied, match="it was ended before another"), asked.waiting("another"):
        pytest.fail("nothing may be asked")


def test_an_answer_that_came_while_we_were_stopped_counts() -> None:
    """Ctrl-Z, or a laptop that slept: the time limit is the child's, not ours."""
    empty = r"""b'\x93RB1\x0e\0\0\0{"arrays": []}'"""
    prompt = child(f"os.write(fd, {empty}); time.sleep(100)")
    with prompt.waiting("a request"):
        time.sleep(0.5)
        prompt._deadline = time.monotonic() - 1
        assert prompt.channel.receive() == ({}, [])
    prompt.kill()


def test_others_stand_still_while_one_is_measured() -> None:
    idle, measured = child("os.read(fd, 1)\nwhile True: pass"), child("time.sleep(100)")
    try:
        with idle.waiting("starting to spin"):
            idle.channel.send_bytes(b"x")
        assert eventually(lambda: _ticks(idle) > 5)
        with alone(measured):
            assert eventually(lambda: _state(idle) == "T", 5)
            assert _state(measured) != "T"
            with alone(None):
                assert eventually(lambda: _state(measured) == "T", 5)
            assert eventually(lambda: _state(measured) != "T", 5)
            assert _state(idle) == "T"
            with idle.waiting("something"):  # somebody needs it now
                assert eventually(lambda: _state(idle) != "T", 5)
        assert eventually(lambda: _state(idle) == "R", 5)
        with alone(measured):
            assert eventually(lambda: _state(idle) == "T", 5)
            idle.kill()  # a stopped one can be ended
        assert idle.process.returncode == -signal.SIGKILL
    finally:
        idle.kill()
        measured.kill()


def test_who_is_waited_for_is_not_stopped() -> None:
    working = child("time.sleep(100)")
    try:
        with working.waiting("a request of another thread"), alone(None):
            time.sleep(0.1)
            assert _state(working) != "T"
    finally:
        working.kill()


def _state(of: Child) -> str:
    return Path(f"/proc/{of.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def _ticks(of: Child) -> int:
    return int(Path(f"/proc/{of.process.pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_sessions_that_nobody_closes_end_with_the_interpreter(small: str, tmp_path: Path) -> None:
    code = (
        "import os, sys; from harness.session import open_session; "
        f"context = open_session('numpy', {small!r}, 'fp32', isolate=True); opened = context.__enter__(); "
        "print(opened.session._line.child.process.pid)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")
    assert os.listdir(tmp_path) == []


def test_every_child_of_a_killed_parent_dies(small: str, tmp_path: Path) -> None:
    """Each of several, since none may hold what ties another to the parent; idle, stopped or being started."""
    code = (
        "import time; from harness.session import open_session; from harness.isolation.child import alone\n"
        f"opened = [open_session('numpy', {small!r}, 'fp32', isolate=True) for _ in range(3)]\n"
        "lines = [one.__enter__().session._line for one in opened]\n"
        "with alone(lines[0].child):\n"
        "    print(*(line.child.process.pid for line in lines), flush=True); time.sleep(100)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = parent.stdout.readline().split()
        parent.kill()
    assert len(children) == 3
    assert eventually(lambda: not any(os.path.exists(f"/proc/{number}/exe") for number in children), 5)


def test_folders_of_the_living_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose owner has another number here, as in a container, is told by its lock."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living, killed = leftovers.Folder(), leftovers.Folder()
    for folder in (living, killed):
        renamed = folder.path.with_name(f"{leftovers.PREFIX}{dead.pid}-{folder.path.name[-8:]}")
        folder.path.rename(renamed)
        folder.path = renamed
    os.close(killed._file or 0)
    killed._file = None
    (tmp_path / f"{leftovers.PREFIX}notes").mkdir()
    leftovers.sweep()
    assert sorted(os.listdir(tmp_path)) == sorted([living.path.name, f"{leftovers.PREFIX}notes"])
    living.remove()


def test_the_archive_is_written_anew_if_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
    code_archive.cache_clear()
    try:
        path = code_archive()
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        code_archive.cache_clear()
        assert (code_archive(), path.read_bytes()) == (path, whole)
        assert [item.name for item in path.parent.iterdir()] == [path.name]
        monkeypatch.setenv("RWKV_BENCH_CACHE", str(path / "not a folder"))
        code_archive.cache_clear()
        private = code_archive()
        assert private.read_bytes() == whole
        assert private.parent.stat().st_mode & 0o077 == 0
    finally:
        code_archive.cache_clear()


def test_the_child_refuses_other_code_than_ours(small: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment with a copy of its own would be compared with what was not asked."""
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text("raise SystemExit('a copy was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    with open_session("numpy", small, "fp32", isolate=True) as opened:  # ours comes first
        assert opened.session.forward([1], None)[0].shape == (256,)
    monkeypatch.setattr(start, "BOOT", BOOT.replace("sys.argv[1])", f"{os.fspath(ROOT)!r})", 1))
    words = r"harness comes from .* the environment holds a copy of it"
    with pytest.raises(ChildDied, match=words), open_session("numpy", small, "fp32", isolate=True):
        pytest.fail("it must not start")


#: What a runtime may start: a process without parent, session, environment, folder or descriptors of ours.
DAEMON = """\
read_end, write_end = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir("/")
        os.closerange(0, 3)
        os.write(write_end, str(os.getpid()).encode())
        os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)"], {})
    os._exit(0)
os.close(write_end)
number = b""
while block := os.read(read_end, 99):
    number += block
os.write(fd, number.ljust(8))
"""


@pytest.mark.parametrize("first", ["nobody", "the worker"])
def test_a_daemon_ends_with_its_child_whoever_dies_first(first: str) -> None:
    made = child(f"{DAEMON}\nos.read(fd, 1)")
    with made.waiting("starting a daemon"):
        number = int(made.channel._read(8))
    stat = Path(f"/proc/{number}/stat")
    assert stat.read_text().rpartition(")")[2].split()[1] != str(made.process.pid)
    assert Path(f"/proc/{number}/environ").read_bytes() == b""
    if first == "the worker":
        os.kill(made.process.pid, signal.SIGKILL)
        made.process.wait()
        time.sleep(0.2)
    assert os.path.exists(f"/proc/{number}/exe")
    made.kill()
    assert _gone(number)


def test_a_daemon_whose_harness_was_killed_ends_with_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"from suites.selftest.test_child import DAEMON, child; print(child(DAEMON + {'time.sleep(99)'!r})"
    code += ".channel._read(8).decode(), flush=True); import time; time.sleep(99)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        parent.kill()
    assert not _gone(number)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    leftovers.sweep()
    assert _gone(number)
    assert os.listdir(tmp_path) == []


def _gone(number: int) -> bool:
    """Whether it runs no more; a zombie is somebody else's to collect."""
    return not os.path.exists(f"/proc/{number}/exe")


def test_who_starts_others_faster_than_they_are_found_is_ended() -> None:
    """A daemon that goes from process to process, each with a new number."""
    hop = "import os, time\nwhile os.fork() == 0: time.sleep(0.02)"
    made = child(DAEMON.replace("import time; time.sleep(1000)", "{hop}").replace('"{hop}"', repr(hop)))
    with made.waiting("starting a daemon"):
        made.channel._read(8)
    marked = leftovers._limit_of(made.folder)
    assert _with_limit(marked)
    made.kill()
    assert not _with_limit(marked)


def _with_limit(limit: int) -> list[int]:
    """Processes with that limit that still run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if str(limit) in Path(f"/proc/{name}/limits").read_text() and not _gone(int(name)):
                found.append(int(name))
    return found


def test_processes_of_others_are_left_alone() -> None:
    """Two children at once, and a process that has nothing to do with either."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    one, two = child("time.sleep(100)"), child("time.sleep(100)")
    try:
        one.kill()
        assert (other.poll(), two.process.poll()) == (None, None)
    finally:
        two.kill()
        other.kill()
        other.wait()


def test_a_limit_that_is_set_already_is_left_as_it_is() -> None:
    """A lower one, of somebody who knows why; the processes are then told by their temporary folder."""
    limited = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(100)"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_RTTIME, (10**9, 10**9)),
    )
    folder = leftovers.Folder()
    try:
        folder.mark(limited.pid)
        assert resource.prlimit(limited.pid, resource.RLIMIT_RTTIME) == (10**9, 10**9)
    finally:
        folder.remove()
        assert limited.poll() is None
        limited.kill()
        limited.wait()
