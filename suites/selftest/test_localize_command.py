"""``rwkv-bench localize``: the report, its JSON, and backends that die or declare while the command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from harness.localize.finding import (
    CLEAN,
)
from harness.localize.report import as_json, as_text
from suites.selftest.conftest import Done
from suites.selftest.wrong_backends import (
    FAULTS,
    FP16,
    LOUD,
    TOKENS,
    Traced,
    found,
)

ABOUT = {"backend": "x", "scheme": "fp16", "device": "cpu", "model": "m", "prompt_tokens": 40}


def test_the_report_fits_a_terminal_and_the_json_is_the_design_s() -> None:
    finding = found(lambda weights: Traced(weights, {}, FP16), FP16, LOUD)
    text = as_text(finding, ABOUT, "a" * 300)
    assert max(len(line) for line in text.splitlines() if "aaaa" not in line) <= 80
    assert "blocks.1.ffn.k2" in text
    assert "NON-FINITE" in text
    document = json.loads(as_json(finding, ABOUT))
    wanted = [
        "schema",
        "verdict",
        "method",
        "layer",
        "point",
        "token_index",
        "cause",
        "error",
        "bound",
        "history",
        "fix",
    ]
    assert [name for name in document if name in wanted] == wanted
    assert document["history"][0]["point"] == "emb"
    assert document["error"] is None  # an Inf has no error


def test_ratios_of_the_heat_map_are_those_of_the_history() -> None:
    from harness.localize.heatmap import grid, text

    finding = found(lambda weights: Traced(weights, FAULTS["blocks.1.ffn.k2"]))
    drawn = grid(finding.history)
    assert drawn is not None
    column = drawn.columns.index("k2")
    assert [row[column] is not None and row[column] > 1 for row in drawn.cells[:2]] == [False, True]  # type: ignore[operator]
    assert max(len(line) for line in text(drawn).splitlines()) <= 80
    assert grid(replace(finding, history=()).history) is None


def test_the_command(bench: Callable[..., Done], small: str) -> None:
    base = ("localize", "--model", small, "--in-process", "--threads", "1")
    clean = bench(*base, "--backend", "numpy")
    assert clean.code == 0
    assert "CLEAN" in clean.out
    bad = bench(*base, "--backend", "faulty", "--device", "inf", "--no-fix", "--format", "json")
    assert bad.code == 1
    assert json.loads(bad.out)["verdict"] == "non-finite"
    for argv, words, code in (
        (("--backend", "numpy", "--tokens", ""), "the prompt is empty", 2),
        (("--backend", "numpy", "--tokens", "1,x"), "token ids such as", 2),
        (("--backend", "numpy", "--tokens", "99999"), "outside the vocabulary", 2),
        (("--backend", "numpy", "--tokens", "9" * 20), "outside the vocabulary", 2),
        (("--backend", "numpy", "--tokens", "1," + "9" * 5000), "outside the vocabulary", 2),
        (("--backend", "faulty", "--device", "clean", "--method", "trace"), "it shows no trace points", 3),
        (("--backend", "faulty", "--device", "exception"), "kernel launch failed", 4),
        (("--prompt", "x"), "--backend", 2),
        (("--backend", "numpy", "--heat-map", "x.txt"), "ends in .png, .svg, .pdf", 2),
        (("--backend", "numpy", "--heat-map", "none/x.png"), "does not exist", 2),
        (("--backend", "numpy", "--output", "none/x.txt"), "does not exist", 2),
        (("--backend", "numpy", "--drift", "9", "--heat-map", "x.png"), "leave out --heat-map", 2),
        (("--backend", "numpy", "--drift", "9", "--method", "state"), "leave out --method", 2),
        (("--backend", "numpy", "--drift", "9", "--no-fix"), "leave out --no-fix", 2),
        (("--backend", "numpy", "--drift", "9", "--prompt-tokens", "9"), "leave out --prompt-tokens", 2),
    ):
        done = bench(*base, *argv)
        assert (done.code, done.out) == (code, ""), done
        assert words in done.err


def test_no_picture_of_what_shows_no_operations(bench: Callable[..., Done], small: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="not installed: pip install matplotlib")
    picture = tmp_path / "where.png"
    argv = ("--backend", "faulty", "--device", "inf", "--no-fix", "--heat-map", str(picture))
    done = bench("localize", "--model", small, "--in-process", "--threads", "1", "--method", "truncation", *argv)
    assert "no picture: logits shows no operations" in done.err
    assert not picture.exists()


DIES = """
import os
from backends import numpy_reference
from backends.api import BackendInfo
from reference.numerics import Arithmetic
from reference.forward import forward

INFO = BackendInfo("dies", "dies while traced", "a test", ("cpu",), {"fp32": Arithmetic()})

class Dies(numpy_reference.NumpySession):
    def forward(self, tokens, state):
        logits, state = super().forward(tokens, state)
        return logits * 1.5, state
    def trace(self, tokens, state, tap):
        os._exit(7)
    logits = None

def load(checkpoint, scheme, device, threads):
    return Dies(checkpoint, None)
"""


def test_a_backend_that_dies_while_traced_loses_nothing(bench: Callable[..., Done], small: str, tmp_path: Path) -> None:
    """It runs in a process of its own without being asked to, and is started again for the next method."""
    file = tmp_path / "dies.py"
    file.write_text(DIES)
    done = bench("localize", "--model", small, "--backend", str(file), "--no-fix", "--format", "json")
    assert done.code == 1, done.err
    found = json.loads(done.out)
    assert (found["verdict"], found["method"], found["layer"]) == ("diverged", "state", None)
    assert any("broke while watched: ChildDied: exited with status 7" in note for note in found["notes"])


RIGHT = DIES.replace("logits * 1.5", "logits")


def test_a_right_backend_that_dies_while_traced_is_not_clean_to_a_script(
    bench: Callable[..., Done], small: str, tmp_path: Path
) -> None:
    file = tmp_path / "right.py"
    file.write_text(RIGHT)
    done = bench("localize", "--model", small, "--backend", str(file), "--format", "json")
    found = json.loads(done.out)
    assert (done.code, found["verdict"], found["broke"]) == (4, "clean", True)
    assert any("broke while watched: ChildDied" in note for note in found["notes"])


@pytest.mark.parametrize(("n", "told"), [(5, True), (32, False)])
def test_a_prompt_too_short_for_bounds_is_told(n: int, told: bool) -> None:
    for faults in ({}, FAULTS["blocks.0.ffn.v"]):
        finding = found(partial(Traced, faults=faults), tokens=TOKENS[:n])
        assert (finding.verdict == CLEAN) == (not faults)
        assert any(f"the prompt has {n} tokens; bounds are meant for 32" in note for note in finding.notes) == told


DIES_LATER = """
import os
from backends import numpy_reference
from backends.api import BackendInfo
from reference.numerics import Arithmetic

INFO = BackendInfo("dies_later", "wrong from 20 tokens on, dies at 24", "a test", ("cpu",), {"fp32": Arithmetic()})

class Dies(numpy_reference.NumpySession):
    def forward(self, tokens, state):
        if len(tokens) == 24 and state is None:
            os._exit(7)
        logits, state = super().forward(tokens, state)
        return logits * (1.5 if len(tokens) >= 20 else 1), state
    logits = None

def load(checkpoint, scheme, device, threads):
    return Dies(checkpoint, None)
"""


def test_a_backend_that_dies_while_a_prompt_is_searched_for_loses_nothing(
    bench: Callable[..., Done], small: str, tmp_path: Path
) -> None:
    file = tmp_path / "dies_later.py"
    file.write_text(DIES_LATER)
    done = bench("localize", "--model", small, "--backend", str(file), "--no-fix", "--format", "json")
    assert done.code == 1, done.err
    found = json.loads(done.out)
    assert (found["verdict"], found["method"], found["point"]) == ("diverged", "truncation", "logits")
    assert "one token at a time all logits are right" in found["cause"]
    assert len(found["prompt"]) == 48
    words = "the shortest failing prompt: it broke on 24 tokens: ChildDied: exited with status 7"
    assert any(words in note for note in found["notes"])


#: A runner of libraries it did not build: INFO says float32, the library computes in bfloat16 and says so (or not).
RUNS_ANY = """
from backends.api import BackendInfo
from reference.forward import forward
from reference.numerics import Arithmetic

INFO = BackendInfo("runs_any", "runs what it is given", "a test", ("cpu",), {"fp32": Arithmetic()})
OWN = Arithmetic("bf16", residual="bf16")

class Silent:
    def __init__(self, weights):
        self.weights = weights
    def forward(self, tokens, state):
        return forward(self.weights, tokens, state, arithmetic=OWN, seed=5)

class Says(Silent):
    def declared_arithmetic(self):
        return OWN

def load(checkpoint, scheme, device, threads):
    return KIND(checkpoint)
"""


@pytest.mark.parametrize("how", ["--in-process", "--isolate"])
def test_a_session_is_judged_by_the_arithmetic_it_declares(
    bench: Callable[..., Done], small: str, tmp_path: Path, how: str
) -> None:
    codes = {}
    for kind in ("Says", "Silent"):
        file = tmp_path / f"{kind.lower()}.py"
        file.write_text(RUNS_ANY.replace("KIND", kind))
        done = bench("localize", "--model", small, "--backend", str(file), how, "--no-fix", "--threads", "1")
        codes[kind] = done.code
        drift = bench("localize", "--model", small, "--backend", str(file), how, "--drift", "60", "--threads", "1")
        assert (drift.code == 0) == (kind == "Says"), drift
    assert codes == {"Says": 0, "Silent": 1}
