"""What went wrong with a cell, as its rows say it: exceptions, failing checks, and the bundle they leave."""

from __future__ import annotations

import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backends.api import Unavailable, Unsupported
from backends.index import LIBRARIES
from harness import inventory
from harness.bundle import save_bundle
from harness.cell_rows import Job, reproduce
from harness.checks import Check
from harness.isolation.child import ChildDied, ChildTimedOut
from harness.isolation.remote import RemoteError
from harness.measure import MeasureError
from harness.models import Model
from harness.names import one_line
from harness.parity import Gate
from harness.plan import Cell
from harness.rows import Row
from harness.session import Apart, Opened
from harness.tolerance import Truth
from harness.trace_point import first_bad_point
from harness.without_codec import NotComparable, has_codec
from reference.errors import CheckpointError, InputError
from reference.schemes import apply


def failure_row(error: Exception, base: Row, cell: Cell, job: Job, metric: str) -> Row:
    """What an exception of a cell comes to; ``metric`` is what a row would have been about.

    A library of the user's that is none, or another model's, is bad input: the row names it in ``first_bad``.
    """
    verdict, reason = verdict_of(error, cell, job)
    library = os.environ.get(LIBRARIES.get(cell.backend, ""), "")
    named = isinstance(error, CheckpointError) and bool(library)  # the model itself was opened before
    judged = metric in ("prefill", "decode") and out_of_memory(error) is not None  # its parity has a row already
    return replace(
        base,
        metric="parity" if verdict in ("UNAVAILABLE", "UNSUPPORTED") and not judged else metric,
        unit="",
        verdict=verdict,
        reason=one_line(reason),
        first_bad={"library": library} if named else None,
    )


def apart_of(cell: Cell, job: Job) -> Apart | None:
    request = job.request
    host = inventory.load().hosts[cell.hardware.host] if cell.hardware.host else None
    if host is None and request.timeout is None and request.placement is None:
        return None
    return Apart(request.timeout, request.placement, host)


def verdict_of(error: Exception, cell: Cell, job: Job) -> tuple[str, str]:
    """What an exception of a cell makes of it, and why. Device memory that ran out is given back first."""
    if isinstance(error, Unavailable):
        return "UNAVAILABLE", str(error)
    if isinstance(error, (Unsupported, InputError)):
        return "UNSUPPORTED", str(error)
    if isinstance(error, (MeasureError, NotComparable)):
        return "FAIL", str(error)
    if isinstance(error, ChildTimedOut):
        return "TIMEOUT", str(error)
    if isinstance(error, ChildDied):
        return "CRASHED", str(error)
    short = out_of_memory(error)
    if short is not None:
        _give_back(error)
        told = f"{cell.backend} ran out of memory of {cell.hardware.device}: {short}"
        return "UNAVAILABLE", f"{told}; try a smaller scheme, model or prompt"
    remote = isinstance(error, RemoteError)
    lines = error.traceback if isinstance(error, RemoteError) else traceback.format_exc()
    where = save_bundle(job.run, str(cell), {"traceback": lines})
    what = one_line(str(error) if remote else f"{type(error).__name__}: {error}").rstrip(": ")
    return "CRASHED", f"{what}; traceback in {where}"


#: What torch says, its TorchScript among other lines, and MPS in a plain RuntimeError; MLX, whose allocator or command
#: buffer gives up (ml-explore/mlx issue 63, pull request 479).
_SHORT = re.compile(
    r"\b(?:CUDA|HIP|MPS)\b[^.\n]{0,20}\bout of memory\b(?:\. Tried to allocate [\d.]+ \w+)?"
    r"|\[[^\]\n]*malloc[^\]\n]*\] (?:Unable|Attempting) to allocate \d+ bytes"
    r"|Attempting to allocate \d+ bytes(?= which is greater than the maximum allowed buffer size)"
    r"|Insufficient Memory \(\w+:kIOGPUCommandBufferCallbackErrorOutOfMemory\)"
)


def out_of_memory(error: BaseException) -> str | None:
    """What a runtime said of device memory that ran out, here or on the far side; ``None`` for any other error."""
    text = str(error)
    found = _SHORT.search(text)
    if isinstance(error, (RuntimeError, RemoteError)) and found is not None:
        return found[0]
    name = text.partition(":")[0] if isinstance(error, RemoteError) else type(error).__name__
    return one_line(text) if name == "OutOfMemoryError" else None


def _give_back(error: BaseException) -> None:
    """Frames of the traceback hold tensors; what torch, if it is here at all, keeps of them goes back to the device."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.cuda.empty_cache()  # nothing where CUDA has not been used
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()


def first_bad(checks: Sequence[Check]) -> Check | None:
    return next((check for check in checks if not check.passed), None)


def explained(row: Row, cell: Cell, model: Model, job: Job, opened: Opened, truth: Truth, found: Gate) -> Row:
    """A failing parity row with the trace point where it begins, if the backend shows any, and its bundle."""
    known = has_codec(cell.scheme)
    stored = apply(model.weights, cell.scheme) if known else None
    point = None if stored is None else first_bad_point(opened.session, stored, opened.arithmetic, truth.tokens)
    where = f"; {point}" if point else ""
    shown = {**(row.first_bad or {}), "point": point.name if point else None}
    bundle = _bundle(cell, job, opened, truth, found)
    return replace(row, reason=f"{row.reason}{where}; bundle {bundle}", first_bad=shown)


def _bundle(cell: Cell, job: Job, opened: Opened, truth: Truth, found: Gate) -> str:
    """What a failing cell leaves behind: the prompt, truth, what the backend gave, and every check."""
    content: dict[str, Any] = {
        "checks": "\n".join(str(check) for check in (*found.logits, *found.state)),
        "command": reproduce(cell, job),
        "tokens": list(truth.tokens),
        "truth_logits": truth.logits,
        "truth_state": truth.state,
    }
    return os.fspath(save_bundle(job.run, str(cell), content, opened.session, truth.tokens))
