"""Files that are given for results by mistake, recognised by how they begin: which program's, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: First bytes -> what the file is and what to do.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "compressed by gzip; unpack it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first (unzstd)"),
    (b"PK\x03\x04", "a zip archive (an artifact as downloaded from CI is one, a .pth too); unpack it first"),
    (b"\xff\xfe", "UTF-16, as PowerShell's > writes it; use --output, or store it again as UTF-8"),
    (b"\xfe\xff", "UTF-16; store it again as UTF-8"),
    (b"\x89PNG", "a picture; give the rows it was drawn from"),
    (b"<", "HTML or XML; give the rows it was made from (--format json)"),
    (b"**", "Markdown; give the rows it was made from (--format json)"),
    (b"|", "Markdown; give the rows it was made from (--format json)"),
    (b"kind,run,time,", "CSV of ours, which lacks samples and intervals; give the rows it was made from"),
)

#: Keys that a program's JSON object has -> whose it is.
_OBJECTS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"machine_info", "benchmarks"}),
        "a record of pytest-benchmark; give the store that the run wrote (--store FILE), or compare two such records "
        "with pytest-benchmark compare",
    ),
    (frozenset({"context", "benchmarks"}), "results of Google Benchmark"),
    (frozenset({"results", "versions"}), "results of lm-evaluation-harness"),
    (frozenset({"verdict", "method", "history"}), "a finding of rwkv-bench localize, which has no rows"),
)

#: The same for the objects of a list, or of lines.
_ITEMS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"build_commit", "avg_ts"}), "results of llama-bench; rwkv-bench import --from llama-bench reads them"),
    (frozenset({"name", "unit", "value"}), "figures for github-action-benchmark; give the rows they were made from"),
)


def packed(data: bytes) -> str | None:
    """What ``data`` is, if its first bytes tell that it is no JSON."""
    start = data.lstrip()
    return next((what for magic, what in _MAGIC if start.startswith(magic)), None)


def of_another(found: Any) -> str | None:
    """Whose a decoded JSON value is, if it can be told; None for what may be ours."""
    if isinstance(found, Mapping):
        known = (*_OBJECTS, *_ITEMS)
        if set(found) == {"results"}:
            return "results of hyperfine or of another program"
        return next((whose for keys, whose in known if keys <= set(found)), None)
    if isinstance(found, list) and found and isinstance(found[0], Mapping):
        if {"kind", "metric", "backend"} <= set(found[0]):
            return 'a bare list of rows; put it into {"schema": 1, "rows": [...]}, or one row a line'
        return of_another(found[0])
    return None


def unknown(found: Any) -> str:
    """What to say of a JSON value that is no row and nobody's known."""
    if isinstance(found, Mapping):
        keys = json.dumps(list(found)[:4], ensure_ascii=True)[1:-1]
        return f"a JSON object with {keys or 'nothing in it'}" + (", ..." if len(found) > 4 else "")
    return f"a JSON {'list' if isinstance(found, list) else type(found).__name__}"
