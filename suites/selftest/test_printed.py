"""Parsers of what other programs print: real output in, figures and named lines out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.command_import import FORMATS
from harness.inventory import PRINTS
from harness.printed import PARSERS, Reading, lines_of


def read(source: str, text: str) -> Reading:
    return PARSERS[source](lines_of(text.encode()))


def speeds(reading: Reading) -> list[tuple[str, float, int]]:
    return [(figure.metric, figure.value, figure.line) for figure in reading.figures]


def told(reading: Reading) -> list[str]:
    return [str(rejected) for rejected in reading.rejected]


def test_the_formats_are_the_same_everywhere() -> None:
    assert tuple(PARSERS) == FORMATS
    assert set(PRINTS) == set(FORMATS) - {"csv"}


# --- MLC-LLM ---------------------------------------------------------------------------------------------------

MLC = """\
Use MLC config: "/content/dist/rwkv/mlc-chat-config.json"
Loading finished
USER: hello
ASSISTANT: Hello! 1 + 1 = 2, prefill or decode?
USER: /stats
prefill: 362.7 tok/s, decode: 72.4 tok/s
USER: /exit
"""


def test_mlc_chat_stats() -> None:
    reading = read("mlc-chat", MLC)
    assert speeds(reading) == [("prefill", 362.7, 6), ("decode", 72.4, 6)]
    assert told(reading) == []
    assert reading.ignored == 6


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Statistics: prefill: 3477.5 tok/s, decode: 153.6 tok/s", [("prefill", 3477.5, 1), ("decode", 153.6, 1)]),
        ("encode: 176.9 tok/s, decode: 70.2 tok/s", [("prefill", 176.9, 1), ("decode", 70.2, 1)]),
        ("\x1b[32mprefill: 1.0 tok/s, decode: 5.4 tok/s\x1b[0m", [("prefill", 1.0, 1), ("decode", 5.4, 1)]),
        ("decode: 9.1 tok/s", [("decode", 9.1, 1)]),
        (">>> /stats\r\nprefill: 2e2 tok/s, decode: 3 tok/s\r\n", [("prefill", 200.0, 2), ("decode", 3.0, 2)]),
        (
            "----------- prefill -----------\nthroughput: 216.6 tok/s\ntotal tokens: 15 tok\ntotal time: 0.1 s\n"
            "------------ decode ------------\nthroughput: 107.5 tok/s\ntotal tokens: 354 tok\n",
            [("prefill", 216.6, 2), ("decode", 107.5, 6)],
        ),
        (
            "decode_tokens_sum\t73\ndecode_tokens_per_s\t5.658155349407193\n"
            "# /last_finished_request\nlast_finished_request_prefill_tokens_per_s\t1.5\n",
            [("decode", 5.658155349407193, 2), ("prefill", 1.5, 4)],
        ),
    ],
)
def test_other_forms_of_mlc(text: str, found: list[tuple[str, float, int]]) -> None:
    reading = read("mlc-chat", text)
    assert speeds(reading) == found
    assert told(reading) == []


def test_mlc_lines_that_are_no_result_are_named() -> None:
    reading = read(
        "mlc-chat",
        "prefill: -nan tok/s, decode: inf tok/s\nprefill: N/A tok/s, decode: 5 tok/s\ndecode: 0.0 tok/s\n"
        "[i: 166] decoding-time=8.7ms tok/s: 117.286.\nthroughput: 12.0 tok/s\nprefill: 1,234.5 tok/s\n",
    )
    assert speeds(reading) == [("decode", 5.0, 2)]
    assert told(reading) == [
        "line 1: prefill: -nan is not finite: prefill: -nan tok/s, decode: inf tok/s",
        "line 1: decode: inf is not finite: prefill: -nan tok/s, decode: inf tok/s",
        "line 2: prefill: 'N/A' is not a number: prefill: N/A tok/s, decode: 5 tok/s",
        "line 3: decode: 0.0 is not above 0: decode: 0.0 tok/s",
        "line 4: not a form that MLC-LLM's chat prints: [i: 166] decoding-time=8.7ms tok/s: 117.286.",
        "line 5: not a form that MLC-LLM's chat prints: throughput: 12.0 tok/s",
        "line 6: prefill: '1,234.5' is not a number: prefill: 1,234.5 tok/s",
    ]


# --- faster-rwkv -----------------------------------------------------------------------------------------------

CHAT = """\
User: Hello
Assistant: Hi there. How are you?

-- time: 5012ms
-- num tokens: 58
-- ms per token: 86.4138
-- tokens per second: 11.5722

User: and you
Assistant: cut in the middle-- time: 1000ms
-- num tokens: 12
-- ms per token: 83.3333
-- tokens per second: 12

User:"""


def test_faster_rwkv_chat() -> None:
    reading = read("faster-rwkv", CHAT)
    assert speeds(reading) == [("decode", 11.5722, 7), ("decode", 12.0, 13)]
    assert reading.figures[0].facts == {"tokens": 58, "milliseconds": 5012.0}
    assert "one rate over prompt and output" in reading.figures[0].remark
    assert told(reading) == []


def test_faster_rwkv_from_python() -> None:
    """Its example prints a space more, and milliseconds with a fraction."""
    time, tokens = 2345.678901, 31
    text = f"-- time:  {time} ms\n-- num tokens:  {tokens}\n-- ms per token:  {time / tokens}\n"
    text += f"-- tokens per second:  {tokens / time * 1000}\n"
    assert speeds(read("faster-rwkv", text)) == [("decode", tokens / time * 1000, 4)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-- num tokens: 58\n-- tokens per second: 11.5\n", "line 2: no line '-- time' stands before it"),
        ("-- time: 5012ms\n-- tokens per second: 11.5\n", "line 2: no line '-- num tokens' stands before it"),
        ("-- time: 0ms\n-- num tokens: 5\n-- tokens per second: inf\n", "line 3: inf is not finite"),
        ("-- time: 5012ms\n-- num tokens: 58\n-- tokens per second: 13.5\n", "13.5 contradicts 58 tokens in 5012 ms"),
        ("-- time: 9ms\n-- num tokens: 0\n-- tokens per second: 1\n", "'0' is not a whole number from 1"),
        ("time: 5012ms\nnum tokens: 58\nms per token: 86.4\ntokens per second: 11.5722\n", "count characters"),
        ("speed 12.5 tokens/s\n", "line 1: not a form that faster-rwkv prints"),
    ],
)
def test_faster_rwkv_lines_that_cannot_be_taken(text: str, why: str) -> None:
    reading = read("faster-rwkv", text)
    assert speeds(reading) == []
    assert len(told(reading)) == 1
    assert why in told(reading)[0]


def test_a_block_of_faster_rwkv_does_not_lend_its_lines_to_the_next() -> None:
    text = "-- time: 1000ms\n-- num tokens: 12\n-- tokens per second: 12\n-- tokens per second: 12\n"
    reading = read("faster-rwkv", text)
    assert speeds(reading) == [("decode", 12.0, 3)]
    assert told(reading) == ["line 4: no line '-- time' stands before it: -- tokens per second: 12"]


# --- llama-bench -----------------------------------------------------------------------------------------------

TABLE = """\
ggml_cuda_init: found 1 CUDA devices:
| model         |       size |     params | backend    | threads |            test |                  t/s |
| ------------- | ---------: | ---------: | ---------- | ------: | --------------: | -------------------: |
| rwkv6 1B Q8_0 |   1.58 GiB |     1.60 B | CPU        |       4 |           pp512 |         95.12 ± 0.40 |
| rwkv6 1B Q8_0 |   1.58 GiB |     1.60 B | CPU        |       4 |           tg128 |         12.34 ± 0.05 |
| rwkv6 1B Q8_0 |   1.58 GiB |     1.60 B | CPU        |       4 |    tg128 @ d512 |         12.30 ± 0.05 |
| rwkv6 1B Q8_0 |   1.58 GiB |     1.60 B | CPU        |       4 |     pp512+tg128 |         40.00 ± 0.10 |

build: 8cf427ff (5163)
"""


def test_the_table_of_llama_bench() -> None:
    reading = read("llama-bench", TABLE)
    assert speeds(reading) == [("prefill", 95.12, 4), ("decode", 12.34, 5), ("decode", 12.3, 6)]
    first, second, third = reading.figures
    version = {"threads": 4, "backend_version": "8cf427ff (5163)"}
    assert first.says == {"prompt_tokens": 512, **version}
    assert second.says == {"decode_tokens": 128, **version}
    assert third.says == {"decode_tokens": 128, "prompt_tokens": 512, **version}
    assert (first.facts["model"], first.facts["stddev_ts"]) == ("rwkv6 1B Q8_0", 0.4)
    assert len(told(reading)) == 1
    assert "line 7: test pp512+tg128 is neither prefill (pp) nor decode (tg) alone" in told(reading)[0]


def test_the_older_table_with_a_space_and_ascii_spread() -> None:
    text = "| model | backend | test | t/s |\n|---|---|---|---|\n| rwkv6 | CUDA | pp 512 | 368.80 +- 9.24 |\n"
    assert speeds(read("llama-bench", text)) == [("prefill", 368.8, 3)]


FIELDS: tuple[str, ...] = (
    "build_commit",
    "build_number",
    "model_filename",
    "model_type",
    "n_threads",
    "n_prompt",
    "n_gen",
    "n_depth",
)
FIELDS += ("test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts")
ONE = ("8cf427ff", 5163, "m/rwkv.gguf", "rwkv6 1B Q8_0", 4, 512, 0, 0, "2025-04-24T11:58:50Z", 7, 1, 95.125, 0.25)
TWO = ("8cf427ff", 5163, "m/rwkv.gguf", "rwkv6 1B Q8_0", 4, 0, 128, 0, "2025-04-24T11:58:51Z", 7, 1, 12.5, 0.25)
OBJECTS = [dict(zip(FIELDS, values, strict=True)) | {"samples_ts": [1.5, 2.5]} for values in (ONE, TWO)]
QUOTED = [",".join(f'"{value}"' for value in values) for values in (ONE, TWO)]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("ggml: noise\n" + json.dumps(OBJECTS, indent=2) + "\n", (3, 22)),
        ("\n".join(json.dumps(item) for item in OBJECTS) + "\n", (1, 2)),
        (json.dumps(OBJECTS), (1, 1)),
        (json.dumps(OBJECTS[:1]) + "\nnoise, with commas\n" + json.dumps(OBJECTS[1]), (1, 3)),
        ("noise\n" + ",".join(FIELDS) + "\n" + QUOTED[0] + "\nllama: log line, between\n" + QUOTED[1], (3, 5)),
    ],
)
def test_json_jsonl_and_csv_of_llama_bench(text: str, lines: tuple[int, int]) -> None:
    reading = read("llama-bench", text)
    assert told(reading) == []
    assert speeds(reading) == [("prefill", 95.125, lines[0]), ("decode", 12.5, lines[1])]
    for figure, date, length in zip(
        reading.figures, ("11:58:50", "11:58:51"), ({"prompt_tokens": 512}, {"decode_tokens": 128}), strict=True
    ):
        said = {"threads": 4, "date": f"2025-04-24T{date}Z", "backend_version": "8cf427ff (5163)"}
        assert figure.says == {**said, **length}
        assert figure.facts["model_type"] == "rwkv6 1B Q8_0"


def test_llama_bench_output_that_is_damaged_is_named_by_line() -> None:
    whole, cut = json.dumps(OBJECTS[0]), json.dumps(OBJECTS[1], indent=1)[:120]
    reading = read("llama-bench", f"{cut}\n{whole}\n{whole.replace('95.125', 'nan')}\n{{}}\n")
    assert speeds(reading) == [("prefill", 95.125, 1 + cut.count("\n") + 1)]
    assert [line.split(": ")[1].split(" (")[0] for line in told(reading)] == [
        "not a whole JSON object",
        "not a whole JSON object",
        "a JSON object without avg_ts",
    ]
    table = "| rwkv | pp512 | 5 |\n| model | test | t/s |\n| rwkv | pp512 |\n| rwkv | pp512 | nan ± 0 |\n"
    assert [line.split(": ")[1] for line in told(read("llama-bench", table))] == [
        "no header with the columns 'test' and 't/s' stands above it",
        "2 cells under 3 columns",
        "nan is not finite",
    ]
    sql = 'INSERT INTO llama_bench (build_commit, avg_ts) VALUES ("8cf427ff", "7.5");\n'
    assert "sql is not read; run llama-bench with -o jsonl" in told(read("llama-bench", sql))[0]
    half = ",".join(FIELDS) + "\n" + QUOTED[0][:40]
    assert f"4 values under {len(FIELDS)} columns" in told(read("llama-bench", half))[0]


@pytest.mark.parametrize("deep", ['{"a":' * 100_000, '{"avg_ts": ' + "[" * 100_000])
def test_llama_bench_output_nested_too_deeply_is_named(deep: str) -> None:
    reading = read("llama-bench", f"{deep}\n{json.dumps(OBJECTS[0])}\n")
    assert speeds(reading) == [("prefill", 95.125, 2)]
    assert [line.split(": {")[0] for line in told(reading)] == ["line 1: not a whole JSON object (nested too deeply)"]


@pytest.mark.parametrize("name", ["avg_ts", "n_gen", "samples_ts", "model_type"])
def test_a_field_of_llama_bench_that_is_nested_is_named(name: str) -> None:
    for value in ("[[1.5]]", '{"a": 1}', "[" * 700 + "]" * 700):
        reading = read("llama-bench", json.dumps({**OBJECTS[0], name: "?"}).replace('"?"', value))
        assert speeds(reading) == []
        assert told(reading)[0].startswith(f"line 1: {name} is neither a value nor a list of values: ")


# --- csv -------------------------------------------------------------------------------------------------------


def test_csv_rows() -> None:
    reading = read(
        "csv",
        "# by hand\nhardware,model,scheme,metric,value,threads,prompt_tokens,note,sd\n"
        'm2,3b-world,q4f16_1,decode,26.3,,256,"screen, evening",0.2\n\nm2,3b-world,q4f16_1,load,3.5,4,,,\n',
    )
    assert speeds(reading) == [("decode", 26.3, 3), ("load", 3.5, 5)]
    said = {"hardware": "m2", "model": "3b-world", "scheme": "q4f16_1"}
    assert reading.figures[0].says == {**said, "prompt_tokens": 256, "note": "screen, evening"}
    assert reading.figures[0].facts == {"sd": 0.2}
    assert reading.figures[1].says == {**said, "threads": 4}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("metric;value\n", "line 1: no column 'metric;value'; "),
        ("metric,value,thread\n", "no column 'thread'; did you mean 'threads'?"),
        ("metric,value,value\n", "the column 'value' stands there twice"),
        ("hardware,metric\n", "the header lacks value"),
        ("metric,value\ndecode,12,5\n", "line 2: 3 values under 2 columns"),
        ("metric,value\ndecode,\n", "line 2: value is empty"),
        ("metric,value\ndecode,fast\n", "line 2: 'fast' is not a number"),
        ("metric,value\ndecode,NaN\n", "line 2: NaN is not finite"),
        ("metric,value\ndecode,1e999\n", "line 2: 1e999 is not finite"),
        ("metric,value\ndecode,-3\n", "line 2: -3 is not above 0"),
        ("metric,value\ndecoding,3\n", "no metric 'decoding' to import; did you mean 'decode'?"),
        ("metric,value\nparity,1e-6\n", "no metric 'parity' to import; "),
        ("metric,value,unit\ndecode,3,ms\n", "decode is in tok/s, not ms"),
        ("metric,value,threads\ndecode,3,0\n", "'0' is not a whole number from 1"),
        ('metric,value,note\ndecode,3,"a" b\n', "line 2: not csv ("),
    ],
)
def test_csv_that_cannot_be_taken(text: str, why: str) -> None:
    reading = read("csv", text)
    assert speeds(reading) == []
    assert len(told(reading)) == 1
    assert why in told(reading)[0]


# --- all of them -----------------------------------------------------------------------------------------------


def test_utf_16_as_powershell_redirects_and_a_cut_character() -> None:
    assert speeds(PARSERS["mlc-chat"](lines_of(MLC.encode("utf-16")))) == [("prefill", 362.7, 6), ("decode", 72.4, 6)]
    assert lines_of(b"\xef\xbb\xbfa\r\n\xe4\xbd") == ("a", "\ufffd")


SNIPPETS = st.sampled_from(
    [
        *CHAT.splitlines(),
        *MLC.splitlines(),
        *TABLE.splitlines(),
        *QUOTED,
        ",".join(FIELDS),
        "[",
        "{",
        "}",
        "metric,value",
    ]
)


@given(st.lists(st.one_of(SNIPPETS, st.text(max_size=40)), max_size=20), st.sampled_from(sorted(PARSERS)))
def test_no_text_breaks_a_parser_and_every_figure_is_on_its_line(parts: list[str], source: str) -> None:
    lines = lines_of("\n".join(parts).encode("utf-8", "replace"))
    reading = PARSERS[source](lines)
    for figure in reading.figures:
        assert 0 < figure.value < float("inf")
        assert 1 <= figure.line <= len(lines)
    for rejected in reading.rejected:
        assert 1 <= rejected.line <= len(lines)
        assert "\n" not in str(rejected)
