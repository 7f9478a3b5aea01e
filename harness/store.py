"""Results on disk: an append-only JSONL file, one row a line, each line on the disk before the next is measured.

Writers of one file, on one machine, take turns by an advisory lock. A line is one write; what a killed
writer left unfinished is named by the reader and costs only itself. A reader never changes the file.

    StoreError (InputError)          what, where, what to do, in one line
    TruncatedStore (UserWarning)     a line that was never finished; the rest was read
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.foreign import of_another, packed, unknown
from harness.rows import SCHEMA, Row, RowError, identity, line
from reference.errors import InputError

#: Schema n -> a function from a record of schema n to one of schema n + 1.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_LOCK_SECONDS = 30.0
_LOCK_POLL_SECONDS = 0.005
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

#: How every line and every document begins; what begins so and never ends was cut off.
_LINE_START = '{"schema":'
_DOCUMENT_START = re.compile(r'\s*\{\s*("schema"\s*:\s*\d+\s*,\s*)?"rows"\s*:')


class StoreError(InputError):
    """Results that cannot be written or read, explained in one line."""


class TruncatedStore(UserWarning):
    """A result file with a line that a killed writer never finished; the message names it."""


def append(path: str | os.PathLike[str], row: Row) -> None:
    """Add one row; when this returns the row is on the disk.

    Creates the file but not its folder. Raises :class:`StoreError` and leaves earlier rows as they were.
    """
    text = line(row).encode("ascii")
    try:
        with _opened(path) as file, _locked(file, path) as locked:
            end = os.fstat(file).st_size
            if end and os.pread(file, 1, end - 1) != b"\n":
                text = b"\n" + text
            try:
                _write(file, text)
            except OSError:
                if locked:  # nobody else has written since, so the half line can be taken back
                    with suppress(OSError):  # a device cannot be cut; the first error is the one to tell
                        os.ftruncate(file, end)
                raise
            _flush(file)
    except OSError as error:
        raise StoreError(_explain(path, error)) from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise :class:`StoreError` now rather than after the first hour. Creates the file if there is none."""
    try:
        with _opened(path):
            pass
    except OSError as error:
        raise StoreError(_explain(path, error)) from None


def read(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a JSONL store or of a JSON document, in file order, migrated to this schema.

    Raises :class:`StoreError` naming the line; warns :class:`TruncatedStore` for lines never finished.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        what = "there is no such file" if error.errno == errno.ENOENT else error.strerror
        raise StoreError(f"cannot read results from {os.fspath(path)}: {what}") from None
    data = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
    whole = _document(data, path)
    return _read_lines(data, path) if whole is None else whole


def migrate(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A decoded record with its ``schema`` -> the record in this schema, without it. Raises StoreError."""
    schema = _readable_schema(record.get("schema"), where)
    record = {name: value for name, value in record.items() if name != "schema"}
    for step in range(schema, SCHEMA):
        if step not in MIGRATIONS:
            raise StoreError(f"{where}: schema {schema} can no longer be read; convert it with an older rwkv-bench")
        record = MIGRATIONS[step](record)
    return record


def _readable_schema(schema: Any, where: str) -> int:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise StoreError(f"{where}: schema is {schema!r}; a file of rwkv-bench results has a number there")
    if schema > SCHEMA:
        raise StoreError(f"{where}: schema {schema}; this rwkv-bench reads up to {SCHEMA}; upgrade rwkv-bench")
    return schema


def duplicates(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Pairs ``(first, again)`` of positions that hold the same result, as after a file was joined to itself."""
    seen: dict[tuple[Any, ...], int] = {}
    return [(seen[key], i) for i, key in enumerate(map(identity, rows)) if seen.setdefault(key, i) != i]


def _document(data: bytes, path: str | os.PathLike[str]) -> list[Row] | None:
    """Rows of a file that is one JSON document; None if it is not one. Raises StoreError for another program's."""
    where = os.fspath(path)
    whose = packed(data)
    try:
        found = None if whose else _loads(data.decode("utf-8"))
    except ValueError:
        return None
    whose = whose or of_another(found)
    if whose is not None:
        raise StoreError(f"{where}: not a file of rwkv-bench results but {whose}")
    return _rows_of(found, where) if isinstance(found, dict) and "rows" in found else None


def _rows_of(found: dict[str, Any], where: str) -> list[Row]:
    """Rows of a decoded document."""
    schema = _readable_schema(found.get("schema"), where)
    if not isinstance(found["rows"], list):
        raise StoreError(f"{where}: 'rows' is not a list; this is not a file of rwkv-bench results")
    return [
        _row({**item, "schema": schema} if isinstance(item, dict) else item, f"{where}, row {i}")
        for i, item in enumerate(found["rows"], 1)
    ]


def _read_lines(data: bytes, path: str | os.PathLike[str]) -> list[Row]:
    """Rows of lines, and of documents that stand among them, as after ``cat``."""
    rows: list[Row] = []
    at, number = 0, 1
    while at < len(data):
        where = f"{os.fspath(path)}, line {number}"
        end = data.find(b"\n", at)  # not splitlines, which also splits at separators inside text
        end = len(data) if end < 0 else end
        if _DOCUMENT_START.match(data[at : at + 200].decode("utf-8", "replace")):
            found, end = _embedded(data, at, where)
            rows += _rows_of(found, where)
        elif data[at:end].strip():
            rows += _line(data[at:end], where, end == len(data))
        number += data.count(b"\n", at, end + 1)
        at = end + 1 if data[end : end + 1].isspace() else end
    return rows


def _embedded(data: bytes, at: int, where: str) -> tuple[dict[str, Any], int]:
    """The document that begins at ``at``, and where it ends. Read as lines, one cut short would be an empty store."""
    try:
        text = data[at:].decode("utf-8").lstrip()
        found, length = _DECODER.raw_decode(text)
    except ValueError as error:
        raise StoreError(f"{where}: the JSON document is damaged or cut short ({error}); export it again") from None
    start = len(data) - len(text.encode("utf-8"))
    return found, start + len(text[:length].encode("utf-8"))


def _line(raw: bytes, where: str, last: bool) -> list[Row]:
    """The row of one line; none, and a warning, if it was never finished."""
    try:
        record = _loads(raw.decode("utf-8"))
    except ValueError as error:
        # Only what follows the last newline can be cut off without looking like one of our lines.
        if (last and raw.lstrip().startswith(b"{")) or _is_cut_off(raw):
            warnings.warn(f"{where}: never finished, its writer was killed; left out", TruncatedStore, stacklevel=4)
            return []
        raise StoreError(f"{where}: not JSON ({error}); mend or delete this line") from None
    return [_row(record, where)]


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise StoreError(f"{where}: a {type(record).__name__}, not an object; this is not a file of rwkv-bench results")
    if "schema" not in record and "kind" not in record:
        raise StoreError(f"{where}: not a row of rwkv-bench but {of_another(record) or unknown(record)}")
    try:
        return Row.from_dict(migrate(record, where))
    except RowError as error:
        raise StoreError(f"{where}: {error}") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


#: Strict JSON: NaN and Infinity, which json lets through, are errors.
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _loads(text: str) -> Any:
    return _DECODER.decode(text)


def _is_cut_off(raw: bytes) -> bool:
    """Whether a line is the beginning of one of ours, or the zeros a power cut leaves, and no more.

    Damage inside a whole line still ends in its closing brace; a beginning never balances.
    """
    text = raw.decode("ascii", "replace")
    if not text.strip("\0"):
        return True
    if not (text.startswith(_LINE_START) or _LINE_START.startswith(text)):
        return False
    outside = re.sub(r'"(?:[^"\\]|\\.)*("|\\?$)', "", text)  # without its strings, a last unfinished one included
    return outside.count("{") > outside.count("}")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _locked(file: int, path: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold the file's lock; False on a file system that has none, where one write must do. Closing frees it."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(
                    f"cannot write results to {os.fspath(path)}: another process has held its lock for "
                    f"{_LOCK_SECONDS:.0f} s; end that process or give another file"
                ) from None
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            yield False
            return
        else:
            yield True
            return


def _write(file: int, text: bytes) -> None:
    """One write; more only if the system took less than all of it."""
    while text:
        text = text[os.write(file, text) :]


def _flush(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a pipe or a terminal has nothing to flush
            raise


def _explain(path: str | os.PathLike[str], error: OSError) -> str:
    name, folder = os.fspath(path), os.path.dirname(os.path.abspath(path))
    if error.errno == errno.ENOENT:
        why = f"the folder {folder} does not exist; create it or give another file"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        why = f"{error.strerror}; give a file that you may write"
    elif error.errno == errno.EISDIR:
        why = "it is a folder; give a file in it"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why = f"{error.strerror}; make room or give another file, the rows before this one are kept"
    else:
        why = f"{error.strerror or error}; give another file"
    return f"cannot write results to {name}: {why}"
