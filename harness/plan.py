"""What was asked -> the cells to run, and a reason for each one that cannot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from backends.api import BackendInfo, Unavailable
from backends.index import LIBRARIES, backend_names, load_backend
from harness.budget import beside_bytes, needed_bytes
from harness.hardware import Hardware
from harness.isolation.placement import Placement, usable
from harness.isolation.requirements import BadHeader
from harness.isolation.start import environment
from harness.measure import Workload
from harness.models import is_generated, model_config, model_names
from harness.names import did_you_mean
from harness.places import check_device_names, devices_of, places_of, threads_of
from reference.config import Config, count_parameters
from reference.errors import ConfigError, InputError
from reference.schemes import SCHEME_CLASSES, SCHEMES, stored_bytes

ALL = "all"


class UnknownScheme(InputError):
    """A ``--quant`` that no system uses; one line."""


@dataclass(frozen=True)
class Request:
    """The options of a run. Lists hold names as the user typed them; ``all`` stands for every usable one.

    isolate             each cell in a process of its own; ``None``: where its backend declares an environment
    timeout, placement  of such a process; either makes every cell run in one
    """

    models: tuple[str, ...] = ("tiny",)
    backends: tuple[str, ...] = (ALL,)
    schemes: tuple[str, ...] = (ALL,)
    hardware: tuple[str, ...] = ("local",)
    devices: tuple[str, ...] = (ALL,)
    threads: int | None = None
    workload: Workload = field(default_factory=lambda: Workload(256, 64))
    seed: int = 0
    isolate: bool | None = None
    timeout: float | None = None
    placement: Placement | None = None

    @property
    def explicit(self) -> bool:
        """Whether every cell was asked for as such: neither backend, scheme nor place comes from ``all``."""
        placed = ALL not in self.devices or not {"local", ALL} & set(self.hardware)
        return ALL not in (*self.backends, *self.schemes) and placed


@dataclass(frozen=True)
class Cell:
    """One backend × scheme × hardware × model × workload."""

    model: str
    backend: str
    scheme: str
    hardware: Hardware
    threads: int
    workload: Workload

    def __str__(self) -> str:
        return f"{self.backend} {self.scheme} on {self.hardware.name}, model {self.model}"


@dataclass(frozen=True)
class Refused:
    """Something asked for that cannot be a cell. ``by_name``: it was named, not part of an ``all``."""

    verdict: str
    reason: str
    backend: str
    scheme: str
    model: str
    hardware: str
    by_name: bool


@dataclass(frozen=True)
class Plan:
    """Cells in the order they run, what was refused, and hardware that is known but not here."""

    cells: tuple[Cell, ...]
    refused: tuple[Refused, ...]
    absent: tuple[str, ...]


def plan(request: Request) -> Plan:
    """Expand a request. Raises InputError, with the nearest right one, for a wrong name of any kind."""
    infos, broken = _backends(request.backends)
    check_scheme_names(request.schemes, list(infos.values()))
    check_device_names(request.devices, list(infos.values()))
    models = expand(request.models, model_names())
    configs = {model: model_config(model) for model in models}
    found = places_of(request.hardware, request.devices)
    _check_places(request, found.here)
    places, where = found.here, ", ".join(place.name for place in found.here)
    unreachable = [
        Refused("UNAVAILABLE", why, ALL, ALL, model, name, True)
        for name, why in found.unreachable.items()
        for model in models
    ]
    if not places:
        return Plan((), tuple(unreachable), found.absent)
    asked = _Asked(request, places, infos)
    cells: list[Cell] = []
    refused: list[Refused] = unreachable
    for model in models:
        refused += [Refused("UNAVAILABLE", why, name, ALL, model, where, False) for name, why in broken.items()]
        for backend in infos:
            runs, lacking = asked.of(model, configs[model], backend)
            cells += runs
            refused += lacking
    if not cells:
        # What `all` leaves out is no failure, unless nothing at all is left of what was asked.
        refused = [replace(refusal, by_name=True) for refusal in refused]
    return Plan(tuple(cells), tuple(refused), found.absent)


def _check_places(request: Request, places: Sequence[Hardware]) -> None:
    """Raise InputError for what cannot be had of this machine, or of another."""
    if request.placement is not None and any(place.host is None for place in places):
        usable(request.placement)
    host = next((place.host for place in places if place.host is not None), None)
    if host is not None and request.isolate is False:
        raise InputError(f"{host} is another machine: its cells cannot run in this process; leave out --in-process")


@dataclass(frozen=True)
class _Asked:
    """A request with what its names have been found to mean."""

    request: Request
    places: tuple[Hardware, ...]
    infos: Mapping[str, BackendInfo]

    def of(self, model: str, config: Config, backend: str) -> tuple[list[Cell], list[Refused]]:
        """The cells of one backend, and what of it cannot be one."""
        request, info = self.request, self.infos[backend]
        named = ALL not in request.backends
        refused: list[Refused] = []

        def refuse(verdict: str, why: str, scheme: str, by_name: bool) -> None:
            where = ", ".join(place.name for place in self.places)
            refused.append(Refused(verdict, why, backend, scheme, model, where, by_name))

        schemes, lacking = match_schemes(request.schemes, info)
        for scheme in lacking:
            why = f"{backend} has no scheme {scheme}; it has {', '.join(info.schemes)}"
            refuse("UNSUPPORTED", why, scheme, scheme in self.nowhere or (named and scheme != ALL))
        fits = [place for place in self.places if place.device.split(":")[0] in info.devices]
        if schemes and not fits:
            why = f"{backend} does not run on {devices_of(self.places)}; it runs on {', '.join(info.devices)}"
            refuse("UNSUPPORTED", why, ALL, named and ALL not in request.devices)
        variable = LIBRARIES.get(backend, "")
        if variable in os.environ and any(place.host is not None for place in fits):
            why = f"{variable} names a library of this machine; name one there in the host's own environment"
            refuse("UNSUPPORTED", f"{backend}: {why}", ALL, named)
            fits = [place for place in fits if place.host is None]
        if backend in self.unready and any(place.host is None for place in fits):
            refuse("UNAVAILABLE", self.unready[backend], ALL, backend in request.backends)
            fits = [place for place in fits if place.host is not None]
        fitting = []
        for scheme in schemes:
            misfit = _misfit(config, scheme)
            if misfit is None:
                fitting.append(scheme)
            elif fits:
                refuse("UNSUPPORTED", misfit, scheme, named and scheme in request.schemes)
        parameters = count_parameters(config)
        cells = [
            Cell(model, backend, scheme, place, request.threads or threads_of(place, parameters), request.workload)
            for place in fits
            for scheme in fitting
        ]
        return cells, refused

    @cached_property
    def nowhere(self) -> set[str]:
        """Schemes that no backend asked for has."""
        infos = self.infos.values()
        return {name for name in self.request.schemes if not any(match_schemes((name,), i)[0] for i in infos)}

    @cached_property
    def unready(self) -> dict[str, str]:
        """Backends whose own environment is not built on this machine, and what to do."""
        lacking: dict[str, str] = {}
        for name in self.infos if self.request.isolate is not False else ():
            try:
                environment(name, load_backend(name))
            except (Unavailable, BadHeader) as error:
                lacking[name] = str(error)
        return lacking


def memory_needed(cell: Cell, config: Config) -> int:
    """Estimated bytes of host memory that a cell takes."""
    backend, prompt = load_backend(cell.backend), cell.workload.prompt_tokens
    batch = beside_bytes(config, cell.workload.batch, prompt)
    return needed_bytes(config, cell.scheme, backend, prompt, is_generated(cell.model)) + batch


def expand(names: tuple[str, ...], every: list[str]) -> list[str]:
    """``all`` -> every name, in their order; repeated names once."""
    wanted = [item for name in names for item in (every if name == ALL else [name])]
    return list(dict.fromkeys(wanted))


def check_scheme_names(names: tuple[str, ...], infos: list[BackendInfo]) -> None:
    """Raise :class:`UnknownScheme`, with the nearest names, for one that no codec or backend knows."""
    known = list(dict.fromkeys([*SCHEMES, *(scheme for info in infos for scheme in info.schemes), *SCHEME_CLASSES]))
    for name in names:
        if name != ALL and name not in known:
            hint = did_you_mean(name, known)
            raise UnknownScheme(f"no scheme {name!r}; {hint}schemes and classes: {', '.join(known)}")


def match_schemes(names: tuple[str, ...], info: BackendInfo) -> tuple[list[str], list[str]]:
    """Schemes of a backend that were asked for, and asked names that it lacks."""
    found: list[str] = []
    lacking: list[str] = []
    for name in dict.fromkeys(names):
        usual = info.usual or tuple(info.schemes)
        hits = [s for s in (usual if name == ALL else info.schemes) if name in (ALL, s, _class(s))]
        found += hits
        if not hits:
            lacking.append(name)
    return [scheme for scheme in info.schemes if scheme in found], lacking


def _class(scheme: str) -> str:
    return SCHEMES[scheme].scheme_class if scheme in SCHEMES else ""


def _misfit(config: Config, scheme: str) -> str | None:
    """Why a scheme cannot store a model of this shape; ``None`` if it can, or only its own system knows."""
    if scheme not in SCHEMES or SCHEMES[scheme].codec is None:
        return None
    try:
        stored_bytes(config, scheme)
    except ConfigError as error:
        return str(error)
    return None


def _backends(names: tuple[str, ...]) -> tuple[dict[str, BackendInfo], dict[str, str]]:
    """What each backend offers, and why those that only ``all`` brings in cannot be imported."""
    infos: dict[str, BackendInfo] = {}
    broken: dict[str, str] = {}
    for name in expand(names, backend_names()):
        try:
            infos[name] = load_backend(name).INFO
        except InputError as error:
            if name in names:
                raise
            broken[name] = str(error)
    return infos, broken
