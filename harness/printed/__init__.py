"""What other programs print of their speed -> figures, each with the line it stands on.

A parser is a function of the text's lines. A line that it knows gives figures; a line that shows a speed, or
stands in a table of speeds, and cannot be read is rejected with the reason; anything else is chatter and only
counted. Nothing is guessed, averaged or converted: one printed speed is one figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from harness.printed.csv_rows import read as read_csv
from harness.printed.faster_rwkv import read as read_faster_rwkv
from harness.printed.figures import Figure, Lines, Reading, Rejected
from harness.printed.llama_bench import read as read_llama_bench
from harness.printed.mlc_chat import read as read_mlc_chat

Parser = Callable[[Lines], Reading]

#: What ``--from`` takes, and what ``prints`` of a phone in the inventory does, ``csv`` apart.
PARSERS: Mapping[str, Parser] = {
    "mlc-chat": read_mlc_chat,
    "faster-rwkv": read_faster_rwkv,
    "llama-bench": read_llama_bench,
    "csv": read_csv,
}

__all__ = ["PARSERS", "Figure", "Lines", "Parser", "Reading", "Rejected", "lines_of"]


def lines_of(data: bytes) -> tuple[str, ...]:
    """The lines of a program's output. UTF-16 with its mark, as PowerShell redirects, is read too.

    What is no UTF-8, such as a character that a killed program cut in half, becomes U+FFFD.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        text = data.decode("utf-8-sig", "replace")
    return tuple(line.rstrip("\r").replace("\r", " ") for line in text.split("\n"))
