"""Rows as a document: which text each ``--format`` is, and writing it to a file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from harness.rows import Row, document, line
from harness.store import StoreError
from reports.tables import markdown, tables, to_csv
from reports.terminal import render


def formatted(rows: Sequence[Row], kind: str, width: int | None = None, colour: bool = False) -> str:
    """``rows`` as ``table``, ``md``, ``csv``, ``json`` or ``jsonl``.

    width    columns a ``table`` may take; None: what it needs
    colour   escape sequences for a terminal in a ``table``
    """
    if kind == "json":
        return json.dumps(document(rows), indent=1, allow_nan=False) + "\n"
    if kind == "jsonl":
        return "".join(line(row) for row in rows)
    if kind == "csv":
        return to_csv(rows)
    if kind == "md":
        return "\n".join(markdown(table) for table in tables(rows))
    return "\n".join(render(table, width, colour) for table in tables(rows))


def check_output(path: str | None, store: Path) -> None:
    """Raise StoreError now if ``--output`` could not be written after the run, or would replace the store."""
    if path is None:
        return
    if os.path.exists(store) and os.path.exists(path) and os.path.samefile(store, path):
        raise StoreError(f"cannot write {path}: it is the store of measured rows; give --output another file")
    if os.path.isdir(path):
        raise StoreError(f"cannot write {path}: it is a folder; give a file in it")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise StoreError(f"cannot write {path}: Permission denied; give a file that you may write")
    if os.path.exists(path) and not os.path.isfile(path):
        return
    part = _part(path)
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)  # a name too long, a folder that cannot be searched
        part.touch()
    except OSError as error:
        raise StoreError(_explain(path, error)) from None
    part.unlink()


def write_output(path: str, text: str | bytes) -> None:
    """Write whole or not at all, a pipe or a device as it is; raises StoreError."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            # Never replaced: a device whose place a file takes is gone for everybody.
            Path(path).write_bytes(data)
            return
        part = _part(path)
        try:
            part.write_bytes(data)
            target = os.path.realpath(path)
            if os.path.exists(target):
                part.chmod(os.stat(target).st_mode & 0o777)
            os.replace(part, target)
        finally:
            with suppress(OSError):
                part.unlink()
    except OSError as error:
        raise StoreError(_explain(path, error)) from None


def _part(path: str) -> Path:
    """A new name beside the file that ``path`` leads to."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")


def _explain(path: str, error: OSError) -> str:
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        return f"cannot write {path}: the folder {folder} does not exist; create it or give another file"
    return f"cannot write {path}: {error.strerror or error}; give another file"
