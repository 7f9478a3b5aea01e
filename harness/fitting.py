"""Before a cell is loaded: whether host and card have the memory, and who else is on the card."""

from __future__ import annotations

import warnings
from dataclasses import replace

from backends.index import load_backend
from harness.budget import device_shortage, shortage
from harness.card import card_of, recorded, warning
from harness.models import Model
from harness.plan import Cell, memory_needed
from harness.rows import Row


def fitted(base: Row, cell: Cell, model: Model) -> tuple[Row, str | None]:
    """The row with what the card is now, and why the cell should not start; warns of others on the card.

    Of another machine only the host's memory is known, as it was when it was asked.
    """
    place = cell.hardware
    free = place.facts.get("free_bytes")
    short = shortage(memory_needed(cell, model.config), place.device, None if free is None else int(free))
    if place.host is not None:
        return base, short
    card = card_of(place.device)
    base = replace(base, hardware_detail=recorded(base.hardware_detail, card))
    prompt, backend = cell.workload.prompt_tokens, load_backend(cell.backend)
    batch = cell.workload.batch
    short = short or device_shortage(model.config, cell.scheme, backend, prompt, place.device, card, batch)
    disturbed = warning(place.device, card)
    if disturbed and not short:
        warnings.warn(disturbed, stacklevel=1)
    return base, short
