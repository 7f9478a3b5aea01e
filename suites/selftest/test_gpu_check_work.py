"""gpu-check: what becomes of each command, budgets and device memory; commands are stand-ins that print rows."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.card import Card, Process
from harness.gpu_check import record, work
from harness.gpu_check.steps import LINES, LOCALIZED, ROWS, Command, Step
from harness.rows import Row, line
from suites.selftest.gpu_setting import H200, measured


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "card_of", lambda device: None)


def ran(code: str, monkeypatch: pytest.MonkeyPatch, kind: str = LINES, seconds: float | None = None) -> list[Row]:
    """The rows of one command that is this Python code, with the row's store, if any, as its first argument."""

    def argv(command: Command, store: Path | None) -> list[str]:
        return [sys.executable, "-c", code, str(store)]

    monkeypatch.setattr(work, "argv", argv)
    command = Command(kind, ("--device", "cuda:0"), "torch", "fp16", "tiny", {}, "blocks.4.ffn.k2")
    rows: list[Row] = []
    work.run([Step("s", "w", 1, (command,))], work.Job("run", H200, seconds, {"rehearsal": False}), rows.append, print)
    return rows


def test_rows_are_recorded_with_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = ran(f"print({line(measured(verdict='PASS', value=1.0))!r})", monkeypatch)
    assert (row.kind, row.verdict, row.value) == ("recorded", "PASS", 1.0)
    assert row.extra["gpu_check"] == {"step": "s", "rehearsal": False}


def test_rows_of_a_store_survive_a_command_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = line(measured(verdict="PASS", value=1.0))
    code = f"import os, sys; open(sys.argv[1], 'w').write({text!r}); os.kill(os.getpid(), 9)"
    kept, failed = ran(code, monkeypatch, ROWS)
    assert (kept.verdict, failed.verdict) == ("PASS", "CRASHED")
    assert str(failed.reason).startswith("killed by SIGKILL")
    assert "--device cuda:0" in str(failed.command)


@pytest.mark.parametrize(
    ("code", "verdict", "said"),
    [
        ("import sys; sys.exit('rwkv-bench: no such thing')", "CRASHED", "exit status 1: rwkv-bench: no such thing"),
        ("import sys; print('not here', file=sys.stderr); sys.exit(3)", "UNAVAILABLE", "exit status 3: not here"),
        ("print('{')", "CRASHED", "its rows cannot be read"),
        ('print(\'{"kind": "measured"}\')', "CRASHED", "its rows cannot be read: row: field 'hardware' is missing"),
        ("pass", "CRASHED", "exit status 0: it said nothing"),
    ],
)
def test_a_failure_is_a_row(code: str, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ran(code, monkeypatch)[0]
    assert (row.verdict, row.backend, row.hardware, row.kind) == (verdict, "torch", "h200", "recorded")
    assert str(row.reason).startswith(said)


@pytest.mark.parametrize(
    ("row", "status", "added"),
    [
        ("PASS", 1, "CRASHED"),  # by an exception
        ("PASS", 2, "CRASHED"),
        ("PASS", 3, "UNAVAILABLE"),
        ("PASS", 4, "CRASHED"),
        ("FAIL", 4, "CRASHED"),
        ("CRASHED", 1, "CRASHED"),
        ("FAIL", 1, None),
        ("UNAVAILABLE", 3, None),
        ("UNAVAILABLE", 0, None),
        ("TIMEOUT", 4, None),
    ],
)
@pytest.mark.parametrize("kind", [LINES, ROWS])
def test_a_status_that_no_row_accounts_for_is_a_row(
    row: str, status: int, added: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = line(measured(verdict=row))
    said = f"print({text!r})" if kind == LINES else f"open(sys.argv[1], 'w').write({text!r})"
    rows = ran(f"import sys; {said}; print('last words', file=sys.stderr); sys.exit({status})", monkeypatch, kind)
    assert [it.verdict for it in rows] == [row, *([added] if added else [])]
    if added:
        assert rows[1].reason == f"exit status {status}: last words"


def test_every_row_has_its_command_and_the_card_as_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Process(4711, "/usr/bin/trainer", 1 << 30)
    card = Card(0, "u", "H200", 100 << 30, None, 1980, None, "570", (other,))
    monkeypatch.setattr(work, "card_of", lambda device: card)
    finding = json.dumps({"verdict": "non-finite", "point": "blocks.4.ffn.k2", "cause": "c", "token_index": 8})
    of = [ran(f"print({line(measured(verdict='PASS', value=1.0))!r})", monkeypatch)[0]]
    of += [ran(f"print({finding!r})", monkeypatch, LOCALIZED)[0], ran("import sys; sys.exit('no')", monkeypatch)[0]]
    for row in of:
        assert "--device cuda:0" in str(row.command)
        detail = row.hardware_detail or {}
        assert (detail["free_bytes_before"], detail["clock_mhz"], detail["driver"]) == (100 << 30, 1980, "570")
        assert detail["other_processes"] == ["trainer (pid 4711, 1.0 GiB)"]
    own = ran(f"print({line(measured(verdict='PASS', command='c', hardware_detail={'driver': '1'}))!r})", monkeypatch)[
        0
    ]
    assert (own.command, (own.hardware_detail or {})["driver"]) == ("c", "1")


@pytest.mark.parametrize(
    ("verdict", "point", "right"),
    [
        ("non-finite", "blocks.4.ffn.k2", True),
        ("non-finite", "blocks.5.ffn.k2", False),
        ("diverged", "blocks.4.ffn.k2", False),
        ("clean", None, False),
    ],
)
def test_a_localization_is_held_against_what_was_planted(
    verdict: str, point: str | None, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = json.dumps({"verdict": verdict, "point": point, "cause": "c", "token_index": 8})
    (row,) = ran(f"import sys; print({finding!r}); sys.exit({int(verdict != 'clean')})", monkeypatch, LOCALIZED)
    assert row.verdict == ("PASS" if right else "FAIL")
    assert right or "where non-finite at blocks.4.ffn.k2 was planted" in str(row.reason)


def test_what_outlasts_the_budget_is_ended_with_all_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(work, "LEAST_SECONDS", 0.0)
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    (row,) = ran(code, monkeypatch, seconds=3.0)
    assert row.verdict == "TIMEOUT"
    assert "when the budget was spent" in str(row.reason)
    if pid.exists():
        for _ in range(50):
            if not _lives(int(pid.read_text())):
                break
            time.sleep(0.1)
        assert not _lives(int(pid.read_text()))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return (
            f"{pid} (" in Path(f"/proc/{pid}/stat").read_text() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()
        )
    except OSError:
        return False


def test_nothing_is_begun_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "answered", lambda *told: pytest.fail("begun"))
    times = iter([0.0, 56.0, 60.0])
    command = Command(ROWS, ("parity",), "torch", "fp16", "tiny")
    rows: list[Row] = []
    job = work.Job("run", H200, 60.0, {})
    work.run([Step("parity", "w", 1, (command, command))], job, rows.append, print, lambda: next(times))
    assert [row.verdict for row in rows] == ["UNAVAILABLE"] * 2
    assert rows[0].reason == "not run: the budget of 60 s is spent; --only parity runs it"


def test_device_memory_that_is_kept_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([100 << 30, 99 << 30])
    monkeypatch.setattr(work, "card_of", lambda device: Card(0, "u", "H200", next(free), None, None, None, "570"))
    kept, failed = ran(f"print({line(measured(verdict='PASS', value=1.0))!r})", monkeypatch)
    assert (kept.verdict, failed.verdict) == ("PASS", "FAIL")
    assert failed.reason == "1024 MiB of device memory were not given back"
    small = Card(0, "u", "H200", (100 << 30) - (10 << 20), None, None, None, "570")
    assert record.not_given_back(Card(0, "u", "H200", 100 << 30, None, None, None, "570"), small) is None
    assert record.not_given_back(None, small) is None


def test_device_memory_that_others_may_have_taken_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Process(4711, "/usr/bin/trainer", 1 << 30)
    before = Card(0, "u", "H200", 100 << 30, None, None, None, "570")
    cards = iter([before, replace(before, free_bytes=99 << 30, others=(other,))])
    monkeypatch.setattr(work, "card_of", lambda device: next(cards))
    (kept,) = ran(f"print({line(measured(verdict='PASS', value=1.0))!r})", monkeypatch)
    assert kept.verdict == "PASS"
    note = "1024 MiB of device memory were not given back, which may be theirs: the card is shared with trainer"
    assert str(kept.extra["device_memory"]).startswith(note)
