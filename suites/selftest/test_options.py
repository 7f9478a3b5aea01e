"""The option parser: what it takes, and that nothing makes it do more than raise one line."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.help_texts import COMMANDS, EXAMPLES, TOP
from harness.options import (
    COMMAND_FILES,
    NotInThisVersion,
    TextWanted,
    UsageError,
    command_file,
    output_format,
    parse,
)

README = Path(__file__).parents[2] / "README.md"

OPTIONS = (
    *("--model", "--backend", "--quant", "--hardware", "--device", "--threads", "--seed", "--dry-run", "--help"),
    *("--prompt-tokens", "--decode-tokens", "--repeats", "--quick", "--format", "--output", "--store", "--version"),
    *("--tokens", "--temperature", "--top-p", "-h", "--", "-", "--isolate", "--in-process", "--timeout", "--cpus"),
)
WORDS = st.one_of(
    st.sampled_from([*COMMANDS, *OPTIONS, "0", "-1", "1", "nan", "json", "tiny,169m", ",", "", "all", "9" * 5000]),
    st.text(max_size=12),
    st.tuples(st.sampled_from(OPTIONS), st.text(max_size=5)).map("=".join),
)


@given(st.lists(WORDS, max_size=8))
def test_any_words_give_a_namespace_or_its_own_errors(argv: list[str]) -> None:
    with suppress(UsageError, NotInThisVersion, TextWanted):
        assert isinstance(parse(argv), Namespace)


def test_no_words_mean_run_with_the_defaults_of_the_help() -> None:
    found = parse([])
    assert (found.command, found.model, found.backend, found.quant) == ("run", ("tiny",), ("all",), ("all",))
    assert (found.hardware, found.device, found.threads, found.seed) == (("local",), ("all",), None, 0)
    assert parse(["--quick"]) == parse(["run", "--quick"])


def test_lists_are_split_and_trimmed() -> None:
    assert parse(["--quant", "fp32, bf16,,"]).quant == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--treads 1", "did you mean '--threads'"),
        ("generate x --token 3", "did you mean '--tokens'"),
        ("lst", "did you mean 'list'"),
        ("frobnicate", "commands: run, parity, list, generate"),
        ("--format jsn", "did you mean 'json'"),
        ("list backend", "did you mean 'backends'"),
        ("--threads 0", "'0' is not a whole number from 1 to 4096"),
        ("--threads -1", "'-1' is not a whole number"),
        ("--prompt-tokens 0", "'0' is not a whole number"),
        ("--repeats 1e3", "'1e3' is not a whole number"),
        ("--decode-tokens ٣", "is not a whole number"),
        ("--seed 99999999999999999999999", "is not a whole number from 0"),
        ("--model ,", "no name is given"),
        ("--output ''", "the path of a file is needed"),
        ("generate", "PROMPT"),
        ("generate x --temperature nan", "not a number from 0 to 100"),
        ("generate x --top-p 1.5", "not a number from 0 to 1"),
        ("generate x --backend all", "one name is needed, not 'all'"),
        ("run run", "unrecognized arguments: run"),
        ("parity --repeats 3", "unrecognized arguments: --repeats 3"),
    ],
)
def test_what_is_wrong_is_named(argv: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(shlex.split(argv))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], *([name, "--help"] for name in (*COMMANDS, *COMMAND_FILES))])
def test_help_fits_a_terminal_and_tells_the_exit_codes(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(TextWanted) as caught:
        parse(argv)
    lines = str(caught.value).splitlines()
    assert max(map(len, lines)) <= 80
    assert "examples:" in lines
    assert "exit status:" in lines


def test_version() -> None:
    for argv in (["--version"], ["--version", "--model", "x"]):
        with pytest.raises(TextWanted, match=r"^rwkv-bench \d"):
            parse(argv)


def commands(text: str) -> list[list[str]]:
    """Arguments of every line of ``text`` that calls rwkv-bench, its remark and other programs left out."""
    found = re.findall(r"^.*?(?<![\w./-])rwkv-bench(?= |$)(.*)$", text, re.MULTILINE)
    return [shlex.split(re.split(r"\s{2,}|\s+#|\s+\|", arguments)[0]) for arguments in found]


FILES = {name: command_file(name).EXAMPLES for name in COMMAND_FILES}


@pytest.mark.parametrize("text", [TOP, *EXAMPLES.values(), *FILES.values()], ids=["top", *EXAMPLES, *FILES])
def test_every_example_of_the_help_can_be_typed(text: str) -> None:
    examples = commands(text)
    assert len(examples) >= 3
    for argv in examples:
        parse(argv)


def test_every_command_of_the_readme_can_be_typed() -> None:
    code = "\n".join(re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
    examples = commands(code)
    assert len(examples) >= 6
    for argv in examples:
        parse(argv)


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        ("", "table"),
        ("--output a.csv", "csv"),
        ("--output a.b/c.JSON", "json"),
        ("--output a.txt", "table"),
        ("--output csv", "table"),
        ("--output a.csv --format md", "md"),
        ("--format jsonl", "jsonl"),
    ],
)
def test_the_format_follows_the_name_of_the_output(argv: str, kind: str) -> None:
    assert output_format(parse(shlex.split(argv))) == kind
