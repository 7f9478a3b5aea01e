"""Which of a machine's cards ``cuda:0``, ``cuda:1`` are: CUDA numbers them otherwise than the driver's tools do.

Those list cards by PCI bus. CUDA puts the fastest first unless CUDA_DEVICE_ORDER is PCI_BUS_ID, which :func:`settle`
therefore sets, before a runtime is imported, where the user has set none; and CUDA_VISIBLE_DEVICES chooses among them.
Where the user has set another order a card is known by its UUID or by being the only one, and else not for certain.

Needs only the standard library, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

ORDER, VISIBLE, BY_BUS = "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "PCI_BUS_ID"
_COMMAND = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")


def settle() -> None:
    """Number by PCI bus, here and in every process started from here, unless the user has said otherwise."""
    os.environ.setdefault(ORDER, BY_BUS)


def words(told: Mapping[str, str] | None = None) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lists; ``None`` where it is not set. ``told``: the environment."""
    visible = (os.environ if told is None else told).get(VISIBLE)
    return None if visible is None else [word.strip() for word in visible.split(",")]


def by_bus(told: Mapping[str, str] | None = None) -> bool:
    """Whether CUDA's numbers are those of the driver's tools."""
    return (os.environ if told is None else told).get(ORDER, BY_BUS) == BY_BUS


def numbered(uuids: Sequence[str], told: Mapping[str, str] | None = None) -> list[int | None]:
    """The place in ``uuids`` of ``cuda:0``, ``cuda:1``, ...; ``None`` for a card that is not known for certain.

    ``uuids`` are those of every card by PCI bus, empty where nobody tells.
    """
    certain = by_bus(told) or len(uuids) == 1
    found: list[int | None] = []
    listed = words(told)
    for word in map(str, range(len(uuids))) if listed is None else listed:
        if word.isdigit():
            if int(word) >= len(uuids):  # CUDA stops at the first that it does not know
                break
            found.append(int(word) if certain else None)
            continue
        if word.startswith("MIG-") or (word.startswith("GPU-") and not all(uuids)):  # a part of a card; nobody tells
            found.append(None)
            continue
        matching = [i for i, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if len(matching) != 1:
            break
        found += matching
    return found


def asked_uuids(count: int) -> list[str]:
    """UUIDs of the machine's ``count`` cards, from nvidia-smi; empty ones where that does not tell as many."""
    text = ""
    if shutil.which(_COMMAND[0]):
        try:
            done = subprocess.run(list(_COMMAND), capture_output=True, text=True, timeout=10, check=True)
            text = done.stdout
        except (OSError, subprocess.SubprocessError):
            pass
    lines = [line.strip() for line in text.splitlines()]
    return lines if len(lines) == count and all(line.startswith("GPU-") for line in lines) else [""] * count
