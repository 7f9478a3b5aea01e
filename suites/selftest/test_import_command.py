"""``rwkv-bench import``: recorded rows from a file, and refusals in one line that store nothing."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness import command_import
from harness.options import Parser, UsageError
from harness.recorded import recorded_rows
from harness.recorded_names import FOREIGN_SCHEMES, ImportProblem, known_schemes, scheme_class
from harness.rows import Row
from harness.samples import Workload
from harness.store import append, duplicates, read
from reference.schemes import SCHEME_CLASSES, SCHEMES
from suites.selftest.test_printed import CHAT, MLC, OBJECTS, TABLE

Imported = Callable[..., list[Row]]


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="rwkv-bench import")
    command_import.options(parser)
    parser.add_argument("--store")
    return parser.parse_args(list(argv))


class Session:
    """One user's folder: ``run`` imports a text, ``said`` is what stderr was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "rows.jsonl"
        self.said: list[str] = []

    def run(self, text: str | bytes, source: str, *options: str) -> list[Row]:
        file = self.folder / "chat.log"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.said.clear()
        arguments = parsed(str(file), "--from", source, *options, "--store", str(self.store))
        return command_import.run(arguments, self.said.append)

    def keep(self, rows: list[Row]) -> None:
        for row in rows:
            append(self.store, row)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.delenv("RWKV_BENCH_INVENTORY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return Session(tmp_path)


M2 = ("--hardware", "m2", "--model", "3b-world", "--quant", "q4f16_1")
PHONE = ("--hardware", "snapdragon865", "--model", "1b5-world", "--quant", "ncnn int4")


def test_rows_of_an_mlc_chat(user: Session) -> None:
    lengths = ("--prompt-tokens", "20", "--decode-tokens", "64")
    rows = user.run(MLC, "mlc-chat", *M2, *lengths, "--date", "2023-08-14", "--note", "on mains")
    assert [(row.metric, row.value, row.unit) for row in rows] == [
        ("prefill", 362.7, "tok/s"),
        ("decode", 72.4, "tok/s"),
    ]
    for row in rows:
        assert (row.kind, row.verdict, row.interval, row.samples) == ("recorded", None, None, None)
        assert (row.hardware, row.backend, row.model, row.scheme) == ("m2", "mlc-llm", "3b-world", "q4f16_1")
        assert (row.scheme_class, row.time, row.workload) == ("int4", "2023-08-14", Workload(20, 64))
        assert row.reason == "printed by mlc-llm; parity unknown"
        assert row.extra["source"] == "mlc-chat output (chat.log)"
        assert row.extra["printed"] == {"line": 6, "text": "prefill: 362.7 tok/s, decode: 72.4 tok/s"}
        assert row.extra["note"] == "on mains"
    assert user.said == []


def test_rows_of_faster_rwkv(user: Session) -> None:
    rows = user.run(CHAT, "faster-rwkv", *PHONE, "--threads", "4")
    assert [(row.metric, row.value, row.threads, row.workload) for row in rows] == [
        ("decode", 11.5722, 4, None),
        ("decode", 12.0, 4, None),
    ]
    assert rows[0].reason is not None
    assert "one rate over prompt and output, sampling included" in rows[0].reason
    assert rows[0].extra["printed"]["tokens"] == 58


def test_tokens_of_faster_rwkv_are_split_where_one_length_is_known(user: Session) -> None:
    only = "\n".join(CHAT.splitlines()[:8])
    (row,) = user.run(only, "faster-rwkv", *PHONE, "--prompt-tokens", "8")
    assert row.workload == Workload(8, 50)
    (row,) = user.run(only, "faster-rwkv", *PHONE, "--decode-tokens", "50")
    assert row.workload == Workload(8, 50)
    for options in (("--prompt-tokens", "58"), ("--prompt-tokens", "8", "--decode-tokens", "64")):
        with pytest.raises(ImportProblem, match="58 tokens, prompt and output together, are not"):
            user.run(only, "faster-rwkv", *PHONE, *options)


@pytest.mark.parametrize("scheme", ["cuda fp16", "fp16"])
def test_one_rate_over_both_is_refused_with_cuda(user: Session, scheme: str) -> None:
    with pytest.raises(ImportProblem, match=rf"line 7: one rate .* is neither prefill nor decode with {scheme}"):
        user.run(CHAT, "faster-rwkv", "--hardware", "a800", "--model", "1b5", "--quant", scheme)


def test_rows_of_llama_bench(user: Session) -> None:
    options = ("--hardware", "m2", "--model", "1b5-world", "--quant", "Q8_0", "--threads", "8")
    prefill, decode, deep = user.run(TABLE, "llama-bench", *options)
    assert (prefill.backend, prefill.backend_version, prefill.threads) == ("llama.cpp", "8cf427ff (5163)", 4)
    assert (prefill.workload, decode.workload, deep.workload) == (Workload(512, 0), None, Workload(512, 128))
    assert decode.extra["decode_tokens"] == 128
    assert decode.extra["printed"]["model"] == "rwkv6 1B Q8_0"
    assert decode.extra["printed"]["stddev_ts"] == 0.05
    assert len(user.said) == 1
    assert user.said[0].startswith("chat.log, line 7: test pp512+tg128 is neither prefill")
    prefill, _ = user.run(json.dumps(OBJECTS), "llama-bench", *options)
    assert (prefill.time, prefill.extra["printed"]["samples_ts"]) == ("2025-04-24T11:58:50Z", [1.5, 2.5])


def test_tests_of_several_models_are_not_filed_under_one_name(user: Session) -> None:
    text = "\n".join(json.dumps({**OBJECTS[0], "model_type": name}) for name in ("rwkv6 1B", "llama 7B"))
    options = ("--hardware", "m2", "--model", "1b5-world", "--quant", "Q8_0")
    with pytest.raises(ImportProblem, match=r"tests of 2 models \(rwkv6 1B m/rwkv\.gguf, llama 7B .*--only TEXT"):
        user.run(text, "llama-bench", *options)
    (row,) = user.run(text, "llama-bench", *options, "--only", "rwkv6")
    assert row.extra["printed"]["model_type"] == "rwkv6 1B"
    with pytest.raises(ImportProblem, match="--only gpt: no test"):
        user.run(text, "llama-bench", *options, "--only", "gpt")


CSV = """\
hardware,backend,model,scheme,metric,value,prompt_tokens,decode_tokens,date
m2,,3b-world,q4f16_1,decode,26.3,256,64,2023-08-14
,rwkv.cpp,169m,Q4_0,prefill,90,,,
"""


def test_csv_overrides_options_row_by_row(user: Session) -> None:
    first, second = user.run(CSV, "csv", "--hardware", "a800", "--backend", "mlc-llm", "--date", "2024-01-01")
    assert (first.hardware, first.backend, first.workload, first.time) == (
        "m2",
        "mlc-llm",
        Workload(256, 64),
        "2023-08-14",
    )
    assert (second.hardware, second.backend, second.model) == ("a800", "rwkv.cpp", "169m")
    assert (second.workload, second.time) == (None, "2024-01-01")
    with pytest.raises(ImportProblem, match=r"chat\.log, line 3 does not say its hardware; give --hardware"):
        user.run(CSV, "csv", "--backend", "mlc-llm")


def test_the_same_file_twice_is_found_and_shown_once(user: Session) -> None:
    for _ in range(2):
        user.keep(user.run(CHAT, "faster-rwkv", *PHONE))
    assert duplicates(read(user.store)) == [(0, 2), (1, 3)]
    assert [row.value for row in recorded_rows(user.store, "snapdragon865")] == [11.5722, 12.0]


def test_recorded_rows_by_hardware_and_scheme(user: Session) -> None:
    assert recorded_rows(user.folder / "absent.jsonl", "m2") == []
    user.keep(user.run(MLC, "mlc-chat", *M2))
    user.keep(user.run(CHAT, "faster-rwkv", *PHONE))
    (row, _) = user.run(MLC, "mlc-chat", *M2)
    append(user.store, replace(row, kind="measured", time="2024-01-01", metric="load", unit="s"))
    for schemes in (("all",), ("q4f16_1",), ("int4",), ("fp16", "int4")):
        assert [row.value for row in recorded_rows(user.store, "m2", schemes)] == [362.7, 72.4]
    assert recorded_rows(user.store, "m2", ("int8",)) == []
    assert recorded_rows(user.store, "a800") == []
    assert len(recorded_rows(user.store, "snapdragon865", ("int4",))) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--hardware", "a8000"), "no hardware 'a8000' is known; did you mean 'a800'? --as-named takes it as it is"),
        (("--hardware", "local"), "hardware 'local' names no machine"),
        (("--model", "3b-wrld"), "no model '3b-wrld' is known; did you mean '3b-world'?"),
        (("--quant", "q4f16_11"), "no scheme 'q4f16_11'; did you mean 'q4f16_1'?"),
        (("--quant", "int7"), "no scheme 'int7'; did you mean"),
    ],
)
def test_names_that_are_slips(user: Session, options: tuple[str, str], told: str) -> None:
    with pytest.raises(ImportProblem) as error:
        user.run(MLC, "mlc-chat", *M2, *options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_are_new(user: Session) -> None:
    (row, _) = user.run(MLC, "mlc-chat", *M2, "--hardware", "a8000", "--model", "4b-world", "--as-named")
    assert (row.hardware, row.model) == ("a8000", "4b-world")
    (row, _) = user.run(MLC, "mlc-chat", *M2, "--hardware", "iphone15")
    user.keep([row])
    with pytest.raises(ImportProblem, match="did you mean 'iphone15'"):
        user.run(MLC, "mlc-chat", *M2, "--hardware", "iphone-15")


def test_names_of_the_inventory_are_known(user: Session) -> None:
    (user.folder / "rwkv-bench.toml").write_text('[hosts.h20box]\nssh = "me@box"\nhardware = "h20"\n')
    for name in ("h20box", "h20"):
        assert user.run(MLC, "mlc-chat", *M2, "--hardware", name)[0].hardware == name


@pytest.mark.parametrize(
    ("text", "source", "told"),
    [
        ("", "mlc-chat", "chat.log: none of its 0 lines is a speed as mlc-chat prints it; is --from mlc-chat right?"),
        ("hello\nworld\n", "faster-rwkv", "none of its 2 lines is a speed as faster-rwkv prints it"),
        (bytes(range(256)) * 9, "llama-bench", "lines is a speed as llama-bench prints it"),
        ("prefill: nan tok/s, decode: nan tok/s\n", "mlc-chat", "no figure can be taken; line 1: prefill: nan is not"),
        ("\x1b[2Jprefill: nan tok/s", "mlc-chat", "no figure can be taken; line 1"),
        (CHAT, "mlc-chat", "no figure can be taken; line 6: not a form that MLC-LLM's chat prints"),
        (MLC, "csv", "no figure can be taken; line 1: no column 'use mlc config"),
        (
            '{"a":' * 100_000,
            "llama-bench",
            "no figure can be taken; line 1: not a whole JSON object (nested too deeply)",
        ),
        ("metric,value\n", "csv", "none of its 0 lines is a header and rows"),
    ],
)
def test_a_file_without_a_figure_is_refused(user: Session, text: str | bytes, source: str, told: str) -> None:
    with pytest.raises(ImportProblem) as error:
        user.run(text, source, *M2)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_lines_are_named_up_to_a_limit(user: Session) -> None:
    rows = user.run(MLC + "decode: nan tok/s\n" * 25, "mlc-chat", *M2)
    assert len(rows) == 2
    assert len(user.said) == 11
    assert user.said[0] == "chat.log, line 8: decode: nan is not finite: decode: nan tok/s; left out"
    assert user.said[-1] == "chat.log: 15 more lines with a figure left out"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--from", "mlc"), "no format 'mlc'; did you mean 'mlc-chat'?"),
        (("--from", "csv", "--threads", "0"), "'0' is not a whole number from 1"),
        (("--from", "csv", "--date", "14.8.2023"), "'14.8.2023' is no date"),
        (("--from", "csv", "--date", "2999-01-01"), "2999-01-01 is still to come"),
        (("--from", "csv", "--model", "all"), "one name is needed"),
        ((), "--from"),
    ],
)
def test_options_that_cannot_be(options: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError) as error:
        parsed("chat.log", *options)
    assert told in str(error.value)


def test_a_date_in_the_file_that_cannot_be(user: Session) -> None:
    with pytest.raises(ImportProblem, match=r"line 2: 'yesterday' is no date"):
        user.run(CSV.replace("2023-08-14", "yesterday"), "csv", "--backend", "x")


def test_files_that_cannot_be_read(user: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, why in (("absent.log", "No such file"), (".", "Is a directory"), ("a\0b", "null byte")):
        with pytest.raises(ImportProblem, match=f"cannot read .*: .*{why}"):
            command_import.run(parsed(name, "--from", "csv", "--store", "s"), print)
    monkeypatch.setattr("harness.imported.MOST_BYTES", 100)
    with pytest.raises(ImportProblem, match="is larger than"):
        user.run("x" * 101, "csv")


def test_standard_input(user: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MLC.encode())))
    rows = command_import.run(parsed("-", "--from", "mlc-chat", *M2, "--store", "s"), print)
    assert [row.extra["source"] for row in rows] == ["mlc-chat output (standard input)"] * 2


def test_schemes_of_other_programs_have_the_class_of_their_bits() -> None:
    assert set(FOREIGN_SCHEMES.values()) <= {*SCHEME_CLASSES, None}
    for name in known_schemes():
        if name in SCHEMES:
            assert scheme_class(name) == SCHEMES[name].scheme_class
    assert [scheme_class(name) for name in ("int4", "ncnn fp16", "q3f16_1", "Q6_K")] == ["int4", "bf16", "int3", None]


def test_the_options_are_light_to_import() -> None:
    code = "import sys, harness.command_import; print(*(m for m in ('numpy', 'rich', 'psutil') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
