"""What a failing cell leaves behind, for whoever has to find out why: one ``.npz`` file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import Session, StateAccess, Traceable
from harness.cache import state_folder


def save_bundle(
    run: str, cell: str, content: Mapping[str, Any], session: Session | None = None, tokens: Sequence[int] = ()
) -> Path:
    """Write ``content`` and what ``session`` gives for ``tokens``: logits, state, trace where it has them.

    Read it with ``numpy.load``. Lands in the user's state folder, or the temporary one if that is read-only.
    """
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in content.items()}
    if session is not None:
        arrays.update(_observed(session, tokens))
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{run}-{cell}") + ".npz"
    for folder in (state_folder() / "failures", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(folder / name, **arrays)
        except OSError:
            continue
        return folder / name
    return Path("(no folder could be written)")


def _observed(session: Session, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """One more run of the prompt; a session that raises now leaves its exception as text."""
    seen: dict[str, np.ndarray] = {}
    try:
        logits, state = session.forward(tokens, None)
        seen["logits"] = np.asarray(logits)
        if isinstance(session, StateAccess):
            seen["state"] = session.export_state(state)
        if isinstance(session, Traceable):
            session.trace(tokens, None, lambda name, array: seen.__setitem__(f"trace/{name}", np.array(array)))
    except Exception as error:  # noqa: BLE001 - the bundle describes a broken backend and must be written anyway
        seen["exception"] = np.asarray(f"{type(error).__name__}: {error}")
    return seen
