"""Reading a store: every row that was finished, and one clear line for what cannot be read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from harness import store
from harness.rows import document, line
from harness.store import StoreError, TruncatedStore, append, read
from suites.selftest.test_store import row


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture(autouse=True)
def _no_warning_unasked() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestRead:
    def test_document(self, path: Path) -> None:
        rows = [row(i) for i in range(3)]
        for indent in (None, 1):
            path.write_text(json.dumps(document(rows), indent=indent))
            assert read(path) == rows

    def test_blank_lines_byte_order_mark_and_windows_ends(self, path: Path) -> None:
        path.write_bytes(
            b"\xef\xbb\xbf" + line(row(0)).encode().replace(b"\n", b"\r\n") + b"\n" + line(row(1)).encode()
        )
        assert read(path) == [row(0), row(1)]

    def test_separators_inside_text_do_not_split(self, path: Path) -> None:
        odd = row(0, reason="a\u2028b\x1cc")
        path.write_text(json.dumps({"schema": 1, **odd.to_dict()}, ensure_ascii=False), encoding="utf-8")
        assert read(path) == [odd]

    def test_a_last_line_cut_anywhere_costs_itself_only(self, path: Path) -> None:
        text = line(row(1, reason='brace { in "text\\"'))
        for cut in range(1, len(text) - 1):
            path.write_text(line(row(0)) + text[:cut])
            with pytest.warns(TruncatedStore, match="line 2: never finished, its writer was killed"):
                assert read(path) == [row(0)]
            with path.open("a") as file:  # what append does, without its flush
                file.write("\n" + line(row(2)))
            with pytest.warns(TruncatedStore, match="line 2"):
                assert read(path) == [row(0), row(2)]

    def test_a_last_line_cut_in_another_programs_order_of_fields(self, path: Path) -> None:
        path.write_text(line(row(0)) + '{"kind": "measured", "schema"')
        with pytest.warns(TruncatedStore, match="line 2"):
            assert read(path) == [row(0)]

    def test_zeros_that_a_power_cut_left(self, path: Path) -> None:
        path.write_bytes(line(row(0)).encode() + b"\0" * 100 + b"\n" + line(row(1)).encode())
        with pytest.warns(TruncatedStore, match="line 2"):
            assert read(path) == [row(0), row(1)]

    def test_reading_changes_nothing(self, path: Path) -> None:
        path.write_text(line(row(0)) + '{"schema":1,"ki')
        before = path.read_bytes(), path.stat().st_mtime_ns
        with pytest.warns(TruncatedStore):
            read(path)
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            ("not json", "line 2: not JSON"),
            ("{broken", "line 2: not JSON"),
            (line(row(1)).strip().replace(":1,", ":1;", 1), "line 2: not JSON"),
            (line(row(1)).strip() * 2, "line 2: not JSON"),
            (line(row(1)).strip().replace('"value":1.0', '"value":NaN'), "line 2: not JSON (NaN is not JSON)"),
            ("[1, 2]", "line 2: a list, not an object"),
            ("{}", "line 2: not a row of rwkv-bench but a JSON object with nothing in it"),
            ('{"results": []}', "line 2: not a row of rwkv-bench but results of hyperfine"),
            ('{"kind": "measured"}', "line 2: schema is None"),
            ('{"schema": "1"}', "line 2: schema is '1'"),
            ('{"schema": true}', "line 2: schema is True"),
            ('{"schema": 0}', "line 2: schema is 0"),
            ('{"schema": 1}', "line 2: row: field 'kind' is missing"),
            ('{"schema": 3}', "line 2: schema 3; this rwkv-bench reads up to 1; upgrade"),
            ("\udcff", "line 2: not JSON"),
        ],
    )
    def test_a_bad_line_in_the_middle(self, path: Path, bad: str, says: str) -> None:
        path.write_bytes((line(row(0)) + bad + "\n" + line(row(2))).encode("utf-8", "surrogateescape"))
        with pytest.raises(StoreError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}, {says}")
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('{"schema": 3, "rows": [{}]}', "rows.jsonl: schema 3; this rwkv-bench reads up to 1; upgrade"),
            ('{"schema": 3, "rows": []}', "schema 3; this rwkv-bench reads up to 1; upgrade"),
            ('{"rows": []}', "schema is None"),
            ('{"schema": 1, "rows": {}}', "'rows' is not a list"),
            ('{"schema": 1, "rows": [5]}', "row 1: a int, not an object"),
            ('{"schema": 1, "rows": [{"kind": "measured"', "damaged or cut short"),
            ('{\n "schema": 1,\n "rows": [\n  {"kind": "measured"', "damaged or cut short"),
        ],
    )
    def test_a_bad_document(self, path: Path, text: str, says: str) -> None:
        path.write_text(text)
        with pytest.raises(StoreError) as raised:
            read(path)
        assert str(path) in str(raised.value)
        assert says in str(raised.value)

    def test_missing_and_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="there is no such file"):
            read(tmp_path / "none.jsonl")
        with pytest.raises(StoreError, match="Is a directory"):
            read(tmp_path)


class TestMigration:
    def test_older_rows_are_brought_up(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = {**row(5).to_dict(), "engine": "b"}
        del old["backend"]
        path.write_text(json.dumps({"schema": 1, **old}) + "\n")
        document_path = path.with_suffix(".json")
        document_path.write_text(json.dumps({"schema": 1, "rows": [old]}))

        def rename(record: dict[str, Any]) -> dict[str, Any]:
            return {**{k: v for k, v in record.items() if k != "engine"}, "backend": record["engine"]}

        def mark(record: dict[str, Any]) -> dict[str, Any]:
            return {**record, "migrated": True}

        monkeypatch.setattr(store, "SCHEMA", 3)
        monkeypatch.setattr(store, "MIGRATIONS", {1: rename, 2: mark})
        expected = [row(5, extra={"migrated": True})]
        assert read(path) == expected
        assert read(document_path) == expected

    def test_one_that_no_one_knows_any_more(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        append(path, row())
        monkeypatch.setattr(store, "SCHEMA", 2)
        with pytest.raises(StoreError, match="line 1: schema 1 can no longer be read"):
            read(path)
