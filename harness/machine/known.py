"""Profiles of hardware by short name, from data sheets: what a prediction and a published figure are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("known.json")


@dataclass(frozen=True)
class Source:
    """Where a figure comes from; ``by`` is ``vendor``, ``third party`` or ``computed``."""

    title: str
    by: str
    url: str

    def __str__(self) -> str:
        return f"{self.title} ({self.by}), {self.url}"


@dataclass(frozen=True)
class Figure:
    """One number of a profile and its source."""

    value: float
    source: Source


@dataclass(frozen=True)
class Profile:
    """Peak figures of one piece of hardware; ``None`` where no source has one.

    read_bytes_per_s   memory bandwidth
    flops              type of the factors -> multiply and add operations per second in matrix products
    """

    short: str
    name: str
    device: str
    read_bytes_per_s: Figure | None
    memory_bytes: Figure | None
    flops: Mapping[str, Figure | None]
    note: str


@lru_cache(maxsize=1)
def profiles() -> dict[str, Profile]:
    """Short name -> profile."""
    told = json.loads(_FILE.read_text(encoding="utf-8"))
    sources = {key: Source(**fields) for key, fields in told["sources"].items()}

    def figure(pair: Any) -> Figure | None:
        return None if pair is None else Figure(float(pair[0]), sources[pair[1]])

    return {
        short: Profile(
            short,
            fields["name"],
            fields["device"],
            figure(fields["read_bytes_per_s"]),
            figure(fields["memory_bytes"]),
            {kind: figure(pair) for kind, pair in fields["flops"].items()},
            fields["note"],
        )
        for short, fields in told["profiles"].items()
    }
