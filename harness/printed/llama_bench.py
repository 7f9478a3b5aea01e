"""llama.cpp's ``llama-bench``: its table (``-o md``), csv, json and jsonl, with log lines between or not.

    | model        |     size | params | backend | threads |  test |           t/s |
    | rwkv6 1B Q8_0 | 1.58 GiB | 1.60 B | CPU     |       4 | pp512 | 95.12 ± 0.40 |

``pp512`` is a prefill of 512 tokens, ``tg128`` a decode of 128; ``pp512+tg128`` is both together and is not
taken. ``@ d512`` means after 512 tokens. The value is the mean over the repetitions; its standard deviation,
and in json the single ones, are kept as facts. Source: tools/llama-bench of ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from harness.printed.figures import (
    Figure,
    Lines,
    Reading,
    Rejected,
    Unusable,
    cells_of,
    number,
    plain,
    shown,
    shows_speed,
    spread,
    whole,
)

_TEST = re.compile(r"(pp|tg) ?(\d+)(?: @ d ?(\d+))?")
_SPREAD = re.compile(r"(\S+)(?:\s*(?:±|\+/-|\+-)\s*(\S+))?")
_RULE = re.compile(r"\|[-:| ]+\|")
_BUILD = re.compile(r"build: (\S+ \(\d+\))")
_OBJECT = re.compile(r"\[?\s*\{")

#: Fields of csv and json, and columns of the table, that say what was run.
_FACTS = (
    *("model_filename", "model_type", "model_size", "model_n_params", "backends", "cpu_info", "gpu_info"),
    *("n_gpu_layers", "n_batch", "n_ubatch", "flash_attn", "stddev_ts", "samples_ts"),
    *("model", "size", "params", "backend", "ngl", "fa"),
)
_READ = ("n_prompt", "n_gen", "n_depth", "avg_ts", "n_threads", "test_time", "build_commit", "build_number")
_SQL = "sql is not read; run llama-bench with -o jsonl"


def read(lines: Lines) -> Reading:
    """Every test of any mix of the formats, in the order printed."""
    found = _Found()
    header: list[str] = []
    at = 0
    while at < len(lines):
        text = plain(lines[at])
        at += 1
        if _OBJECT.match(text):
            at = found.objects(lines, at)
        elif text.startswith("|"):
            header = found.table_row(text, at, header)
        elif "avg_ts" in text and "n_prompt" in text and "," in text:
            at = found.comma_rows(lines, at)
        elif build := _BUILD.fullmatch(text):
            found.built_by(build[1])
        elif text.upper().startswith("INSERT INTO"):
            found.reject(at, text, _SQL)
        elif shows_speed(text):
            found.reject(at, text, "not a form that llama-bench prints")
        else:
            found.ignored += bool(text)
    return Reading(tuple(found.figures), tuple(found.rejected), found.ignored)


class _Found:
    """What has been read so far."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.rejected: list[Rejected] = []
        self.ignored = 0

    def reject(self, line: int, text: str, why: str) -> None:
        self.rejected.append(Rejected(line, shown(text), why))

    def take(self, line: int, text: str, record: Mapping[str, Any]) -> None:
        try:
            self.figures.append(_figure(record, line, shown(text)))
        except Unusable as error:
            self.reject(line, text, str(error))

    def built_by(self, build: str) -> None:
        """The build that a table's last line names holds for the rows above it."""
        self.figures = [
            figure if "backend_version" in figure.says else _saying(figure, "backend_version", build)
            for figure in self.figures
        ]

    def table_row(self, text: str, line: int, header: list[str]) -> list[str]:
        """One line of a Markdown table; returns the header that holds from here on."""
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if "t/s" in cells and "test" in cells:
            return cells
        if _RULE.fullmatch(text):
            return header
        if not header:
            self.reject(line, text, "no header with the columns 'test' and 't/s' stands above it")
        elif len(cells) != len(header):
            self.reject(line, text, f"{len(cells)} cells under {len(header)} columns")
        else:
            self.take(line, text, _from_table(dict(zip(header, cells, strict=True))))
        return header

    def comma_rows(self, lines: Lines, at: int) -> int:
        """The csv rows below the header that is line ``at``; returns the number of the last line used."""
        header = _cells(plain(lines[at - 1]))
        while at < len(lines):
            text = plain(lines[at])
            cells = _cells(text)
            if len(cells) == len(header):
                self.take(at + 1, text, dict(zip(header, cells, strict=True)))
            elif text.startswith('"'):
                self.reject(at + 1, text, f"{len(cells)} values under {len(header)} columns")
            elif text.startswith("|") or _OBJECT.match(text):
                return at
            else:
                self.ignored += bool(text)
            at += 1
        return at

    def objects(self, lines: Lines, at: int) -> int:
        """The JSON objects that begin in line ``at``; returns the number of the last line used."""
        last = _object_end(lines, at)
        text = "\n".join(lines[at - 1 : last])
        decoder, start = json.JSONDecoder(parse_constant=_refuse), text.index("{")
        while start >= 0:
            line = at + text.count("\n", 0, start)
            try:
                record, end = decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                why = "nested too deeply" if isinstance(error, RecursionError) else why
                self.reject(line, text[start:], f"not a whole JSON object ({why})")
                break
            if "avg_ts" in record:
                self.take(line, " ".join(text[start:end].split()), record)
            else:
                self.reject(line, text[start:end], "a JSON object without avg_ts")
            start = text.find("{", end)
        return last


def _cells(text: str) -> list[str]:
    try:
        return cells_of(text)
    except Unusable:  # cut in the middle of a value; the number of its cells tells that
        return text.split(",")


def _object_end(lines: Lines, at: int) -> int:
    """The number of the line that ends the object begun in line ``at``, or is the last before another begins."""
    for at_line, line in enumerate(lines[at - 1 :], at):
        if at_line > at and _OBJECT.match(line):
            return at_line - 1
        if line.rstrip(" ,]").endswith("}"):
            return at_line
    return len(lines)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not finite")


def _from_table(cells: Mapping[str, str]) -> dict[str, Any]:
    """A row of the Markdown table under the names that csv and json use."""
    test, speed = _TEST.fullmatch(cells["test"]), _SPREAD.fullmatch(cells["t/s"])
    record: dict[str, Any] = {**cells, "avg_ts": speed[1] if speed else cells["t/s"]}
    if speed and speed[2]:
        record["stddev_ts"] = speed[2]
    if test:
        record["n_prompt" if test[1] == "pp" else "n_gen"] = test[2]
        record["n_depth"] = test[3] or "0"
    if "threads" in cells:
        record["n_threads"] = cells["threads"]
    return record


def _figure(record: Mapping[str, Any], line: int, text: str) -> Figure:
    """Raises :class:`Unusable`."""
    for name in (*_READ, *_FACTS):
        if not _is_flat(record.get(name)):
            raise Unusable(f"{name} is neither a value nor a list of values")
    prompt, output, depth = (whole(str(record.get(name) or 0)) for name in ("n_prompt", "n_gen", "n_depth"))
    if bool(prompt) == bool(output):
        test = record.get("test") or f"pp{prompt}+tg{output}"
        raise Unusable(f"test {test} is neither prefill (pp) nor decode (tg) alone")
    value = number(str(record["avg_ts"]))
    says: dict[str, Any] = {"prompt_tokens": prompt} if prompt else {"decode_tokens": output}
    if output and depth:
        says["prompt_tokens"] = depth
    if record.get("n_threads"):
        says["threads"] = whole(str(record["n_threads"]), 1)
    if record.get("test_time"):
        says["date"] = str(record["test_time"])
    if record.get("build_commit"):
        says["backend_version"] = f"{record['build_commit']} ({record.get('build_number', '?')})"
    facts = {name: record[name] for name in _FACTS if record.get(name) not in (None, "")}
    if "stddev_ts" in facts:
        facts["stddev_ts"] = spread(str(facts["stddev_ts"]))
    remark = f"after {depth} tokens" if prompt and depth else ""
    return Figure("prefill" if prompt else "decode", value, line, text, says, {**facts, "depth": depth}, remark)


def _is_flat(value: Any) -> bool:
    return not any(isinstance(item, (dict, list)) for item in (value if isinstance(value, list) else [value]))


def _saying(figure: Figure, name: str, value: str) -> Figure:
    return replace(figure, says={**figure.says, name: value})
