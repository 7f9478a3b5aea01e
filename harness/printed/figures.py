"""A printed speed, a line that cannot be read as one, and what the parsers share."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reference.errors import InputError

Lines = Sequence[str]

#: Characters of a line that are kept and shown.
SHOWN = 160

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)(\(.*\))?", re.IGNORECASE)
_SPEED = re.compile(r"\btok(en)?s?\s*/\s*s|\bt/s\b|\btok(en)?s?[ _]per[ _]s|\bms per token", re.IGNORECASE)
_DIGIT = re.compile(r"\d|\b(nan|inf|n/a)\b", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Unusable(InputError):
    """A printed value that is no result; one line."""


@dataclass(frozen=True)
class Figure:
    """One printed value.

    value   in the metric's unit, finite and above 0
    line    where it stands, from 1, and what stands there
    says    fields of the row that the text itself gives: ``threads``, ``prompt_tokens``, ``date``, ...
    facts   what else belongs to it, in JSON's types: spread, the program's own name of the model, ...
    remark  what a reader must know of the value, or nothing
    """

    metric: str
    value: float
    line: int
    text: str
    says: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Rejected:
    """A line that shows a value and cannot be taken, and why."""

    line: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}: {self.text}"


@dataclass(frozen=True)
class Reading:
    """What a text holds; ``ignored`` counts the other lines that are not empty."""

    figures: tuple[Figure, ...]
    rejected: tuple[Rejected, ...]
    ignored: int


def number(text: str) -> float:
    """The value of a printed number. Raises :class:`Unusable` for one that is no result."""
    text = text.strip()
    if _NOT_FINITE.fullmatch(text):
        raise Unusable(f"{text} is not finite")
    if not _NUMBER.fullmatch(text):
        raise Unusable(f"{text[:40]!r} is not a number")
    value = float(text)
    if not math.isfinite(value):
        raise Unusable(f"{text[:40]} is not finite")
    if not value > 0:
        raise Unusable(f"{text} is not above 0")
    return value


def spread(text: str) -> float:
    """A printed standard deviation, 0 included. Raises :class:`Unusable`."""
    return 0.0 if re.fullmatch(r"0+(\.0*)?", text.strip()) else number(text)


def whole(text: str, least: int = 0) -> int:
    """A printed whole number from ``least`` on. Raises :class:`Unusable`."""
    text = text.strip()
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < least:
        raise Unusable(f"{text[:40]!r} is not a whole number from {least}")
    return int(text)


def cells_of(line: str) -> list[str]:
    """The values of one line of csv. Raises :class:`Unusable`."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise Unusable(f"not csv ({error})") from None


def shows_speed(text: str) -> bool:
    """Whether a line looks as if it told a speed, whoever printed it."""
    return bool(_SPEED.search(text) and _DIGIT.search(text))


def plain(text: str) -> str:
    """A line without terminal colours and surrounding space."""
    return _COLOUR.sub("", text).strip()


def shown(text: str) -> str:
    """A line as it is kept and shown: one line, not too long."""
    text = " ".join(plain(text).split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
