"""What a session gives while it is measured, looked at outside the timed spans: host logits, all of them finite.

Needs only the standard library and numpy, and Python 3.9, because foreign interpreters run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.samples import NonFinite


class MeasureError(Exception):
    """A request that cannot be measured, or a session that broke its contract while measured; one line."""


@dataclass
class Watch:
    """Remembers the first logit that is not finite, and refuses what is not host logits."""

    found: NonFinite | None = None

    def see(self, logits: Any, phase: str, sample: int, step: int) -> None:
        """Look at what ``step`` of a sample gave. Raises :class:`MeasureError` for what is not host logits."""
        # An array still on a device, or a promise of one, would have been timed before it was computed.
        if not isinstance(logits, np.ndarray) or logits.ndim != 1 or logits.size == 0:
            what = f"an array of shape {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
            raise MeasureError(f"forward returned {what}; float32 numpy (n_vocab,) in host memory is the contract")
        if self.found is None and not np.isfinite(logits).all():
            bad = np.isnan(logits)
            index = int(np.argmax(bad if bad.any() else np.isinf(logits)))
            self.found = NonFinite(phase, sample, step, index, str(float(logits[index])))
