"""A finding as text for people and as the JSON of ``rwkv-bench localize``."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from harness.localize import heatmap
from harness.localize.finding import CLEAN, Finding, Seen

SCHEMA = 1
WIDTH = 80

#: Lines of the history in the text: those before the fault, and the one after it.
_BEFORE, _AFTER = 6, 1

#: Token ids of the failing prompt in the text; the JSON has all.
_IDS = 16

_HIDDEN = "the fault hides when watched: with the trace points read, the logits are right"
_WATCHED = {
    "same": "watching changes nothing: traced and untraced logits are equal to the bit",
    "differs": "watching changes the result: traced and untraced logits differ",
    "hidden": _HIDDEN,
}


def as_json(finding: Finding, about: Mapping[str, Any]) -> str:
    """One document; ``about``: what was run. What is not a number is null."""
    document = {
        "verdict": finding.verdict,
        "method": finding.method,
        "layer": finding.layer,
        "point": finding.point,
        "token_index": finding.token_index,
        "channel": finding.channel,
        "cause": finding.cause,
        "error": finding.error,
        "bound": finding.bound,
        "span": list(finding.span),
        "history": [asdict(seen) | {"bad": seen.bad} for seen in finding.history],
        "prompt": list(finding.prompt),
        "prompt_stopped": finding.prompt_stopped or None,
        "watched": finding.watched or None,
        "notes": list(finding.notes),
        "broke": finding.broke,
        "fix": None if finding.fix is None else asdict(finding.fix),
        "no_fix": finding.no_fix or None,
        **about,
    }
    return plain_json(document)


def plain_json(document: Mapping[str, Any]) -> str:
    """A document of this project's schema; arrays as lists, what is not a number as null."""
    return json.dumps(_plain({"schema": SCHEMA, **document}), indent=1, allow_nan=False) + "\n"


def as_text(finding: Finding, about: Mapping[str, Any], prompt: str = "") -> str:
    """A report in lines of at most 80 columns; ``prompt``: the failing one that was found, as text."""
    title = f"{about['backend']} {about['scheme']} on {about['device']} · {about['model']}"
    title += f" · {about['prompt_tokens']} token{'s' * (about['prompt_tokens'] > 1)}"
    lines = [f"{title}: {finding.verdict.upper()} (by {finding.method})", ""]
    if finding.verdict == CLEAN:
        lines += _nearest(finding.history)
    else:
        lines += _field("where", _where(finding))
        if finding.error is not None and finding.bound is not None:
            lines += _field("error", f"{finding.error:.2e}, bound {finding.bound:.2e}")
    if finding.cause:
        lines += _field("cause", finding.cause)
    lines += _fix(finding)
    if finding.prompt:
        lines += _field("prompt", _prompt(finding, prompt))
    if finding.watched:
        lines += _field("watched", _WATCHED[finding.watched])
    for note in finding.notes:
        lines += _field("note", note)
    if finding.verdict != CLEAN and finding.history:
        lines += ["", *_history(finding)]
    grid = heatmap.grid(finding.history)
    return "\n".join(lines) + "\n" + (f"\n{heatmap.text(grid)}" if grid else "")


def _nearest(history: Sequence[Seen]) -> list[str]:
    """What came nearest to its bound."""
    ratios = {one.point: one.error / one.bound for one in history if one.error is not None and one.bound}
    if not ratios:
        return []
    point = max(ratios, key=lambda name: ratios[name])
    text = f"{len(history)} results compared; the nearest to its bound is {point}, at {ratios[point]:.2f} of it"
    return _field("seen", text)


def _where(finding: Finding) -> str:
    parts = [finding.point or "unknown"]
    if finding.layer is not None:
        parts.append(f"layer {finding.layer}")
    if finding.token_index is not None:
        parts.append(f"token {finding.token_index}")
    if finding.channel is not None:
        parts.append(f"channel {finding.channel}")
    if finding.span:
        parts.append(f"or, not shown, {', '.join(finding.span)}")
    return ", ".join(parts)


def _prompt(finding: Finding, text: str) -> str:
    tokens, count = finding.prompt, len(finding.prompt)
    ids = ",".join(str(token) for token in tokens[:_IDS]) + (f",... ({count} in all)" if count > _IDS else "")
    shown = f" {text!r}" if text else ""
    told = ", none of which can be left out" if count > 1 else ""
    if finding.prompt_stopped:
        told = f"; the search stopped after {finding.prompt_stopped}"
    return f"{count} token{'s' * (count > 1)}{told}: {ids}{shown}"


def _fix(finding: Finding) -> list[str]:
    if finding.fix is None:
        return _field("fix", finding.no_fix) if finding.no_fix else []
    fix = finding.fix
    seen = "verified on the backend" if fix.verified else "not verified on the backend, by emulation only"
    text = f"{fix.what} ({seen})"
    if fix.cost is not None:
        text += f"; decode runs at {fix.cost:.2f} of its speed"
    return _field("fix", text + (f"; {fix.note}" if fix.note else ""))


def _history(finding: Finding) -> list[str]:
    seen = finding.history
    bad = next((i for i, one in enumerate(seen) if one.point == finding.point), None)
    if bad is None:
        bad = next((i for i, one in enumerate(seen) if one.bad), len(seen) - 1)
    shown = seen[max(0, bad - _BEFORE) : bad + 1 + _AFTER]
    lines = [f"{'on the way':<24}{'truth max':>10}{'got max':>10}{'error':>10}{'bound':>10}{'alone':>9}"]
    return [*lines, *(_line(one) for one in shown)]


def _line(one: Seen) -> str:
    figures = (one.largest, one.got)
    text = f"{one.point:<24}" + "".join(f"{_figure(x):>10}" for x in figures)
    error = one.problem[:10] if one.problem else _error(one.error)
    text += f"{error:>10}{_error(one.bound):>10}{_error(one.local):>9}"
    return text + (" <" if one.bad else "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _field(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, WIDTH - 9, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{name if i == 0 else '':<9}{line}" for i, line in enumerate(wrapped)]


def _plain(value: Any) -> Any:
    """JSON has no NaN, no Inf and no arrays."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(x) for x in value]
    return value
