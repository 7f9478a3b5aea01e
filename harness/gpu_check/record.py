"""What is kept of a gpu-check: the profile of the machine, and rows with what they were measured under."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.card import Card, card_of
from harness.gpu_check.steps import Command
from harness.hardware import Hardware, describe
from harness.rows import Row

#: Packages whose versions a figure depends on.
_PACKAGES = ("torch", "triton", "flash-linear-attention", "fla-core", "rwkv", "transformers", "mlx", "numpy")


def versions() -> dict[str, str]:
    """Installed packages that bear on figures."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def profile(hardware: Hardware, rehearsal: bool) -> dict[str, Any]:
    """The machine as it is now: full name, driver, clocks, memory, versions, others on the card."""
    card = card_of(hardware.device)
    return {
        "schema": 1,
        "time": now(),
        "hardware": hardware.name,
        "device": hardware.device,
        "rehearsal": rehearsal,
        "detail": describe(hardware),
        "card": None if card is None else card.detail(),
        "versions": versions(),
    }


def kept(row: Row, step: str, setting: Mapping[str, Any]) -> Row:
    """A measured row as it is recorded, under which step and versions."""
    return replace(row, kind="recorded", extra={**row.extra, "gpu_check": {"step": step, **setting}})


def completed(row: Row, line: str, card: Card | None) -> Row:
    """A row with its command line, and the card as it was before, where it has not said so itself."""
    about = {**(card.detail() if card is not None else {}), **(row.hardware_detail or {})}
    return replace(row, command=row.command or line, hardware_detail=about or None)


def failed(command: Command, hardware: Hardware, run: str, verdict: str, reason: str, line: str) -> Row:
    """The row of a command that left none, or whose end was not its own."""
    return Row(
        kind="recorded",
        run=run,
        time=now(),
        hardware=hardware.name,
        hardware_detail=describe(hardware),
        backend=command.backend,
        model=command.model,
        scheme=command.scheme,
        device=hardware.device,
        metric="parity",
        verdict=verdict,
        reason=reason,
        command=line,
    )


def localized(command: Command, hardware: Hardware, run: str, found: Mapping[str, Any], line: str) -> Row:
    """A row of what ``localize`` found: a PASS where that is what was planted."""
    point, verdict = found.get("point"), str(found.get("verdict"))
    right = verdict == "clean" if command.expected is None else (verdict, point) == ("non-finite", command.expected)
    wanted = "clean" if command.expected is None else f"non-finite at {command.expected}"
    told = f"{verdict} at {point}" if point else verdict
    reason = f"localize: {told}" if right else f"localize: {told}, where {wanted} was planted; {found.get('cause')}"
    row = failed(command, hardware, run, "PASS" if right else "FAIL", reason, line)
    return replace(row, first_bad={"point": point, "verdict": verdict, "token_index": found.get("token_index")})


def not_given_back(before: Card | None, after: Card | None, allowed: int = 64 << 20) -> str | None:
    """Why the card's memory is not what it was; ``None`` if it is, or nobody tells."""
    if before is None or after is None or before.free_bytes is None or after.free_bytes is None:
        return None
    lost = before.free_bytes - after.free_bytes
    return None if lost <= allowed else f"{lost >> 20} MiB of device memory were not given back"


def shared(before: Card | None, after: Card | None) -> str | None:
    """Who else was on the card before or after, whose memory cannot be told from a command's; ``None``: nobody."""
    others = {process.pid: process for card in (before, after) if card is not None for process in card.others}
    return f"shared with {', '.join(map(str, others.values()))}" if others else None


def append(path: Path, row: Row) -> None:
    """At once, so that nothing measured is lost."""
    from harness.store import append as append_row

    append_row(path, row)


def save_profile(path: Path, told: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
