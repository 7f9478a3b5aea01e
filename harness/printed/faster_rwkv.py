"""faster-rwkv: what its ``chat`` prints after an answer when ``FR_SHOW_SPEED`` is set.

    -- time: 5012ms
    -- num tokens: 58
    -- ms per token: 86.4138
    -- tokens per second: 11.5722

One rate over prompt and output together, sampling included. Outside CUDA the prompt runs through the model
token by token (its README: sequence mode is CUDA's only), so there the rate is that of single-token steps and
is taken as decode; with CUDA it is neither prefill nor decode, which :mod:`harness.command_import` refuses.

Without the leading ``--`` a block is not taken: besides the first weeks of ``chat``, ``abc_music`` and
``midi_music`` print it so, and what they call tokens are characters. Source: chat.cpp, python/example/chat.py,
abc_music.cpp and midi_music.cpp of daquexian/faster-rwkv.
"""

from __future__ import annotations

import math
import re

from harness.printed.figures import Figure, Lines, Reading, Rejected, Unusable, number, plain, shown, shows_speed, whole

#: The answer may end without a line break, so a block may begin in the middle of a line.
_TIME = re.compile(r"-- time:\s*(\S+)\s*ms$")
_TOKENS = re.compile(r"-- num tokens:\s*(\S+)$")
_EACH = re.compile(r"-- ms per token:\s*(\S+)$")
_RATE = re.compile(r"-- tokens per second:\s*(\S+)$")
_UNMARKED = re.compile(r"tokens per second:\s*(\S+)$")

#: The rate is printed with six digits.
_DIGITS = 1e-4

REMARK = (
    "one rate over prompt and output, sampling included: decode where the prompt runs token by token, as outside CUDA"
)
_UNMARKED_WHY = (
    "without the leading -- it may be abc_music or midi_music, which count characters; chat prints it with --"
)


def read(lines: Lines) -> Reading:
    """One decode figure per answer; ``facts`` has its tokens (prompt and output) and milliseconds."""
    figures: list[Figure] = []
    rejected: list[Rejected] = []
    ignored = 0
    block: dict[str, str] = {}
    for at, line in enumerate(lines, 1):
        text = plain(line)
        rate = _RATE.search(text)
        if rate:
            try:
                figures.append(_figure(block, rate[1], at, shown(text)))
            except Unusable as error:
                rejected.append(Rejected(at, shown(text), str(error)))
            block = {}
        elif time := _TIME.search(text):
            block = {"time": time[1]}
        elif tokens := _TOKENS.search(text):
            block["tokens"] = tokens[1]
        elif _EACH.search(text):
            continue  # the same rate once more
        elif _UNMARKED.search(text):
            rejected.append(Rejected(at, shown(text), _UNMARKED_WHY))
        elif shows_speed(text) and not text.startswith("ms per token"):
            rejected.append(Rejected(at, shown(text), "not a form that faster-rwkv prints"))
        else:
            ignored += bool(text)
    return Reading(tuple(figures), tuple(rejected), ignored)


def _figure(block: dict[str, str], rate: str, line: int, text: str) -> Figure:
    """Raises :class:`Unusable` for a block that is not whole or contradicts itself."""
    value = number(rate)
    for name, printed in (("time", "-- time"), ("tokens", "-- num tokens")):
        if name not in block:
            raise Unusable(f"no line {printed!r} stands before it")
    milliseconds, tokens = number(block["time"]), whole(block["tokens"], 1)
    computed = 1000 * tokens / milliseconds
    if not math.isclose(value, computed, rel_tol=_DIGITS):
        raise Unusable(f"{rate} contradicts {tokens} tokens in {milliseconds:g} ms, which is {computed:.6g}")
    facts = {"tokens": tokens, "milliseconds": milliseconds}
    return Figure("decode", value, line, text, facts=facts, remark=REMARK)
