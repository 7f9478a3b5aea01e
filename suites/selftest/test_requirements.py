"""The header by which a backend's file says what environment it needs (PEP 723)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.isolation.requirements import BadHeader, Requirements, declared

GOOD = """\
# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "torch==2.13.0",  # with a comment
#
#     "numpy>=1.26; python_version >= '3'",
# ]
# [tool.rwkv-bench]
# no-deps = ["bigdl-llm==2.4.0"]
# [tool.other]
# whatever = true
# ///
'''What it is.'''
"""
MEANT = Requirements(">=3.10,<3.12", ("torch==2.13.0", "numpy>=1.26; python_version >= '3'"), ("bigdl-llm==2.4.0",))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.py"


def header(*lines: str) -> str:
    return "\n".join(["# /// script", *(f"# {line}" if line else "#" for line in lines), "# ///"]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# a licence\n\n" + GOOD,
        "'''Docs.'''\n\nimport os\n\n" + GOOD,
        "# /// other\n# dependencies = 3\n# ///\n\n" + GOOD,
    ],
    ids=["on top", "after a shebang", "further down", "after another kind of block"],
)
def test_a_header_is_found(text: str, path: Path) -> None:
    path.write_text(text)
    assert declared(path) == MEANT


@pytest.mark.parametrize("data", [GOOD.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + GOOD.encode()])
def test_files_from_windows(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    assert declared(path) == MEANT


def test_a_file_in_another_encoding(path: Path) -> None:
    path.write_bytes("# -*- coding: latin-1 -*-\n# Größe\n".encode("latin-1") + GOOD.encode())
    assert declared(path) == MEANT


@pytest.mark.parametrize(
    "text",
    ["", "x = 1\n", "# /// script\n", "# /// script\n# dependencies = []\nx = 1\n", "  # /// script\n  # ///\n"],
    ids=["empty", "none", "not closed", "interrupted", "indented"],
)
def test_what_is_no_header(text: str, path: Path) -> None:
    path.write_text(text)
    assert declared(path) is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["dependencies = ["], "the script header is no TOML"),
        (["requires_python = '>=3'"], "no 'requires_python'; did you mean 'requires-python'?"),
        (["dependency = []"], "no 'dependency'; did you mean 'dependencies'?"),
        (["[tool.rwkv-bench]", "no_deps = []"], "no 'no_deps'; did you mean 'no-deps'?"),
        (["requires-python = 3.11"], "requires-python must be a string"),
        (["dependencies = 'torch'"], "lists of strings"),
        (["dependencies = [1]"], "lists of strings"),
        (["dependencies = {torch = '2'}"], "lists of strings"),
        (["[tool.rwkv-bench]", "no-deps = 'x'"], "lists of strings"),
        (["tool = 3"], "must be tables"),
        (["[tool]", "rwkv-bench = 'x'"], "must be tables"),
        (["requires-python = 'three'"], "Invalid specifier: 'three'"),
        (["dependencies = ['torch==']"], "torch=="),
        (["dependencies = ['-r requirements.txt']"], "-r requirements.txt"),
        (["dependencies = ['--index-url=http://x']"], "--index-url"),
        (["x = " + "[" * 5000], "no TOML"),
    ],
)
def test_a_wrong_header_is_one_line_that_names_the_file(lines: list[str], words: str, path: Path) -> None:
    path.write_text(header(*lines))
    with pytest.raises(BadHeader) as caught:
        declared(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_two_headers_are_one_too_many(path: Path) -> None:
    path.write_text(GOOD + "\n" + GOOD)
    with pytest.raises(BadHeader, match="two script headers"):
        declared(path)


LINES = ["# /// script", "# ///", "#", "# x = 1", "# [tool]", "# dependencies = []", "x = 1", "# /// b", "#x"]
NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}(==[0-9]\.[0-9]{1,2})?", fullmatch=True)


@settings(max_examples=60)
@given(st.lists(NAMES, max_size=5), st.lists(NAMES, max_size=3), st.sampled_from(["", ">=3.9", "==3.11.*", "~=3.10"]))
def test_what_is_declared_is_read(dependencies: list[str], no_deps: list[str], python: str) -> None:
    text = header(
        f"requires-python = {json.dumps(python)}",
        f"dependencies = {json.dumps(dependencies)}",
        "[tool.rwkv-bench]",
        f"no-deps = {json.dumps(no_deps)}",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.py"
        path.write_text(text)
        assert declared(path) == Requirements(python, tuple(dependencies), tuple(no_deps))


@settings(max_examples=150)
@given(st.lists(st.sampled_from(LINES) | st.text(max_size=10)))
def test_any_text_is_read_or_refused(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.py"
        path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
        try:
            found = declared(path)
        except (BadHeader, SyntaxError):
            return
        assert found is None or isinstance(found, Requirements)


@pytest.mark.parametrize(
    ("python", "takes", "refuses"),
    [
        (">=3.10,<3.12", ["3.10.0", "3.11.99"], ["3.9.18", "3.12.0"]),
        ("==3.11.4", ["3.11.4"], ["3.11.5"]),
        ("", ["3.9.0", "3.14.0rc1"], []),
    ],
)
def test_versions(python: str, takes: list[str], refuses: list[str]) -> None:
    wanted = Requirements(python, (), ())
    assert all(wanted.takes(version) for version in takes)
    assert not any(wanted.takes(version) for version in refuses)
