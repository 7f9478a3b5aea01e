"""What a backend's file says of the environment it needs: its PEP 723 header.

https://packaging.python.org/en/latest/specifications/inline-script-metadata/
"""

from __future__ import annotations

import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from harness.names import did_you_mean
from reference.errors import InputError

_BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
_TOP = ("requires-python", "dependencies", "tool")
_OURS = ("no-deps",)


class BadHeader(InputError):
    """A PEP 723 header that cannot be understood, in one line."""


@dataclass(frozen=True)
class Requirements:
    """An environment as declared. ``no_deps``: installed without what they themselves require."""

    python: str
    dependencies: tuple[str, ...]
    no_deps: tuple[str, ...]

    def takes(self, version: str) -> bool:
        """Whether a Python of that version will do."""
        return SpecifierSet(self.python).contains(version, prereleases=True)


def declared(path: Path) -> Requirements | None:
    """The header of a file; ``None`` if it has none. Raises :class:`BadHeader`."""
    with tokenize.open(path) as file:  # in the encoding that Python reads it in
        blocks = [m for m in _BLOCK.finditer(file.read()) if m["type"] == "script"]
    if not blocks:
        return None
    if len(blocks) > 1:
        raise BadHeader(f"{path}: two script headers; leave one")
    lines = blocks[0]["content"].splitlines()
    text = "\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # not at the top: the far end of an ssh connection has none, and reads no headers
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadHeader(f"{path}: the script header is no TOML: {error}") from None
    return _requirements(table, path)


def _requirements(table: dict[str, Any], path: Path) -> Requirements:
    tool = table.get("tool", {})
    ours = tool.get("rwkv-bench", {}) if isinstance(tool, dict) else tool
    if not isinstance(ours, dict):
        raise BadHeader(f"{path}: tool and tool.rwkv-bench must be tables in the script header")
    for names, known in ((table, _TOP), (ours, _OURS)):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise BadHeader(f"{path}: the script header has no {name!r}; {hint}it has {', '.join(known)}")
    python = table.get("requires-python", "")
    lists = (table.get("dependencies", []), ours.get("no-deps", []))
    if not isinstance(python, str) or not all(map(_strings, lists)):
        raise BadHeader(f"{path}: requires-python must be a string, dependencies and no-deps lists of strings")
    try:
        SpecifierSet(python)
        for text in (*lists[0], *lists[1]):
            Requirement(text)
    except (InvalidSpecifier, InvalidRequirement) as error:
        raise BadHeader(f"{path}: {' '.join(str(error).split())}") from None
    return Requirements(python, tuple(lists[0]), tuple(lists[1]))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
