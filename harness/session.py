"""From names to a loaded session: the one way in for the command line, the suites and scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from threadpoolctl import threadpool_limits

from backends.api import BackendInfo, Closing, Declaring, Session, Unavailable, Unsupported
from backends.index import load_backend, place
from harness.inventory import Host
from harness.isolation import hosts, start
from harness.isolation.child import TIMEOUT_SECONDS, ChildDied, ChildTimedOut
from harness.isolation.placement import Placement
from harness.isolation.remote import Line, RemoteMeter, remote_session
from harness.isolation.sources import loaded
from harness.measure import timed_load
from harness.meter import HereMeter, Meter, Tell
from harness.models import Model, open_model
from reference.numerics import Arithmetic
from reference.weights import Weights


@dataclass(frozen=True)
class Opened:
    """A loaded session with what a row says of it.

    info      of the backend; ``arithmetic_documented`` is that of ``arithmetic``
    arithmetic  what the session declares of itself (:class:`backends.api.Declaring`), else the backend
    meter     measures it where it runs
    load_ns   the time ``load`` took
    isolated  whether it runs in a process of its own
    cpus      what that process is bound to, if it is
    """

    session: Session
    info: BackendInfo
    version: str | None
    arithmetic: Arithmetic
    load_ns: int
    meter: Meter
    isolated: bool = False
    cpus: str | None = None


@dataclass(frozen=True)
class Apart:
    """How a process of its own is run: ``timeout`` in seconds without a sign of life, on which CPUs, on which host."""

    timeout: float | None = None
    placement: Placement | None = None
    host: Host | None = None


#: A worker that has converted for longer than this is not the one that is measured.
PREPARED_SECONDS = 0.5

#: Seconds that a conversion may take where no ``--timeout`` is given.
PREPARING_SECONDS = 3 * 3600.0


def needs_isolation(backend: str) -> bool:
    """Whether a backend declares an environment of its own."""
    return start.requirements(load_backend(backend)) is not None


@contextmanager
def open_session(
    backend: str,
    model: str | Model | Weights = "tiny",
    scheme: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    isolate: bool | None = None,
    apart: Apart | None = None,
    tell: Tell = lambda text: None,
    change: Mapping[str, Any] | None = None,
) -> Iterator[Opened]:
    """Load ``model`` into ``backend``; closes the session at the end.

    scheme   ``None``: the backend's first
    isolate  in a process of its own; ``None``: where the backend declares an environment
    change   of its arithmetic, as ``adjust`` of :mod:`backends.api` takes it; ``arithmetic`` stays what is declared

    Raises UnknownBackend, InputError, Unavailable or Unsupported; isolated, also ChildDied, ChildTimedOut
    and RemoteError (:mod:`harness.isolation`).
    """
    module = load_backend(backend)
    info: BackendInfo = module.INFO
    scheme = scheme or next(iter(info.schemes))
    if scheme not in info.schemes:
        raise Unsupported(f"{backend} has no scheme {scheme}; it has {', '.join(info.schemes)}")
    if device.split(":")[0] not in info.devices:
        raise Unsupported(f"{backend} does not run on {device}; it runs on {', '.join(info.devices)}")
    if apart is not None and apart.host is not None:
        isolate = True
    if isolate is None:
        isolate = apart is not None or needs_isolation(backend)
    if isolate:
        load = _Load(backend, module, _weights(model), *_named(model), scheme, device, threads, change)
        with _opened_apart(load, apart or Apart(), tell) as opened:
            yield opened
    else:
        with _opened_here(module, model, scheme, device, threads, change) as opened:
            yield opened


@contextmanager
def _opened_here(
    module: ModuleType,
    model: str | Model | Weights,
    scheme: str,
    device: str,
    threads: int | None,
    change: Mapping[str, Any] | None,
) -> Iterator[Opened]:
    try:
        check(module)
    except Unavailable as error:
        if start.requirements(module) is None:
            raise
        raise Unavailable(error.reason, f"{error.how_to_get_it}; or leave out --in-process") from None
    weights = _weights(model)
    meter = HereMeter()
    try:
        # Whatever numpy the backend uses gets as many threads as were asked for; its own pools are its own switch.
        with threadpool_limits(threads, user_api="blas"):
            prepare = getattr(module, "prepare", None)
            if prepare is not None:
                prepare(weights, scheme, device)
            session, load_ns = timed_load(lambda: loaded(module, weights, scheme, device, threads, change))
            meter.session = session
            try:
                told = session.declared_arithmetic() if isinstance(session, Declaring) else None
                info, arithmetic = _declared(module.INFO, scheme, device, told)
                yield Opened(session, info, version(module), arithmetic, load_ns, meter)
            finally:
                if isinstance(session, Closing):
                    session.close()
    finally:
        meter.close()


@dataclass(frozen=True)
class _Load:
    """What a worker is to load. ``name``, ``seed``: of a model whose weights are made, not read."""

    backend: str
    module: ModuleType
    weights: Weights
    name: str
    seed: int | None
    scheme: str
    device: str
    threads: int | None
    change: Mapping[str, Any] | None = None


@contextmanager
def _opened_apart(load: _Load, apart: Apart, tell: Tell) -> Iterator[Opened]:
    with _line_there(load, apart, tell) if apart.host else _line_here(load, apart, tell) as (line, found):
        if load.change:
            found["change"] = dict(load.change)
        answer = line.open(tell, **found, threads=load.threads, cpus=apart.placement and str(apart.placement))
        told = None if answer["arithmetic"] is None else Arithmetic(**answer["arithmetic"])
        info, arithmetic = _declared(load.module.INFO, load.scheme, load.device, told)
        yield Opened(
            session=remote_session(line, answer["capabilities"]),
            info=info,
            version=answer["version"],
            arithmetic=arithmetic,
            load_ns=answer["load_ns"],
            meter=RemoteMeter(line),
            isolated=True,
            cpus=answer["cpus"],
        )
        with suppress(ChildDied, ChildTimedOut):  # it has answered all that was asked; how it ends changes nothing
            line.ask("close")
            line.child.end()


def _declared(info: BackendInfo, scheme: str, device: str, told: Arithmetic | None) -> tuple[BackendInfo, Arithmetic]:
    """What a backend declares, or a session that knows better; the latter is not documented."""
    if told is None:
        return info, info.arithmetic(scheme, device)
    return replace(info, arithmetic_documented=False), told


#: A line to a started worker, and what it is to open.
_Ready = tuple[Line, dict[str, Any]]


@contextmanager
def _line_here(load: _Load, apart: Apart, tell: Tell) -> Iterator[_Ready]:
    """A worker on this machine that has the model file it wants; ends with the block."""
    line = start.start(load.backend, load.module, load.threads, apart.timeout)
    try:
        if hasattr(load.module, "prepare"):
            line.child.timeout = _preparing(apart)
            if line.prepare(tell, **_asked(load, line)) > PREPARED_SECONDS:
                # It has left libraries and heap behind that are not the backend's.
                line.child.kill()
                line = start.start(load.backend, load.module, load.threads, apart.timeout)
            line.child.timeout = apart.timeout or TIMEOUT_SECONDS
        yield line, _asked(load, line)
    finally:
        line.child.kill()


def _asked(load: _Load, line: Line) -> dict[str, Any]:
    where = start.model_at(load.weights, load.seed, load.name, line.child.folder)
    return {"backend": place(load.backend), "model": where, "scheme": load.scheme, "device": load.device}


@contextmanager
def _line_there(load: _Load, apart: Apart, tell: Tell) -> Iterator[_Ready]:
    """A worker on a host; ends with the block."""
    assert apart.host is not None
    if hasattr(load.module, "prepare"):
        with _started_there(load, apart, tell) as (line, asked):
            line.child.timeout = _preparing(apart)
            line.prepare(tell, **asked)
    with _started_there(load, apart, tell) as ready:
        yield ready


@contextmanager
def _started_there(load: _Load, apart: Apart, tell: Tell) -> Iterator[_Ready]:
    assert apart.host is not None
    with hosts.connected(apart.host) as line:
        where = hosts.model_there(line, apart.host, load.weights, load.seed, load.name, tell)
        hosts.start_there(line, apart.host, load.backend, load.module, load.threads, apart.timeout)
        found = {"backend": hosts.backend_there(load.backend), "model": where}
        yield line, {**found, "scheme": load.scheme, "device": load.device}


def _preparing(apart: Apart) -> float:
    """Seconds that a conversion may take: it says nothing while it runs, is long for a large model, and done once."""
    return PREPARING_SECONDS if apart.timeout is None else 20 * apart.timeout


def check(module: ModuleType) -> None:
    """Raise Unavailable if the backend says that it cannot run here."""
    declared = getattr(module, "check", None)
    if declared is not None:
        declared()


def check_usable(backend: str, module: ModuleType) -> None:
    """Raise Unavailable if a backend, or the environment it needs, is not to be had here; starts nothing."""
    if start.environment(backend, module) is None:
        check(module)


def version(module: ModuleType) -> str | None:
    """Version of the runtime, where the backend tells it."""
    declared = getattr(module, "version", None)
    return None if declared is None else str(declared())


def _weights(model: str | Model | Weights) -> Weights:
    if isinstance(model, str):
        return open_model(model).weights
    return model.weights if isinstance(model, Model) else model


def _named(model: str | Model | Weights) -> tuple[str, int | None]:
    return (model.name, model.seed) if isinstance(model, Model) else ("", None)
