"""A backend that can be opened again: over other weights, with another scheme, with a change of arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backends.api import BackendInfo, Session
from backends.index import load_backend
from harness.models import Model
from harness.session import Apart, Opened, open_session
from reference.numerics import Arithmetic
from reference.weights import Weights


@dataclass(frozen=True)
class Bench:
    """How the backend under test is opened; called with weights it is an :data:`~harness.localize.evidence.Opener`.

    ``model``: whose weights, given as such, are opened as the model itself, so that a worker finds them where they lie.
    """

    backend: str
    scheme: str
    device: str = "cpu"
    threads: int | None = None
    isolate: bool | None = None
    apart: Apart | None = None
    model: Model | None = None

    @contextmanager
    def __call__(self, weights: Weights) -> Iterator[Session]:
        with self.open(weights) as opened:
            yield opened.session

    @contextmanager
    def open(
        self, weights: Weights, scheme: str | None = None, change: Mapping[str, Any] | None = None
    ) -> Iterator[Opened]:
        """Raises what :func:`harness.session.open_session` raises."""
        what = self.model if self.model is not None and weights is self.model.weights else weights
        place = (self.device, self.threads, self.isolate, self.apart)
        with open_session(self.backend, what, scheme or self.scheme, *place, change=change) as opened:
            yield opened

    @property
    def adjustable(self) -> bool:
        """Whether the backend's arithmetic can be changed at all."""
        return hasattr(load_backend(self.backend), "adjust")

    @property
    def schemes(self) -> dict[str, Arithmetic]:
        """What else it offers on this device, with the arithmetic it declares for each."""
        info: BackendInfo = load_backend(self.backend).INFO
        return {name: info.arithmetic(name, self.device) for name in info.schemes}
