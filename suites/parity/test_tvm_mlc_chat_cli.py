"""The ``mlc-chat`` backend with a stand-in for its program: what is asked, what is answered, what is recorded."""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from backends import mlc_chat_cli as backend
from backends.api import Unavailable, Unsupported
from harness.cli import main
from harness.conversation import Conversing, ask, recorded, unheard
from harness.store import read
from reference.config import Config
from reference.errors import CheckpointError, InputError
from reference.synthetic import synthetic

#: Prints as cpp/cli_main.cc does: nothing of what it reads, a prompt before every line it reads.
STAND_IN = """#!{python}
import json, os, sys
options = {options!r}
if "--help" in sys.argv:
    print("Usage: mlc_chat_cli [options]\\n" + " ".join(options))
    sys.exit(0)
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert list(given) == options, given
json.dump(given, open({told!r}, "w"))
{first}
print("You can use the following special commands:\\n  /help               print the special commands\\n")
print("Loading model...\\nLoading finished\\nRunning system prompts...\\nSystem prompts finished", flush=True)
while True:
    print("User: ", end="", flush=True)
    line = sys.stdin.readline().rstrip("\\n")
    if line == "/exit":
        break
    print({stats!r} if line == "/stats" else "Bot: You said: " + line + "\\nTwice.", flush=True)
"""

OLD = ["--local-id", "--artifact-path", "--device-name"]
NEW = ["--model", "--model-lib-path", "--device"]
STATS = "prefill: 362.7 tok/s, decode: 72.4 tok/s"
VERBOSE = "---- prefill ----\nthroughput: 216.6 tok/s\n---- decode ----\nthroughput: 31.5 tok/s\n"


def stand_in(folder: Path, options: list[str], stats: str = STATS, first: str = "") -> Path:
    path = folder / "mlc_chat_cli"
    told = str(folder / "told.json")
    path.write_text(STAND_IN.format(python=sys.executable, options=options, told=told, stats=stats, first=first))
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder alone on the path, and a library's folder in it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    params = tmp_path / "rwkv-3b-q4f16_1" / "params"
    params.mkdir(parents=True)
    (params / "mlc-chat-config.json").write_text(json.dumps({"local_id": "rwkv-3b-q4f16_1"}))
    (params.parent / "rwkv-3b-q4f16_1-cuda.so").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("options", [OLD, NEW])
@pytest.mark.parametrize("stats", [STATS, VERBOSE])
def test_a_conversation(options: list[str], stats: str, place: Path) -> None:
    stand_in(place, options, stats)
    folder = place / "rwkv-3b-q4f16_1"
    answer, printed = backend.converse(str(folder), "What is this?", "cuda", 60)
    assert answer == "You said: What is this?\nTwice."
    assert printed == stats.strip()
    old = {"--local-id": "rwkv-3b-q4f16_1", "--artifact-path": str(place), "--device-name": "cuda"}
    new = {"--model": str(folder / "params"), "--model-lib-path": str(folder / "rwkv-3b-q4f16_1-cuda.so")}
    assert json.loads((place / "told.json").read_text()) == (old if options is OLD else {**new, "--device": "cuda"})


def test_nothing_of_it_is_left_running(place: Path) -> None:
    """Neither what it has started, where it hangs, nor itself, where it hangs before it is asked anything."""
    started = place / "started"
    sleeper = f"[{sys.executable!r}, '-c', 'import time; time.sleep(600)']"
    child = f"import subprocess, time; p = subprocess.Popen({sleeper}); open({str(started)!r}, 'w').write(str(p.pid))"
    stand_in(place, NEW, first=f"{child}; time.sleep(600)")
    with pytest.raises(RuntimeError, match="not done after 2 s"):
        backend.converse(str(place / "rwkv-3b-q4f16_1"), "hello", "cuda", 2)
    for _ in range(100):
        if not psutil.pid_exists(number := int(started.read_text())) or psutil.Process(number).status() == "zombie":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what it has started still runs")
    (place / "mlc_chat_cli").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    with pytest.raises(RuntimeError, match=r"not done after 0\.5 s"):
        backend.converse(str(place / "rwkv-3b-q4f16_1"), "hello", "cuda", 0.5)
    (place / "mlc_chat_cli").write_bytes(b"\x7fELF not a program")
    with pytest.raises(RuntimeError, match="cannot be started"):
        backend.converse(str(place / "rwkv-3b-q4f16_1"), "hello", "cuda", 60)


class Other:
    """A backend of somebody else's that talks."""

    INFO = replace(backend.INFO, name="other-chat")

    def converse(self, folder: str, prompt: str, device: str, seconds: float) -> tuple[str, str]:
        return "yes", STATS


def test_a_backend_of_somebody_elses(place: Path) -> None:
    """It names what reads its speeds; where nothing does, that is said before it runs."""
    given = Namespace(model=str(place), quant="q4f16_1", device="cuda", backend="other.py")
    with pytest.raises(InputError, match="other-chat: no speeds of 'other-chat' can be read; its PRINTED may name"):
        ask(Other(), "hello", given)
    named = Other()
    named.PRINTED = "mlc-chat"  # type: ignore[attr-defined]
    answer, rows = ask(named, "hello", given)
    assert (answer, [row.value for row in rows]) == ("yes", [362.7, 72.4])
    assert {row.backend for row in rows} == {"other-chat"}
    assert unheard(named) == "other-chat samples by itself: --tokens, --temperature, --top-p, --seed do not apply to it"


def test_its_figures_are_recorded_ones() -> None:
    assert isinstance(backend, Conversing)
    rows = recorded(STATS, "mlc-chat", {"model": "3b", "scheme": "q4f16_1", "hardware": "a800", "device": "cuda"})
    assert [(row.metric, row.value, row.unit) for row in rows] == [
        ("prefill", 362.7, "tok/s"),
        ("decode", 72.4, "tok/s"),
    ]
    assert {row.kind for row in rows} == {"recorded"}
    assert {row.verdict for row in rows} == {None}
    assert {row.scheme_class for row in rows} == {"int4"}
    assert all("parity unknown" in (row.reason or "") for row in rows)
    assert recorded("no speeds", "mlc-chat", {"model": "3b", "scheme": "q4f16_1", "hardware": "a800"}) == []


def test_it_is_never_judged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not there, named and not there, there: no session in any case, and what to do instead."""
    with pytest.raises(Unavailable, match="no mlc_chat_cli is here; put mlc_chat_cli on the path"):
        backend.check()
    monkeypatch.setenv(backend.VARIABLE, str(place / "gone"))
    with pytest.raises(Unavailable, match=r"names .*gone, which is no program"):
        backend.check()
    monkeypatch.setenv(backend.VARIABLE, str(stand_in(place, NEW)))
    with pytest.raises(Unavailable, match="text and speeds but no logits to judge; talk to it with"):
        backend.load(synthetic(Config(1, 32, 64, 10), 0), "q4f16_1", "cuda", None)


def test_what_it_cannot_be_asked(place: Path) -> None:
    stand_in(place, OLD)
    folder = str(place / "rwkv-3b-q4f16_1")
    for prompt in ("", "two\nlines", "/reset"):
        with pytest.raises(InputError, match="one line that is no command"):
            backend.converse(folder, prompt, "cuda", 60)
    with pytest.raises(Unsupported, match=r"runs on cuda, metal, .* not on cpu"):
        backend.converse(folder, "hello", "cpu", 60)
    with pytest.raises(CheckpointError, match="No such file"):
        backend.converse(str(place / "gone"), "hello", "cuda", 60)
    (place / "rwkv-3b-q4f16_1").rename(place / "renamed")
    with pytest.raises(CheckpointError, match="by its name, which must be rwkv-3b-q4f16_1"):
        backend.converse(str(place / "renamed"), "hello", "cuda", 60)
    stand_in(place, NEW)
    (place / "renamed" / "other.so").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds 2 libraries"):
        backend.converse(str(place / "renamed"), "hello", "cuda", 60)
    (place / "renamed" / "params" / "mlc-chat-config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not the configuration of a chat"):
        backend.converse(str(place / "renamed"), "hello", "cuda", 60)


@pytest.mark.parametrize(
    ("first", "seconds", "said"),
    [
        ("sys.exit('CUDA: out of memory')", 60.0, "ended with 1: CUDA: out of memory"),
        ("import time; time.sleep(60)", 1.0, "not done after 1 s"),
        ("print('something else'); sys.exit(0)", 60.0, "no conversation as it is known; last: something else"),
        ("sys.exit(0)", 60.0, "no conversation as it is known"),
    ],
)
def test_a_program_that_fails(first: str, seconds: float, said: str, place: Path) -> None:
    stand_in(place, NEW, first=first)
    with pytest.raises(RuntimeError, match=said) as raised:
        backend.converse(str(place / "rwkv-3b-q4f16_1"), "hello", "cuda", seconds)
    assert "\n" not in str(raised.value)


def test_generate_shows_its_answer_and_records_its_figures(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    stand_in(place, NEW)
    asked = ["generate", "--backend", "mlc-chat", "--model", str(place / "rwkv-3b-q4f16_1"), "--device", "cuda"]
    assert main([*asked, "What is this?"]) == 2
    assert "--quant: what" in capsys.readouterr().err
    assert main([*asked, "--quant", "q4f16_1", "What is this?"]) == 0
    said, told = capsys.readouterr()
    assert said == "You said: What is this?\nTwice.\n"
    assert "mlc-chat q4f16_1: decode 72.4 tok/s, as it printed it (parity unknown)" in told
    rows = read(place / "state" / "rwkv-bench" / "rows.jsonl")
    assert [(row.kind, row.metric, row.value) for row in rows] == [
        ("recorded", "prefill", 362.7),
        ("recorded", "decode", 72.4),
    ]
    assert {row.model for row in rows} == {"rwkv-3b-q4f16_1"}
    command = str(rows[0].command)
    assert shlex.split(command)[-2:] == ["--", "What is this?"]
    monkeypatch.chdir(place / "rwkv-3b-q4f16_1")
    assert main([*shlex.split(command.replace(asked[4], "."))[1:]]) == 0
    assert {row.model for row in read(place / "state" / "rwkv-bench" / "rows.jsonl")} == {"rwkv-3b-q4f16_1"}
    stand_in(place, NEW, first="sys.exit('CUDA: out of memory')")
    assert main([*asked, "--quant", "q4f16_1", "What is this?"]) == 4
    assert "ended with 1: CUDA: out of memory" in capsys.readouterr().err
