"""``--hardware`` and ``--device`` -> the places where cells can run: of this machine, and of the inventory's hosts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from backends.api import BackendInfo, Unavailable
from harness import inventory
from harness.hardware import SMALL_PARAMETERS, Hardware, default_threads, hardware_names, local_hardware, resolve
from harness.inventory import Host
from harness.isolation.hosts import facts
from harness.names import did_you_mean
from reference.errors import InputError

ALL = "all"


class UnknownDevice(InputError):
    """A ``--device`` that no backend has, or that the hardware asked for has not; one line."""


@dataclass(frozen=True)
class Places:
    """Where cells can run, hardware that is known but nowhere to be had, and hosts that do not answer, with why."""

    here: tuple[Hardware, ...]
    absent: tuple[str, ...]
    unreachable: Mapping[str, str]


def places_of(hardware: Sequence[str], devices: Sequence[str]) -> Places:
    """What the names of hardware and devices mean. Raises InputError for a wrong one."""
    here: list[Hardware] = []
    absent: list[str] = []
    unreachable: dict[str, str] = {}
    for name in dict.fromkeys(hardware):
        try:
            found = _named(name)
        except Unavailable as error:
            unreachable[name] = str(error)
            continue
        here += [place for place in found if place not in here]
        if not found:
            absent.append(name)
    if ALL not in devices and here:
        here = _chosen(here, hardware, devices)
    return Places(tuple(here), tuple(absent), unreachable)


def check_device_names(names: Sequence[str], infos: Iterable[BackendInfo]) -> None:
    """Raise :class:`UnknownDevice` for one that no backend has."""
    known = list(dict.fromkeys(["cpu", "cuda", "mps", *(device for info in infos for device in info.devices)]))
    for name in names:
        kind, colon, index = name.partition(":")
        if name != ALL and (kind not in known or (colon and not index.isdecimal())):
            hint = did_you_mean(kind, known) if kind not in known else ""
            raise UnknownDevice(f"no device {name!r}; {hint}devices: {', '.join(known)}; cuda:1 is the second GPU")


def devices_of(places: Iterable[Hardware]) -> str:
    """Their devices, for a message."""
    return ", ".join(place.device for place in places)


def threads_of(place: Hardware, parameters: int) -> int:
    """Threads that a cell gets there when none are asked for."""
    if place.host is None or parameters < SMALL_PARAMETERS:
        return default_threads(parameters)
    return int(place.facts["threads"])


def _named(name: str) -> list[Hardware]:
    """This machine's hardware of that name, else the inventory's host. Raises Unavailable where that is silent."""
    host = inventory.find(name)
    if isinstance(host, Host) and not any(item.name == name for item in local_hardware()):
        return _of_host(host)
    mine = inventory.names()
    if name not in hardware_names() and did_you_mean(name, mine) and not any(h.name == name for h in local_hardware()):
        known = [*hardware_names(), *mine]
        raise InputError(f"no hardware {name!r}; {did_you_mean(name, mine)}known: {', '.join(known)}")
    return resolve(name)


def _of_host(host: Host) -> list[Hardware]:
    """The host's device that is the hardware it is filed under; else its CPU, so named, and its GPUs."""
    found = facts(host)
    detail = {**found.detail, "threads": found.threads, "free_bytes": found.free_bytes}
    every = [Hardware(d["name"], d["device"], d["detail"], host.name, detail) for d in found.hardware]
    exact = [item for item in every if item.name == host.hardware]
    if exact:
        return exact
    return [Hardware(host.hardware, d.device, d.detail, host.name, detail) if d.device == "cpu" else d for d in every]


def _chosen(here: Sequence[Hardware], hardware: Sequence[str], devices: Sequence[str]) -> list[Hardware]:
    """Those of the devices asked for; one that nobody has detected still becomes a place: the backend says why not."""
    anywhere = any(name in ("local", ALL) for name in hardware)
    hosts = list({place.host: place for place in here if place.host is not None}.values())
    places: list[Hardware] = []
    for device in devices:
        hits = [place for place in here if device in (place.device, place.device.split(":")[0])]
        if not hits and not anywhere and not hosts:
            asked = ", ".join(hardware)
            raise UnknownDevice(f"hardware {asked} has no device {device}; its devices: {devices_of(here)}")
        if not hits:
            hits = [replace(host, device=device, detail=device) for host in hosts]
            hits += [Hardware(device.split(":")[0], device, device)] if anywhere else []
        places += hits
    return list(dict.fromkeys(places))
