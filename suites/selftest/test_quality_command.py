"""``rwkv-bench quality``: rows, table, exit status, streams; what is wrong is one line."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.rows import FIELDS
from harness.store import read
from suites.selftest.conftest import Done
from suites.selftest.processes import Place, eventually

Bench = Callable[..., Done]

#: A passage of a second.
FEW = ("--tokens", "512", "--context", "64", "--threads", "1")

WRONG_SCALE = """
import numpy as np
import reference
from backends.api import BackendInfo
from reference import Arithmetic
from reference.schemes import apply
from reference.weights import Tensor

INFO = BackendInfo("wrong", "Q4_0, one matrix 5 % too large", "a test", ("cpu",), {"Q4_0": Arithmetic()})
WRONG = "blocks.0.ffn.value.weight"


class Session:
    def __init__(self, weights):
        stored = apply(weights, "Q4_0").in_memory(np.float32)
        self.weights = stored.map(
            lambda name, t: Tensor.of(t.array() * np.float32(1.05)) if name == WRONG else t
        )

    def forward(self, tokens, state):
        return reference.forward(self.weights, tokens, state)


def load(checkpoint, scheme, device, threads):
    return Session(checkpoint)
"""

#: Right for the first calls of the gate, then the process ends, or a NaN comes.
LATE = """
import os
import numpy as np
import reference
from backends.api import BackendInfo
from reference import Arithmetic

INFO = BackendInfo("late", "strikes after 400 calls", "a test", ("exit", "nan", "raise"), {"fp32": Arithmetic()})


class Session:
    def __init__(self, weights, how):
        self.weights, self.how, self.calls = weights.in_memory(np.float32), how, 0

    def forward(self, tokens, state):
        self.calls += 1
        logits, state = reference.forward(self.weights, tokens, state)
        if self.calls > 400:
            if self.how == "exit":
                os._exit(7)
            if self.how == "raise":
                raise RuntimeError("kernel launch failed")
            logits[3] = np.nan
        return logits, state


def load(checkpoint, scheme, device, threads):
    return Session(checkpoint, device)
"""


#: The right order, far too large.
LOUD = """
import numpy as np
import reference
from backends.api import BackendInfo
from reference import Arithmetic

INFO = BackendInfo("loud", "logits far too large", "a test", ("cpu",), {"fp32": Arithmetic()})


class Session:
    def __init__(self, weights):
        self.weights = weights.in_memory(np.float32)

    def forward(self, tokens, state):
        logits, state = reference.forward(self.weights, tokens, state)
        return logits * np.float32(1e5), state


def load(checkpoint, scheme, device, threads):
    return Session(checkpoint)
"""


def rows_of(done: Done) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done.out)["rows"]
    return found


def figure(rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    found = [row for row in rows if row["metric"] == metric]
    assert len(found) == 1
    return found[0]


def part(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What the stored weights, or the kernel, have of the divergence."""
    found: dict[str, Any] = figure(rows, "kl_divergence")["quality"][name]
    return found


def test_every_row_has_an_interval_and_says_on_what(bench: Bench, state: Path) -> None:
    done = bench("quality", "--backend", "numpy", "--quant", "Q4_0", *FEW, "--format", "json")
    assert done.code == 0
    rows = rows_of(done)
    assert [row["metric"] for row in rows] == [
        *("parity", "state_parity", "perplexity", "bits_per_byte", "kl_divergence"),
        *("top1_agreement", "top5_agreement"),
    ]
    assert all(set(row) - {"revision"} == set(FIELDS) and row["verdict"] == "PASS" for row in rows)
    for row in rows[2:]:
        low, high = row["interval"]
        assert low <= row["value"] <= high
        assert len(row["samples"]) == 8
        about = row["quality"]
        assert (about["text"], about["positions"], about["context"], about["blocks"]) == ("heldout.txt", 512, 64, 8)
        assert row["workload"] == {"prompt_tokens": 512, "decode_tokens": 0, "batch": 1}
        assert row["synthetic"] is False
    perplexity = figure(rows, "perplexity")
    times = perplexity["quality"]["times_fp32"]
    assert perplexity["value"] == pytest.approx(times * perplexity["quality"]["fp32"])
    assert part(rows, "weights")["value"] == pytest.approx(figure(rows, "kl_divergence")["value"], rel=1e-3)
    for name in ("weights", "kernel"):
        low, high = part(rows, name)["interval"]
        assert 0 <= low <= part(rows, name)["value"] <= high
    assert part(rows, "kernel")["value"] < 1e-11
    assert [row.to_dict() for row in read(state / "rows.jsonl")] == rows


def test_the_command_of_a_row_gives_the_row_again(bench: Bench) -> None:
    rows = rows_of(bench("quality", "--backend", "numpy", "--quant", "Q8_0", *FEW, "--seed", "2", "--format", "json"))
    words = shlex.split(rows[-1]["command"])
    assert words[:2] == ["rwkv-bench", "quality"]
    again = rows_of(bench(*words[1:], "--format", "json"))
    for one, other in zip(rows, again, strict=True):
        assert (one["value"], one["interval"], one["command"]) == (other["value"], other["interval"], other["command"])


def test_isolated_and_in_process_are_the_same(bench: Bench, small: str) -> None:
    argv = ("quality", "--model", small, "--backend", "numpy,torch", "--quant", "fp16", *FEW, "--format", "json")
    apart, here = (rows_of(bench(*argv, option)) for option in ("--isolate", "--in-process"))
    assert [row["isolated"] for row in apart] == [True] * len(apart)
    for one, other in zip(apart, here, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-11), one["metric"]


def test_a_wrong_scale_fails_and_shows_where(bench: Bench, small: str, tmp_path: Path) -> None:
    """The figures stand, with the verdict on the kernel; the weights' part is what it was."""
    (tmp_path / "wrong.py").write_text(WRONG_SCALE)
    argv = ("quality", "--model", small, "--quant", "Q4_0", *FEW, "--format", "json")
    done = bench(*argv, "--backend", f"numpy,{tmp_path / 'wrong.py'}")
    assert done.code == 1
    rows = rows_of(done)
    right, wrong = ([row for row in rows if row["backend"].startswith(name)] for name in ("numpy", str(tmp_path)))
    assert {row["verdict"] for row in right} == {"PASS"}
    scored = [row for row in wrong if row["metric"] not in ("parity", "state_parity")]
    assert {row["verdict"] for row in scored} == {"FAIL"}
    assert all("the kernel fails parity" in row["reason"] and row["value"] is not None for row in scored)
    assert part(wrong, "weights") == part(right, "weights")
    assert part(right, "kernel")["interval"][1] < 1e-11
    assert part(wrong, "kernel")["interval"][0] > 1e-6
    table = bench(*argv[:-2], "--backend", str(tmp_path / "wrong.py"))
    assert "FAIL" in table.out
    assert table.code == 1


def test_nan_fails_at_its_position(bench: Bench, small: str, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    done = bench(
        "quality", "--model", small, "--backend", str(tmp_path / "late.py"), "--device", "nan", *FEW, "--format", "json"
    )
    assert done.code == 1
    rows = rows_of(done)
    assert [row["verdict"] for row in rows] == ["PASS"] + ["FAIL"] * 4
    scored = ["perplexity", "kl_divergence", "top1_agreement", "top5_agreement"]
    assert [row["metric"] for row in rows] == ["parity", *scored]
    for row in rows[1:]:
        assert row["value"] is None
        assert row["first_bad"]["token"] == 3
        assert row["reason"] == f"position {row['first_bad']['position']}: NaN at token 3"


def test_nan_from_the_start_fails_parity_too(bench: Bench, small: str) -> None:
    done = bench("quality", "--model", small, "--backend", "faulty", "--device", "nan", *FEW, "--format", "json")
    assert done.code == 1
    assert {row["verdict"] for row in rows_of(done)} == {"FAIL"}


@pytest.mark.parametrize(("how", "words"), [("exit", "exited with status 7 during"), ("raise", "kernel launch failed")])
def test_a_crash_is_a_row_and_the_next_cell_runs(
    how: str, words: str, bench: Bench, small: str, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    backends = f"{tmp_path / 'late.py'},numpy"
    argv = ("--backend", backends, "--quant", "fp32", "--device", f"{how},cpu", "--isolate", "--format", "json")
    done = bench("quality", "--model", small, *argv, *FEW)
    assert done.code == 4
    rows = rows_of(done)
    crashed = [row for row in rows if row["verdict"] == "CRASHED"]
    assert [row["metric"] for row in crashed] == ["kl_divergence"]
    assert words in crashed[0]["reason"]
    assert figure([row for row in rows if row["backend"] == "numpy"], "perplexity")["verdict"] == "PASS"


def test_synthetic_weights_say_so(bench: Bench, small: str) -> None:
    """They have divergence and agreement; their perplexity is said to mean nothing, and there are no bytes."""
    done = bench("quality", "--model", small, "--backend", "numpy", "--quant", "fp16", *FEW, "--format", "json")
    rows = rows_of(done)
    assert done.code == 0
    assert all(row["synthetic"] for row in rows)
    assert "bits_per_byte" not in {row["metric"] for row in rows}
    assert "synthetic weights: this says nothing" in figure(rows, "perplexity")["reason"]
    assert figure(rows, "kl_divergence")["reason"] is None


def test_lambada_of_a_file(bench: Bench, tmp_path: Path) -> None:
    """Against the reference called by hand."""
    from harness.models import open_model
    from reference.forward import forward

    texts = ["the list of the list", "def main(self", "return an instance of the class", "an object of the type type"]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    weights = open_model("tiny").weights.in_memory()
    right = []
    for text in texts:
        before, _, word = text.rpartition(" ")
        ids = list(f"{before} {word}".encode())
        logits, _ = forward(weights, ids, all_logits=True)
        right.append(logits.argmax(axis=-1)[len(before) - 1 : -1].tolist() == ids[len(before) :])
    argv = ("quality", "--backend", "numpy,torch", "--quant", "fp32", "--data", str(tmp_path / "words.jsonl"), *FEW)
    rows = [row for row in rows_of(bench(*argv, "--format", "json")) if row["metric"] == "lambada_accuracy"]
    assert len(rows) == 2
    for row in rows:
        assert row["value"] == np.mean(right)
        assert row["samples"] == [float(x) for x in right * 3]
        assert (row["quality"]["text"], row["quality"]["documents"]) == ("words.jsonl", 12)
        assert len(row["quality"]["ids_sha256"]) == 64
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert "LAMBADA %" in bench(*argv).out


def test_the_table_in_every_format(bench: Bench, tmp_path: Path, small: str) -> None:
    argv = ("quality", "--model", small, "--backend", "numpy,torch", "--quant", "fp32,Q4_0", *FEW)
    done = bench(*argv, "--format", "table")
    assert done.code == 3  # torch has no Q4_0, by name
    assert "512 tokens of random ids, seed 0 in segments of 64" in done.out
    assert "torch Q4_0: UNSUPPORTED: torch has no scheme Q4_0" in done.out.replace("\n", " ")
    lines = [line for line in bench(*argv, "--format", "md").out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    records = list(csv.DictReader(io.StringIO(bench(*argv, "--format", "csv").out)))
    assert {"kl_divergence", "perplexity"} <= {record["metric"] for record in records}
    assert sum(record["metric"] == "kl_divergence" for record in records) == 3
    assert bench(*argv, "--output", str(tmp_path / "q.json")).out == ""
    assert len(json.loads((tmp_path / "q.json").read_text())["rows"]) == 3 * 6 + 1


def test_the_context_can_be_one_run(bench: Bench) -> None:
    argv = ("quality", "--backend", "numpy", "--quant", "fp32", "--tokens", "700", "--context", "0", "--threads", "1")
    rows = rows_of(bench(*argv, "--format", "json"))
    about = figure(rows, "perplexity")["quality"]
    assert (about["positions"], about["context"], about["blocks"]) == (700, 0, 8)


def test_too_few_blocks_have_no_interval(bench: Bench) -> None:
    """And the command says how many of the positions that were asked for it used."""
    argv = ("--backend", "numpy", "--quant", "fp32", "--tokens", "500", "--context", "128", "--threads", "1")
    done = bench("quality", *argv, "--format", "json")
    assert done.code == 0
    assert "tiny: 384 positions of 500 asked for, whole segments of 128" in done.err
    assert all(row["interval"] is None and row["value"] is not None for row in rows_of(done)[2:])
    assert "±" not in bench("quality", *argv).out


def test_logits_a_thousand_times_too_large_keep_their_figures(bench: Bench, small: str, tmp_path: Path) -> None:
    """FAIL, not a crash: what is too large for a number is null and says so; divergence and agreement stand."""
    (tmp_path / "loud.py").write_text(LOUD)
    argv = ("quality", "--model", small, "--backend", str(tmp_path / "loud.py"), "--quant", "fp32", *FEW)
    done = bench(*argv, "--format", "json")
    assert done.code == 1
    rows = rows_of(done)
    assert {row["verdict"] for row in rows} == {"FAIL"}
    perplexity, far = figure(rows, "perplexity"), figure(rows, "kl_divergence")
    assert (perplexity["value"], perplexity["interval"], perplexity["quality"]["times_fp32"]) == (None, None, None)
    assert "perplexity is beyond float64" in perplexity["reason"]
    assert far["value"] > 1000
    assert far["interval"][0] <= far["value"] <= far["interval"][1]
    assert figure(rows, "top1_agreement")["value"] > 0.99
    assert "FAIL" in bench(*argv).out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--text no/such.txt", "--text no/such.txt: no such file"),
        ("--data no/such.jsonl", "--data no/such.jsonl: no such file"),
        ("--text EMPTY", "is empty; --text takes a file of plain text"),
        ("--data EMPTY", "is empty; --data takes one"),
        ("--text SHORT", "too short, 0 positions; at least 128 are needed"),
        ("--text .", "Is a directory"),
        ("--data SHORT", ":1: not {"),
        ("--tokens 31", "'31' is not a whole number from 32"),
        ("--tokens 32 --context 128", "fewer than two segments of 128"),
        ("--context 8", "'8' is not a whole number from 16"),
        ("--documents 1", "'1' is not a whole number from 2"),
        ("--tokenizer nothing", "no tokenizer 'nothing'"),
        ("--model 169m --text SHORT", "the Pile tokenizer is missing"),
        ("--prompt-tokens 5", "unrecognized arguments: --prompt-tokens"),
        ("--tokns 500", "did you mean '--tokens'"),
        ("--backend numpyy", "did you mean 'numpy'"),
        ("--quant Q4_O", "did you mean 'Q4_0'"),
        ("--store no/such/rows.jsonl", "does not exist"),
        ("--output .", "it is a folder"),
        ("--dry-run --format csv", "--dry-run has --format table or json"),
    ],
)
def test_bad_input_is_one_line_and_2(argv: str, words: str, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"a few words\n")
    named = argv.replace("EMPTY", str(tmp_path / "empty")).replace("SHORT", str(tmp_path / "short"))
    done = bench("quality", "--backend", "numpy", "--quant", "fp32", "--context", "64", *shlex.split(named))
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith("rwkv-bench: ")
    assert words in done.err


def test_text_that_the_vocabulary_lacks(bench: Bench, tmp_path: Path) -> None:
    from suites.selftest.vocabularies import data_file

    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    named = ("--tokenizer", str(data_file("20B_tokenizer.json")), "--text", str(tmp_path / "binary"))
    done = bench("quality", "--model", "169m", "--backend", "numpy", *named)
    assert done.code == 2
    assert "is not UTF-8" in done.err


def test_dry_run_runs_nothing(bench: Bench, state: Path) -> None:
    done = bench(
        "quality", "--model", "tiny,7b", "--backend", "numpy", "--quant", "fp32", "--dry-run", "--format", "json"
    )
    seconds = [cell["seconds"] for cell in json.loads(done.out)["cells"] if cell["seconds"] is not None]
    assert seconds
    assert not state.exists()


def test_published_hardware_has_no_quality(bench: Bench) -> None:
    done = bench("quality", "--hardware", "a800", "--format", "json")
    assert (done.code, json.loads(done.out)["rows"]) == (3, [])
    assert "a800 is not in this machine" in done.err


def test_ctrl_c_keeps_the_rows_so_far(tmp_path: Path) -> None:
    """The cells that were finished are in the store and in the table."""
    place = Place(tmp_path)
    argv = ("--backend", "numpy", "--tokens", "2048", "--threads", "1", "--store", str(place.store), "--format", "json")
    process = place.start("quality", *argv)
    try:
        assert eventually(lambda: place.store.exists() and place.store.read_text().count("top5_agreement") >= 1, 60)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err
    rows = json.loads(out)["rows"]
    assert figure(rows, "top5_agreement")["scheme"] == "fp32"
    assert [row.to_dict() for row in read(place.store)] == rows
    assert [name for name in os.listdir(tmp_path / "cache" / "quality") if name.endswith(".part")] == []
