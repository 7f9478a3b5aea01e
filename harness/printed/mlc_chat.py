"""MLC-LLM: what ``/stats`` and ``/metrics`` of its chat print, and its phone applications show.

    prefill: 362.7 tok/s, decode: 72.4 tok/s         /stats; ``encode:`` for prefill until May 2023
    Statistics: prefill: 3477.5 tok/s, decode: ...   ChatModule.stats()
    ----------- prefill -----------                  the verbose statistics of 2023-10 to 2024-05
    throughput: 216.6 tok/s
    last_finished_request_decode_tokens_per_s  5.66  /metrics

Source: cpp/llm_chat.cc up to #2440, python/mlc_llm/interface/chat.py and serve/engine_base.py after it. Until
#2387 ``/stats`` was the mean over all turns since ``/reset``, after it the last request.
"""

from __future__ import annotations

import re

from harness.printed.figures import Figure, Lines, Reading, Rejected, Unusable, number, plain, shown, shows_speed

_PAIR = re.compile(r"\b(prefill|encode|decode):\s*(\S+)\s+tok/s")
_HEADER = re.compile(r"-{3,}\s*(prefill|decode)\s*-{3,}")
_THROUGHPUT = re.compile(r"throughput:\s*(\S+)\s+tok/s")
_METRIC = re.compile(r"((?:last_finished_request_)?(prefill|decode)_tokens_per_s)\s+(\S+)")


def read(lines: Lines) -> Reading:
    """Every prefill and decode speed, in the order printed."""
    figures: list[Figure] = []
    rejected: list[Rejected] = []
    ignored = 0
    section = ""
    for at, line in enumerate(lines, 1):
        text = plain(line)
        header = _HEADER.fullmatch(text)
        if header:
            section = header[1]
            continue
        found = _speeds(text, section)
        for metric, value, facts in found:
            try:
                figures.append(Figure(metric, number(value), at, shown(text), facts=facts))
            except Unusable as error:
                rejected.append(Rejected(at, shown(text), f"{metric}: {error}"))
        if not found and shows_speed(text):
            rejected.append(Rejected(at, shown(text), "not a form that MLC-LLM's chat prints"))
        elif not found and text:
            ignored += 1
    return Reading(tuple(figures), tuple(rejected), ignored)


def _speeds(text: str, section: str) -> list[tuple[str, str, dict[str, str]]]:
    """``(metric, printed value, facts)`` of one line."""
    pairs: list[tuple[str, str, dict[str, str]]] = [
        ("prefill" if name == "encode" else name, value, {}) for name, value in _PAIR.findall(text)
    ]
    if pairs:
        return pairs
    verbose = _THROUGHPUT.fullmatch(text)
    if verbose and section:
        return [(section, verbose[1], {})]
    metric = _METRIC.fullmatch(text)
    return [(metric[2], metric[3], {"name": metric[1]})] if metric else []
