"""What may arrive as an answer: the code of a backend shares the far side's process, and can write to the channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.isolation.frames import FrameError
from reference.numerics import Arithmetic

#: What an answer must have, by request.
_NEEDED: Mapping[str, Sequence[str]] = {
    "open": ("version", "capabilities", "arithmetic", "load_ns", "cpus"),
    "prepare": ("seconds",),
    "forward": ("state",),
    "trace": ("state",),
    "import_state": ("state",),
    "greedy": ("state",),
    "forward_batch": ("state",),
    "first_call": ("samples",),
    "prefill": ("samples",),
    "decode": ("samples",),
    "prefill_begin": ("ns",),
    "decode_begin": ("ns",),
    "prefill_turn": ("taken",),
    "decode_turn": ("taken",),
    "prefill_end": ("samples",),
    "decode_end": ("samples",),
    "peak": ("growth",),
    "rates": ("read_bytes_per_s", "flops", "last_level_bytes"),
}

#: Requests that are answered with an array, or with the type of what the backend gave instead.
_WITH_ARRAY = ("forward", "forward_batch", "logits", "trace", "export_state", "greedy")

_OF_ERRORS = ("kind", "name", "text", "how", "traceback")


def check_answer(header: Mapping[str, Any], arrays: Sequence[np.ndarray], do: str, number: int) -> None:
    """Raise FrameError for what is neither the answer to request ``number``, which was to ``do``, nor its event."""
    if header.get("id") != number:
        raise FrameError("an answer to something that was not asked")
    if not _complete(header, arrays, do):
        raise FrameError("an answer with something missing")


def _complete(header: Mapping[str, Any], arrays: Sequence[np.ndarray], do: str) -> bool:
    if "event" in header:
        if header["event"] == "tap":
            return "name" in header and bool(arrays)
        return header["event"] == "progress" and "text" in header
    if "error" in header:
        return _has(header["error"], _OF_ERRORS)
    if not _has(header.get("ok"), _NEEDED.get(do, ())):
        return False
    if do == "open" and not _declarable(header["ok"]["arithmetic"]):
        return False
    return do not in _WITH_ARRAY or bool(arrays) or "type" in header["ok"]


def _declarable(told: Any) -> bool:
    """Whether that is an :class:`Arithmetic` as plain data, or nothing."""
    try:
        return told is None or bool(Arithmetic(**told))
    except (TypeError, ValueError):
        return False


def _has(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, dict) and all(name in value for name in names)
