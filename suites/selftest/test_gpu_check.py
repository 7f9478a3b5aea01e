"""gpu-check: the list, what becomes of each command, budgets, refusals; commands are stand-ins that print rows."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import command_gpu_check, recorded
from harness.card import Card, Process
from harness.cli import main
from harness.gpu_check import ablate, record, work
from harness.gpu_check.overflow import point_of, write_overflowing
from harness.gpu_check.ratios import ratios
from harness.gpu_check.steps import LINES, LOCALIZED, REHEARSED_SHAPE, ROWS, Command, Offer, Setting, Step, steps
from harness.hardware import Hardware
from harness.rows import Row, line
from harness.samples import Workload
from harness.store import read
from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.forward import forward
from reference.synthetic import synthetic

H200 = Hardware("h200", "cuda:0", "NVIDIA H200")
OFFERS = (
    Offer("torch", ("fp32", "fp16", "bf16"), ("fp16", "bf16")),
    Offer("triton", ("fp16", "q4f16_1", "q0f16"), ("q0f16", "fp16", "q4f16_1")),
    Offer("rwkv", ("fp32", "fp16", "fp16i8"), ("fp16", "fp16i8")),
)
SETTING = Setting("cuda:0", OFFERS, ("169m", "7b-world"), "tiny", "overflow.safetensors", "blocks.4.ffn.k2")


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "card_of", lambda device: None)


# --- the list


def test_the_list_has_all_that_needs_a_gpu() -> None:
    found = {step.name: step for step in steps(SETTING)}
    assert list(found) == ["parity", "localize", "throughput-169m", "throughput-7b-world", "wkv", "ablation"]
    assert [(c.backend, c.scheme) for c in found["parity"].commands] == [
        ("torch", "fp32,fp16,bf16"),
        ("triton", "fp16,q4f16_1,q0f16"),
        ("rwkv", "fp32,fp16,fp16i8"),
    ]
    planted = {(c.backend, c.scheme): c.expected for c in found["localize"].commands}
    point = "blocks.4.ffn.k2"
    assert planted == {
        ("torch", "fp16"): point,
        ("triton", "fp16"): None,  # its stream and its squares are float32
        ("triton", "q0f16"): point,
        ("rwkv", "fp16"): point,  # rescales its stream, and squares in fp16 first
    }
    timed = {(c.backend, c.scheme) for c in found["throughput-7b-world"].commands}
    assert timed == {("triton", "q0f16,fp16,q4f16_1"), ("torch", "fp16"), ("rwkv", "fp16")}
    assert ("torch", "fp16,bf16") in {(c.backend, c.scheme) for c in found["throughput-169m"].commands}
    assert {c.words[c.words.index("--prompt-tokens") + 1] for c in found["throughput-169m"].commands} == {"512", "2048"}
    assert [c.backend for c in found["wkv"].commands] == ["triton", "fla"]
    ablated = [" ".join(c.words) for c in found["ablation"].commands if c.backend == "triton"]
    for scheme, changed in (("fp16", ""), ("fp16", "--driver loop "), ("q0f16", ""), ("q0f16", "--rescale-every 6 ")):
        what = f"--backend triton --quant {scheme} --device cuda:0 {changed}--decode-tokens"
        assert sum(what in words for words in ablated) == 1, what


def test_no_command_comes_twice() -> None:
    for setting in (SETTING, replace(SETTING, device="cpu", rehearsal=True)):
        every = [command.words for step in steps(setting) for command in step.commands]
        assert len(set(every)) == len(every)


def test_any_number_of_models_is_timed_and_larger_ones_are_said_to_take_longer() -> None:
    sizes = {"169m": 169_000_000, "1b5": 1_500_000_000, "3b": 3_000_000_000, "7b": 7_400_000_000, "14b": 14_000_000_000}
    found = [s for s in steps(replace(SETTING, models=tuple(sizes), parameters=sizes)) if s.name.startswith("through")]
    assert [s.name for s in found] == [f"throughput-{name}" for name in sizes]
    assert [s.seconds for s in found] == sorted({s.seconds for s in found})


def test_wkv_is_a_step_of_the_backend_whose_kernel_it_is() -> None:
    found = {step.name: step for step in steps(replace(SETTING, offers=OFFERS[:1]))}
    assert found["wkv"].commands == ()


def test_every_command_names_the_device_and_a_rehearsal_interprets() -> None:
    for rehearsal, device in ((False, "cuda:0"), (True, "cpu")):
        setting = Setting(device, OFFERS, ("tiny",), "tiny", "o.safetensors", "p", rehearsal)
        for command in (command for step in steps(setting) for command in step.commands):
            assert command.words[command.words.index("--device") + 1] == device
            assert command.environment == ({"TRITON_INTERPRET": "1"} if rehearsal else {})


def test_a_rehearsal_has_the_same_steps() -> None:
    setting = Setting("cpu", OFFERS, ("tiny",), "tiny", "o.safetensors", "p", True)
    assert [s.name.partition("-")[0] for s in steps(setting)] == [
        s.name.partition("-")[0] for s in steps(SETTING) if s.name != "throughput-7b-world"
    ]


def test_the_planted_overflow_is_beyond_fp16_and_nothing_else_is(tmp_path: Path) -> None:
    from harness.models import gate_tokens, open_model

    file = tmp_path / "overflow.safetensors"
    write_overflowing("tiny", file)
    weights, model = load_checkpoint(file), open_model("tiny")
    tokens, seen = gate_tokens(model, 48), dict[str, float]()
    logits, _ = forward(weights, tokens, tap=lambda name, x: seen.__setitem__(name, float(abs(x).max())))
    over = [name for name, largest in seen.items() if largest > 65504]
    assert over == [point_of(model.config)] == ["blocks.4.ffn.k2"]
    expected, _ = forward(model.weights, tokens)
    assert abs(logits - expected).max() < 1e-3 * expected.std()


# --- what becomes of a command


def measured(**more: Any) -> Row:
    about = {"hardware": "h200", "backend": "torch", "model": "tiny", "scheme": "fp16", "metric": "parity"}
    return Row(kind="measured", run="r", time="2026-11-21T00:00:00+00:00", **{**about, "reason": "x", **more})


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


# --- the command


def test_without_a_gpu_it_says_so_and_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.hardware.local_hardware", lambda: (Hardware("cpu", "cpu", "x"),))
    assert main(["gpu-check", "--output", str(tmp_path / "out")]) == 3
    assert "there is no GPU here" in (said := capsys.readouterr().err)
    assert "--rehearse runs the same list on the CPU" in said
    assert not (tmp_path / "out").exists()
    assert main(["gpu-check", "--device", "cuda:5"]) == 3
    assert "there is no cuda:5 here; this machine has cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "thruput-169m"], "no step 'thruput-169m'; did you mean 'throughput-169m'? steps: parity, localize"),
        (["--backend", "numpy"], "numpy does not run on cuda"),
        (["--backend", "torhc"], "did you mean 'torch'"),
        (["--budget", "0"], "--budget is 0; seconds above 0 are needed"),
        (["--budget", "nan"], "--budget is nan"),
        (["--model", "1b5,7b-wrold"], "no model '7b-wrold'; did you mean '7b-world'?"),
        (["--model", "no/such.safetensors"], "no/such.safetensors"),
        (["--rehearse", "--device", "cuda:7"], "--rehearse is on the CPU, with a tiny model of its own; leave out --d"),
        (["--rehearse", "--model", "169m"], "leave out --model"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.hardware.local_hardware", lambda: (Hardware("cpu", "cpu", "x"), H200))
    assert main(["gpu-check", "--list", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_the_steps_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("harness.hardware.local_hardware", lambda: (Hardware("cpu", "cpu", "x"), H200))
    assert main(["gpu-check", "--list", "--only", "throughput"]) == 0
    names = [row.split()[0] for row in capsys.readouterr().out.splitlines()]
    assert names == ["throughput-169m", "throughput-1b5", "throughput-3b", "throughput-7b-world"]


def test_the_steps_are_listed_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.hardware.local_hardware", lambda: (Hardware("cpu", "cpu", "x"),))
    for words, first in ((["--only", "throughput"], "throughput-169m"), (["--device", "mps"], "parity")):
        assert main(["gpu-check", "--list", *words]) == 0
        assert capsys.readouterr().out.split()[0] == first
    assert main(["gpu-check", "--list", "--device", "cdua:0"]) == 3


def rehearsed(backends: str, verdicts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a rehearsal of parity whose commands leave one row each, of that verdict."""

    def answered(command: Command, *rest: Any) -> tuple[list[Row], None]:
        return [measured(backend=command.backend, verdict=verdicts[command.backend])], None

    monkeypatch.setattr(work, "argv", lambda command, store: [sys.executable, "-c", ""])
    monkeypatch.setattr(work, "_measured", answered)
    return main(["gpu-check", "--rehearse", "--only", "parity", "--backend", backends, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ({"torch": "PASS", "rwkv": "PASS"}, 0),
        ({"torch": "UNAVAILABLE", "rwkv": "UNSUPPORTED"}, 3),
        ({"torch": "PASS", "rwkv": "UNAVAILABLE"}, 3),
        ({"torch": "FAIL", "rwkv": "UNAVAILABLE"}, 1),
        ({"torch": "CRASHED", "rwkv": "UNAVAILABLE"}, 4),
    ],
)
def test_what_was_asked_for_and_did_not_run_is_status_3(
    verdicts: dict[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rehearsed(",".join(verdicts), verdicts, tmp_path, monkeypatch) == code
    said = capsys.readouterr().err
    none = not set(verdicts.values()) & {"PASS", "FAIL", "CRASHED"}
    assert ("nothing ran, so nothing was checked" in said) == none
    assert ("--backend rwkv: nothing of it ran" in said) == (verdicts["rwkv"] == "UNAVAILABLE")


def test_a_budget_in_which_nothing_begins_is_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rehearse", "--backend", "torch", "--only", "parity", "--budget", "1", "--output", str(tmp_path)]
    assert main(["gpu-check", *words]) == 3
    assert "nothing ran" in capsys.readouterr().err
    assert main(["gpu-check", "--rehearse", "--backend", "torch", "--only", "wkv", "--output", str(tmp_path)]) == 3


def test_the_rival_of_wkv_has_an_install_line_that_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'rwkv-bench[triton]'")
    from suites.throughput import compare_wkv

    monkeypatch.setattr("backends.triton_cuda.machine.installed", lambda package: "")
    assert compare_wkv.main(["--kernel", "fla", "--device", "cuda", "--tokens", "8", "--width", "32"]) == 3
    assert capsys.readouterr().err == "fla is not installed; pip install 'rwkv-bench[fla]'\n"
    root = Path(compare_wkv.__file__).parents[2]
    assert 'fla = ["fla-core' in (root / "pyproject.toml").read_text(encoding="utf-8")


def test_the_rival_of_wkv_is_judged_with_the_state_that_it_stores() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")
    pytest.importorskip("triton", reason="triton is not installed: pip install 'rwkv-bench[triton]'")
    from suites.throughput import compare_wkv

    given = compare_wkv.inputs(40, 32)
    bounds = {kernel: compare_wkv.truth_of(given, stored) for kernel, stored in compare_wkv._STATES.items()}
    y, state = (torch.from_numpy(x.astype("float16")) for x in (bounds["fla"].y, bounds["fla"].state))
    assert compare_wkv.judged((y, state), bounds["fla"], 1.0)[1] is None
    assert "aa of the state after" in str(compare_wkv.judged((y, state), bounds["triton"], 1.0)[1])
    assert "aa of the state after" in str(compare_wkv.judged((y, 1.01 * state), bounds["fla"], 1.0)[1])


# --- ratios


def speed(backend: str, scheme: str, metric: str, value: float, model: str = "7b-world", **more: Any) -> Row:
    about = {"backend": backend, "scheme": scheme, "metric": metric, "value": value, "model": model, "unit": "tok/s"}
    return measured(verdict="PASS", **{"workload": Workload(512, 128), **about, **more})


def test_ratios_to_rwkv_and_fla_are_told_with_their_bars() -> None:
    rows = [
        speed("triton", "fp16", "decode", 150.0),
        speed("triton", "q4f16_1", "decode", 300.0),
        speed("triton", "fp16", "prefill", 900.0),
        speed("triton", "fp16", "decode", 90.0, extra={"ablation": {"driver": "loop"}}),
        speed("triton", "fp16", "decode", 60.0, "169m"),
        speed("rwkv", "fp16", "decode", 50.0),
        speed("rwkv", "fp16", "prefill", 900.0),
        speed("rwkv", "fp16i8", "decode", 1.0),
        speed("rwkv", "fp16", "decode", 20.0, "169m"),
        speed("rwkv", "fp16", "decode", 1.0, workload=Workload(2048, 16)),
        *(
            speed(k, "fp16", "prefill", v, "wkv-4096", workload=Workload(512, 0))
            for k, v in (("triton", 8), ("fla", 4))
        ),
    ]
    assert [str(found) for found in ratios(rows, False)] == [
        "7b-world decode, 512 tokens: triton fp16 3.00 times rwkv fp16, the bar of 3; aimed at 5",
        "7b-world decode, 512 tokens: triton q4f16_1 6.00 times rwkv fp16",
        "7b-world prefill, 512 tokens: triton fp16 1.00 times rwkv fp16, UNDER the bar of 1.5; aimed at 2",
        "169m decode, 512 tokens: triton fp16 3.00 times rwkv fp16",
        "wkv-4096 prefill, 512 tokens: triton fp16 2.00 times fla fp16, the bar of 1.5; aimed at 4",
    ]
    assert not any(found.bar for found in ratios(rows, True))
    assert ratios([*rows[:5], replace(rows[5], verdict="FAIL")], False) == []


def test_rows_and_the_machine_are_kept_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = line(measured(verdict="PASS", value=2.0, error=1.0, bound=3.0))
    monkeypatch.setattr(work, "argv", lambda command, store: [sys.executable, "-c", f"print({text!r})"])
    monkeypatch.setattr(work, "_measured", lambda command, store, answer: ([measured(verdict="FAIL")], None))
    folder = tmp_path / "out"
    words = ["gpu-check", "--rehearse", "--backend", "torch", "--only", "parity", "--output", str(folder)]
    assert main(words) == 1
    assert main(words) == 1  # appended
    rows = read(folder / "rehearsal-cpu.jsonl")
    assert [row.verdict for row in rows] == ["FAIL", "FAIL"]
    assert rows[0].extra["gpu_check"]["rehearsal"] is True
    told = json.loads((folder / "rehearsal-cpu-profile.json").read_text())
    assert (told["hardware"], told["device"], told["rehearsal"]) == ("cpu", "cpu", True)
    assert "torch" in told["versions"]
    assert load_checkpoint(folder / "rehearsal-tiny.safetensors").config == REHEARSED_SHAPE
    said = capsys.readouterr().err
    assert "1 rows added to" in said
    assert "say nothing of a GPU" in said


def test_offers_are_of_backends_with_the_device() -> None:
    found = {offer.backend: offer for offer in command_gpu_check._offers(None, "cuda:0", False)}
    assert {"torch", "triton", "rwkv", "transformers"} <= set(found)
    assert not {"numpy", "onnx", "mlx"} & set(found)
    assert not {"mlc-chat", "faster-rwkv"} & set(found), "programs of the user's that are not here"
    assert [offer.backend for offer in command_gpu_check._offers(["mlc-chat"], "cuda:0", False)] == ["mlc-chat"]
    assert found["torch"].timed == ("fp16", "bf16")
    apple = {offer.backend: offer for offer in command_gpu_check._offers(None, "mps", False)}
    assert set(apple) == {"torch", "mlx"}
    assert apple["mlx"].timed == ("fp16", "bf16", "4bit", "8bit")


@pytest.mark.parametrize(
    ("words", "driver", "rescaled"), [(["--driver", "loop"], "loop", 0), (["--rescale-every", "1"], "greedy", 1)]
)
def test_an_ablation_is_judged_and_says_what_was_changed(
    words: list[str], driver: str, rescaled: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'rwkv-bench[torch]'")
    file = tmp_path / "small.safetensors"
    save_checkpoint(synthetic(REHEARSED_SHAPE, 1), file, "safetensors", "fp32")
    about = ["--model", str(file), "--backend", "torch", "--quant", "fp16", "--device", "cpu", "--decode-tokens", "2"]
    assert ablate.main([*about, *words]) == 0
    row = Row.from_dict({k: v for k, v in json.loads(capsys.readouterr().out).items() if k != "schema"})
    assert (row.metric, row.verdict, row.driver) == ("decode", "PASS", driver)
    assert row.value is not None
    assert row.extra["ablation"].get("rescale_every", 0) == rescaled
    assert ("rescale_every 1" in str(row.arithmetic)) == bool(rescaled)


def test_an_ablation_that_is_not_to_be_had_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    about = ["--model", "tiny", "--backend", "numpy", "--quant", "fp32", "--device", "cpu", "--rescale-every", "2"]
    assert ablate.main(about) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_committed_rows_are_recorded_rows_and_a_rehearsals_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "COMMITTED", tmp_path)
    row = measured(verdict="PASS", value=1.0)
    for number, rehearsal in enumerate((False, True)):
        kept = record.kept(replace(row, run=f"r{number}"), "parity", {"rehearsal": rehearsal})
        record.append(tmp_path / "h200.jsonl", kept)
    found = recorded.recorded_rows(tmp_path / "no-store.jsonl", "h200")
    assert [it.run for it in found] == ["r0"]
    assert recorded.recorded_rows(tmp_path / "no-store.jsonl", "a800") == []


def test_what_is_committed_can_be_read_and_names_its_driver() -> None:
    """Of every file under reports/recorded: whole rows of one hardware, none of them a rehearsal's."""
    for file in sorted(recorded.COMMITTED.glob("*.jsonl")):
        rows = read(file)
        assert {row.hardware for row in rows} == {file.stem}
        assert all(row.kind == "recorded" and row.time for row in rows)
        assert not any(row.extra["gpu_check"]["rehearsal"] for row in rows)
        timed = [row for row in rows if row.value is not None and row.metric in ("prefill", "decode")]
        assert all((row.hardware_detail or {}).get("driver") for row in timed if (row.device or "").startswith("cuda"))
