"""Rows as a document: which text each ``--format`` is, and writing it to a file."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.rows import Row, document, line
from harness.store import StoreError
from reports.tables import markdown, tables, to_csv
from reports.terminal import draw

#: Width of a table in a file, where there is no terminal to ask.
_FILE_WIDTH = 160


def formatted(rows: Sequence[Row], kind: str) -> str:
    """``rows`` as ``table``, ``md``, ``csv``, ``json`` or ``jsonl``."""
    if kind == "json":
        return json.dumps(document(rows), indent=1, allow_nan=False) + "\n"
    if kind == "jsonl":
        return "".join(line(row) for row in rows)
    if kind == "csv":
        return to_csv(rows)
    if kind == "md":
        return "\n".join(markdown(table) for table in tables(rows))
    out = io.StringIO()
    for table in tables(rows):
        draw(table, out, _FILE_WIDTH)
    return out.getvalue()


def check_output(path: str | None) -> None:
    """Raise StoreError now if ``--output`` could not be written after the run."""
    if path is None:
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is a folder" if Path(path).is_dir() else f"folder {folder} does not exist or is not writable"
        raise StoreError(f"cannot write {path}: {why}")


def write_output(path: str, text: str) -> None:
    """Write whole or not at all; raises StoreError."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=Path(path).parent, encoding="utf-8", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
