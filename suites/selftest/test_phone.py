"""A program on a phone, driven through a stand-in for adb: its figures, its deaths, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from backends.api import Unavailable
from harness.inventory import Phone
from harness.phone import run_on_phone
from harness.rows import Row
from harness.samples import Workload
from reference.errors import InputError
from suites.selftest.adb_stand_in import SERIAL, install
from suites.selftest.conftest import Done

#: A stand-in for faster-rwkv's chat, which goes on for ever; what it does is the first word of the prompt.
CHAT = """\
#!{python}
import os, signal, sys, time
open({pid!r}, "w").write(str(os.getpid()))
def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()
while True:
    say("User: ")
    question = sys.stdin.readline().strip()
    say("Assistant:")
    if question == "crash":
        say(" one two three")
        sys.stderr.write("ncnn: cannot allocate\\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    if question == "quit":
        say("RV_CHECK failed: unsupported strategy " + sys.argv[3] + "\\n")
        sys.exit(3)
    if question == "garbage":
        sys.stdout.buffer.write(bytes(range(256)) * 40)
        sys.exit(0)
    if question == "flood":
        while True:
            sys.stdout.write("x" * 65536)
    for i in range(int(os.environ["FR_MAX_OUTPUT_LEN"])):
        if question == "stuck" and i == 3:
            time.sleep(600)
        time.sleep(0.3 if question == "slow" else 0)
        say(f" token{{i}}")
    if os.environ.get("FR_SHOW_SPEED"):
        say("-- time: 2500ms\\n-- num tokens: 20\\n-- ms per token: 125\\n-- tokens per second: 8\\n\\n")
"""


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    return tmp_path / "pid"


@pytest.fixture
def phone(tmp_path: Path, pid_file: Path) -> Phone:
    files = tmp_path / "files"
    files.mkdir()
    binary = files / "chat"
    binary.write_text(CHAT.format(python=sys.executable, pid=str(pid_file)), encoding="utf-8")
    (files / "vocab").write_text("a")
    for ending in ("param", "bin", "config"):
        (files / f"rwkv-4-1b5.{ending}").write_bytes(b"weights " * 100)
    return Phone(
        name="mi10",
        adb=SERIAL,
        hardware="snapdragon865",
        binary=binary,
        kind="faster-rwkv",
        prints="faster-rwkv",
        arguments=("{tokenizer}", "{model}", "{scheme}"),
        tokenizer=files / "vocab",
        folder=str(tmp_path / "on the phone"),
        threads=4,
    )


Run = Callable[..., list[Row]]


@pytest.fixture
def run(phone: Phone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a phone's program; afterwards nothing but what was pushed is on the phone, and nothing here."""
    install(tmp_path, monkeypatch)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def go(prompt: str, tokens: int = 5, timeout: float = 20, mode: str = "", on: Phone = phone) -> list[Row]:
        monkeypatch.setenv("ADB_MODE", mode)
        model = tmp_path / "files" / "rwkv-4-1b5"
        rows = run_on_phone(on, model, "ncnn int4", prompt, tokens, timeout, told.append, model="1b5-world")
        assert not list(scratch.iterdir())
        return rows

    told: list[str] = []
    return go


def left_on(phone: Phone) -> list[str]:
    return sorted(path.name for path in Path(phone.folder).iterdir())


PUSHED = ["chat", "rwkv-4-1b5.bin", "rwkv-4-1b5.config", "rwkv-4-1b5.param", "vocab"]


def ended(pid_file: Path) -> bool:
    """Whether the program on the phone is gone, given a moment."""
    for _ in range(100):
        try:
            os.kill(int(pid_file.read_text()), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_run_gives_a_recorded_row_and_ends_the_endless_chat(run: Run, phone: Phone, pid_file: Path) -> None:
    (row,) = run("Hello")
    assert (row.kind, row.metric, row.value, row.unit, row.verdict) == ("recorded", "decode", 8.0, "tok/s", None)
    assert (row.hardware, row.backend, row.model, row.scheme) == (
        "snapdragon865",
        "faster-rwkv",
        "1b5-world",
        "ncnn int4",
    )
    assert (row.scheme_class, row.threads, row.workload) == ("int4", 4, None)
    assert row.reason is not None
    assert row.reason.startswith("printed by faster-rwkv; parity unknown")
    assert row.extra["printed"]["tokens"] == 20
    assert row.hardware_detail == {
        "name": "a ro.product.model",
        "soc": "a ro.board.platform",
        "android": "a ro.build.version.release",
    }
    assert ended(pid_file)
    assert left_on(phone) == PUSHED


def test_what_is_there_already_is_not_pushed_again(run: Run, phone: Phone, tmp_path: Path) -> None:
    log = tmp_path / "adb.log"
    run("Hello")
    first = log.read_text().count(" push ")
    run("Hello")
    assert (first, log.read_text().count(" push ") - first) == (6, 1)  # the prompt only
    Path(phone.folder, "rwkv-4-1b5.bin").write_bytes(b"wEights " * 100)  # same size, another content
    run("Hello")
    assert log.read_text().count(" push ") - first == 3
    assert Path(phone.folder, "rwkv-4-1b5.bin").read_bytes() == b"weights " * 100


def test_generation_that_is_stuck_is_a_timeout(run: Run, phone: Phone, pid_file: Path) -> None:
    (row,) = run("stuck", timeout=1.5)
    assert (row.kind, row.verdict, row.value) == ("recorded", "TIMEOUT", None)
    assert row.reason == "printed nothing for 1.5 s; its last words: User: Assistant: token0 token1 token2"
    assert ended(pid_file)
    assert left_on(phone) == PUSHED


def test_slow_tokens_are_not_a_timeout(run: Run) -> None:
    began = time.monotonic()
    (row,) = run("slow", tokens=8, timeout=1.5)
    assert row.value == 8.0
    assert time.monotonic() - began > 1.5


@pytest.mark.parametrize(
    ("prompt", "verdict", "reason"),
    [
        ("crash", "CRASHED", "ended by SIGSEGV; its last words: "),
        (
            "quit",
            "CRASHED",
            "ended with status 3; its last words: User: Assistant:RV_CHECK failed: unsupported strategy",
        ),
        ("garbage", "CRASHED", "ended without a speed as faster-rwkv prints it; its last words: "),
        ("flood", "CRASHED", "printed more than 16 MiB without telling its speed; its last words: xxx"),
    ],
)
def test_a_bad_end_is_a_row_with_the_last_words(
    run: Run, phone: Phone, pid_file: Path, prompt: str, verdict: str, reason: str
) -> None:
    (row,) = run(prompt)
    assert row.verdict == verdict
    assert row.reason is not None
    assert row.reason.startswith(reason)
    assert ended(pid_file)
    assert left_on(phone) == PUSHED


def test_what_a_program_says_before_it_dies_is_kept(run: Run) -> None:
    (row,) = run("crash")
    assert row.reason is not None
    assert "one two three" in row.reason
    assert "ncnn: cannot allocate" in row.reason


def test_a_phone_that_vanishes_while_it_runs_is_a_crash(run: Run, pid_file: Path) -> None:
    try:
        (row,) = run("stuck", mode="vanish")
        assert row.verdict == "CRASHED"
        assert row.reason is not None
        assert row.reason.startswith("the phone went away while it ran (adb ended with 1); its last words: ")
        assert "error: closed" in row.reason
    finally:
        os.kill(int(pid_file.read_text()), 9)  # out of reach for the harness, as on a real phone


def test_an_interrupted_run_leaves_nothing_running(run: Run, phone: Phone, pid_file: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 6)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("stuck", timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended(pid_file)
    assert left_on(phone) == PUSHED
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("offline", "phone 8ac9f34e is offline (error: device offline); plug it in again or run `adb reconnect`"),
        (
            "unauthorized",
            "does not trust this computer (error: device unauthorized.); accept the question on its screen",
        ),
        ("recovery", "phone 8ac9f34e is in state 'recovery'; start Android on it and unlock it"),
        ("full", "is full (adb: error: failed to copy"),
    ],
)
def test_a_phone_that_cannot_be_used_is_told_in_one_line(run: Run, mode: str, told: str) -> None:
    with pytest.raises(Unavailable) as error:
        run("Hello", mode=mode)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_serial_and_no_adb_at_all(
    run: Run, phone: Phone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable, match=r"phone nope is not there .*`adb devices` lists serials"):
        run("Hello", on=replace(phone, adb="nope"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="adb is not on the PATH; install Android's platform-tools"):
        run("Hello")


def test_files_and_prompts_that_cannot_be(run: Run, phone: Phone) -> None:
    with pytest.raises(InputError, match="no such file; the inventory names it"):
        run("Hello", on=replace(phone, tokenizer=phone.binary.with_name("absent")))
    with pytest.raises(InputError, match="reads one line"):
        run("two\nlines")
    with pytest.raises(InputError, match="the prompt is empty"):
        run(" \n")
    with pytest.raises(InputError, match=r"no such model file, and no absent\.param"):
        run_on_phone(phone, phone.binary.with_name("absent"), "ncnn int4", "Hello", 5, 5, print)


def test_another_program_with_its_own_arguments(run: Run, phone: Phone, tmp_path: Path) -> None:
    """What a user builds around rwkv.cpp: text as an argument, figures as llama-bench prints them."""
    binary = phone.binary.with_name("bench it")
    binary.write_text(
        "#!/bin/sh\nread line\n"
        '[ "$line" = "it\'s \\$HOME" ] && [ "$1" = "$line" ] && [ "$KEY" = \'a b 7\' ] || exit 9\n'
        "echo '| model | threads | test | t/s |'\necho '|---|---|---|---|'\n"
        "echo '| rwkv4 1B5 Q4_0 | 4 | pp512 | 95.5 ± 0.2 |'\n"
        "echo '| rwkv4 1B5 Q4_0 | 4 | tg128 @ d512 | 12.5 ± 0.1 |'\n"
    )
    other = replace(
        phone,
        binary=binary,
        kind="rwkv.cpp",
        prints="llama-bench",
        arguments=("{prompt}", "{model}"),
        environment={"KEY": "a b {decode_tokens}"},
    )
    rows = run("it's $HOME", tokens=7, on=other)
    assert [(row.backend, row.metric, row.value, row.threads) for row in rows] == [
        ("rwkv.cpp", "prefill", 95.5, 4),
        ("rwkv.cpp", "decode", 12.5, 4),
    ]
    assert [row.workload for row in rows] == [Workload(512, 0), Workload(512, 128)]
    assert left_on(phone) == ["bench it", *PUSHED[1:]]


def test_the_command_line_runs_a_phone(
    phone: Phone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., Done]
) -> None:
    """``--hardware PHONE``: recorded rows, stored and printed as such; a stuck program is 4."""
    install(tmp_path, monkeypatch)
    inventory = tmp_path / "rwkv-bench.toml"
    inventory.write_text(
        f'[phones.mi10]\nadb = "{SERIAL}"\nhardware = "snapdragon865"\nkind = "faster-rwkv"\n'
        f'binary = "{phone.binary}"\ntokenizer = "{phone.tokenizer}"\nfolder = "{phone.folder}"\n'
    )
    monkeypatch.setenv("RWKV_BENCH_INVENTORY", str(inventory))
    model = str(phone.binary.parent / "rwkv-4-1b5.param")
    words = ("--hardware", "mi10", "--quant", "ncnn fp16", "--decode-tokens", "8", "--timeout", "5")
    done = bench("--model", model, *words)
    assert done.code == 0, done.err
    assert "recorded figures" in done.out
    assert "8.00 tok/s" in done.out
    monkeypatch.setattr("harness.phone_runs.PROMPT", "stuck")
    done = bench("--model", model, *words[:-1], "2")
    assert done.code == 4
    assert "TIMEOUT" in done.out + done.err
    done = bench("--hardware", "mi10,cpu", "--quant", "ncnn fp16")
    assert (done.code, "name phones alone" in done.err) == (2, True)
    done = bench("--hardware", "mi1O", "--quant", "fp16")
    assert (done.code, "did you mean 'mi10'" in done.err) == (2, True)
