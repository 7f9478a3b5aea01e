"""What was asked -> the cells to run, and a reason for each one that cannot."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from backends.api import BackendInfo
from backends.index import backend_names, load_backend
from harness.hardware import Hardware, default_threads, resolve
from harness.measure import Workload
from reference.errors import InputError
from reference.schemes import SCHEME_CLASSES, SCHEMES

ALL = "all"


class UnknownScheme(InputError):
    """A ``--quant`` that no system uses; one line."""


@dataclass(frozen=True)
class Request:
    """The options of a run. Lists hold names as the user typed them; ``all`` stands for every usable one."""

    models: tuple[str, ...] = ("tiny",)
    backends: tuple[str, ...] = (ALL,)
    schemes: tuple[str, ...] = (ALL,)
    hardware: tuple[str, ...] = ("local",)
    devices: tuple[str, ...] = (ALL,)
    threads: int | None = None
    workload: Workload = field(default_factory=lambda: Workload(256, 64))
    seed: int = 0


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
    by_name: bool


@dataclass(frozen=True)
class Plan:
    """Cells in the order they run, what was refused, and hardware that is known but not here."""

    cells: tuple[Cell, ...]
    refused: tuple[Refused, ...]
    absent: tuple[str, ...]


def plan(request: Request) -> Plan:
    """Expand a request. Raises UnknownBackend, UnknownScheme or UnknownHardware for a wrong name."""
    backends = expand(request.backends, backend_names())
    check_scheme_names(request.schemes, [load_backend(name).INFO for name in backends])
    places, absent = _places(request)
    if not places:
        return Plan((), (), tuple(absent))
    cells: list[Cell] = []
    refused: list[Refused] = []
    for model in request.models:
        for backend in backends:
            info: BackendInfo = load_backend(backend).INFO
            named = ALL not in request.backends
            schemes, lacking = match_schemes(request.schemes, info)
            refused += [_no_scheme(info, backend, model, scheme, named) for scheme in lacking]
            usable = [place for place in places if place.device.split(":")[0] in info.devices]
            if schemes and not usable:
                refused.append(_no_device(info, backend, model, places, named))
            for place in usable:
                for scheme in schemes:
                    threads = request.threads or default_threads()
                    cells.append(Cell(model, backend, scheme, place, threads, request.workload))
    if not cells:
        # What `all` leaves out is no failure, unless nothing at all is left of what was asked.
        refused = [Refused(r.verdict, r.reason, r.backend, r.scheme, r.model, True) for r in refused]
    return Plan(tuple(cells), tuple(refused), tuple(absent))


def expand(names: tuple[str, ...], every: list[str]) -> list[str]:
    """``all`` -> every name, in their order; repeated names once."""
    wanted = [item for name in names for item in (every if name == ALL else [name])]
    return list(dict.fromkeys(wanted))


def check_scheme_names(names: tuple[str, ...], infos: list[BackendInfo]) -> None:
    """Raise :class:`UnknownScheme`, with the nearest names, for one that no codec or backend knows."""
    known = [*SCHEMES, *(scheme for info in infos for scheme in info.schemes), *SCHEME_CLASSES]
    for name in names:
        if name != ALL and name not in known:
            known = list(dict.fromkeys(known))
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UnknownScheme(f"no scheme {name!r}; {hint}schemes and classes: {', '.join(known)}")


def match_schemes(names: tuple[str, ...], info: BackendInfo) -> tuple[list[str], list[str]]:
    """Schemes of a backend that were asked for, and asked names that it lacks."""
    found: list[str] = []
    lacking: list[str] = []
    for name in names:
        hits = [s for s in info.schemes if name in (ALL, s) or (s in SCHEMES and SCHEMES[s].scheme_class == name)]
        found += hits
        if not hits:
            lacking.append(name)
    return [scheme for scheme in info.schemes if scheme in found], lacking


def _places(request: Request) -> tuple[list[Hardware], list[str]]:
    places: list[Hardware] = []
    absent: list[str] = []
    for name in request.hardware:
        here = resolve(name)
        places += [place for place in here if place not in places]
        if not here:
            absent.append(name)
    if ALL not in request.devices:
        places = [p for p in places if p.device in request.devices or p.device.split(":")[0] in request.devices]
        known = {p.device.split(":")[0] for p in places}
        # A device asked for by name that nobody has detected still becomes a cell: the backend says why not.
        places += [Hardware(d.split(":")[0], d, d) for d in request.devices if d.split(":")[0] not in known]
    return places, absent


def _no_scheme(info: BackendInfo, backend: str, model: str, scheme: str, named: bool) -> Refused:
    reason = f"{backend} has no scheme {scheme}; it has {', '.join(info.schemes)}"
    return Refused("UNSUPPORTED", reason, backend, scheme, model, named)


def _no_device(info: BackendInfo, backend: str, model: str, places: list[Hardware], named: bool) -> Refused:
    asked = ", ".join(place.device for place in places)
    reason = f"{backend} does not run on {asked}; it runs on {', '.join(info.devices)}"
    return Refused("UNSUPPORTED", reason, backend, ALL, model, named)
