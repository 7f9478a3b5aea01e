"""From names to a loaded session: the one way in for the command line, the suites and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from threadpoolctl import threadpool_limits

from backends.api import BackendInfo, Closing, Session, Unsupported
from backends.index import load_backend
from harness.measure import timed_load
from harness.models import Model, open_model
from reference.numerics import Arithmetic
from reference.weights import Weights


@dataclass(frozen=True)
class Opened:
    """A loaded session with what a row says of it. ``load_ns`` is the time ``load`` took."""

    session: Session
    info: BackendInfo
    version: str | None
    arithmetic: Arithmetic
    load_ns: int


@contextmanager
def open_session(
    backend: str,
    model: str | Model | Weights = "tiny",
    scheme: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    isolate: bool = False,
) -> Iterator[Opened]:
    """Load ``model`` into ``backend``; closes the session at the end.

    ``scheme=None`` is the backend's first. Raises UnknownBackend, InputError, Unavailable or Unsupported.
    """
    if isolate:
        raise Unsupported("sessions run in this process only; isolate=True is not available in this version")
    module = load_backend(backend)
    info: BackendInfo = module.INFO
    scheme = scheme or next(iter(info.schemes))
    if scheme not in info.schemes:
        raise Unsupported(f"{backend} has no scheme {scheme}; it has {', '.join(info.schemes)}")
    if device.split(":")[0] not in info.devices:
        raise Unsupported(f"{backend} does not run on {device}; it runs on {', '.join(info.devices)}")
    check(module)
    weights = _weights(model)
    # Whatever numpy the backend uses gets as many threads as were asked for; its own pools are its own switch.
    with threadpool_limits(threads, user_api="blas"):
        session, load_ns = timed_load(lambda: module.load(weights, scheme, device, threads))
        try:
            yield Opened(session, info, version(module), info.arithmetic(scheme, device), load_ns)
        finally:
            if isinstance(session, Closing):
                session.close()


def check(module: ModuleType) -> None:
    """Raise Unavailable if the backend says that it cannot run here."""
    declared = getattr(module, "check", None)
    if declared is not None:
        declared()


def version(module: ModuleType) -> str | None:
    """Version of the runtime, where the backend tells it."""
    declared = getattr(module, "version", None)
    return None if declared is None else str(declared())


def _weights(model: str | Model | Weights) -> Weights:
    if isinstance(model, str):
        return open_model(model).weights
    return model.weights if isinstance(model, Model) else model
