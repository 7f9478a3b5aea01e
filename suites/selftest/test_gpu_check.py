"""gpu-check: the command, its refusals, ratios to rivals, what is kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import command_gpu_check, recorded
from harness.cli import main
from harness.gpu_check import ablate, record, work
from harness.gpu_check.ratios import ratios
from harness.gpu_check.steps import REHEARSED_SHAPE, Command
from harness.hardware import Hardware
from harness.rows import Row, line
from harness.samples import Workload
from harness.store import read
from reference.checkpoint import load_checkpoint, save_checkpoint
from reference.synthetic import synthetic
from suites.selftest.gpu_setting import H200, measured


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "card_of", lambda device: None)


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
