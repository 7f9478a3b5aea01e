"""Schemes that only their own system can read: what is said of them can fail, and is never a PASS of the kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from suites.selftest.conftest import Done

#: A scheme that nobody here knows; FORWARD is what its session does.
ADAPTER = """\
import numpy as np
import reference
from backends.api import BackendInfo
from reference import Arithmetic
from reference.schemes import apply

INFO = BackendInfo("own", "d", "o", ("cpu",), {{"{scheme}": Arithmetic()}})


class Session:
    def __init__(self, weights):
        self.weights = weights

    def forward(self, tokens, state):
        {forward}


def load(checkpoint, scheme, device, threads):
    return Session(apply(checkpoint, "{stored}").in_memory(np.float32))
"""
RIGHT = "return reference.forward(self.weights, tokens, state)"
WRONG = {
    "unrelated logits": "return np.random.default_rng(tokens[-1]).normal(0, 3, 256).astype(np.float32), state",
    "no memory": "return reference.forward(self.weights, tokens[-1:], None)",
    "state lost between calls": "return reference.forward(self.weights, tokens, None)",
    "not finite": "return reference.forward(self.weights, tokens, state)[0] * np.float32('nan'), state",
    "half": "l, s = reference.forward(self.weights, tokens, state); return l * np.float32(-1), s",
}
TOPS = ("top1_agreement", "top5_agreement")


@pytest.fixture
def judged(tmp_path: Path, bench: Callable[..., Done]) -> Callable[..., tuple[int, dict[str, dict[str, object]]]]:
    def run(forward: str, scheme: str = "Q4_K", stored: str = "Q4_0") -> tuple[int, dict[str, dict[str, object]]]:
        file = tmp_path / "own.py"
        file.write_text(ADAPTER.format(scheme=scheme, forward=forward, stored=stored))
        words = ("--backend", str(file), "--quant", scheme, "--hardware", "cpu", "--quick", "--threads", "1")
        done = bench(*words, "--format", "json")
        return done.code, {row["metric"]: row for row in json.loads(done.out)["rows"]}

    return run


@pytest.mark.parametrize("scheme", ["Q4_K", "mine4"])
def test_what_passes_is_not_judged_but_has_figures(
    scheme: str, judged: Callable[..., tuple[int, dict[str, dict[str, object]]]]
) -> None:
    code, rows = judged(RIGHT, scheme)
    assert code == 3  # parity of that scheme, asked for by name, is not to be had
    assert rows["parity"]["verdict"] == "UNSUPPORTED"
    assert rows["kl_divergence"]["verdict"] == "PASS"
    for metric in ("prefill", "decode", "load"):
        assert rows[metric]["verdict"] == "UNSUPPORTED"
        assert rows[metric]["value"]


def test_parity_alone_has_no_rows_of_speed(tmp_path: Path, bench: Callable[..., Done]) -> None:
    file = tmp_path / "own.py"
    file.write_text(ADAPTER.format(scheme="Q4_K", forward=WRONG["no memory"], stored="Q4_0"))
    done = bench("parity", "--backend", str(file), "--threads", "1", "--format", "json")
    assert done.code == 1
    assert {row["metric"] for row in json.loads(done.out)["rows"]} <= {"parity", "kl_divergence", *TOPS}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("scheme", ["Q4_K", "mine4"])
def test_what_is_wrong_has_no_speed(
    scheme: str, fault: str, judged: Callable[..., tuple[int, dict[str, dict[str, object]]]]
) -> None:
    code, rows = judged(WRONG[fault], scheme)
    assert code == 1
    assert "FAIL" in {row["verdict"] for row in rows.values()}
    assert not any(row["value"] for metric, row in rows.items() if metric in ("prefill", "decode"))
