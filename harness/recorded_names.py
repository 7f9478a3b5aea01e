"""Names that a recorded row may bear: what is known here, in the inventory and in the store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from backends.index import backend_names, load_backend
from harness.hardware import hardware_names, local_hardware
from harness.inventory import load as load_inventory
from harness.models import model_names
from harness.names import did_you_mean
from harness.recorded import recorded_names
from reference.errors import InputError
from reference.schemes import SCHEME_CLASSES, SCHEMES

#: Class -> schemes that only other programs have. faster-rwkv's "ncnn fp16" keeps bf16.
_FOREIGN: Mapping[str | None, tuple[str, ...]] = {
    "int8": ("q8f16_0", "sym_int8", "ncnn int8", "fp32i8", "fp16i8", "bf16i8"),
    "int5": ("Q5_K", "sym_int5", "asym_int5"),
    "int4": ("q4f16_0", "q4f16_2", "q4f32_0", "Q4_K", "Q4_1_O", "sym_int4", "asym_int4", "ncnn int4"),
    "int3": ("q3f16_0", "q3f16_1", "q3f32_1", "Q3_K"),
    "bf16": ("ncnn fp16",),
    "f16": ("cuda fp16",),
    None: ("Q2_K", "Q6_K"),
}

FOREIGN_SCHEMES: Mapping[str, str | None] = {name: group for group, names in _FOREIGN.items() for name in names}


class ImportProblem(InputError):
    """A file or a name that cannot be imported, explained in one line."""


def scheme_class(scheme: str) -> str | None:
    """The class by which tables align a scheme, if it has one."""
    if scheme in SCHEMES:
        return SCHEMES[scheme].scheme_class
    return scheme if scheme in SCHEME_CLASSES else FOREIGN_SCHEMES.get(scheme)


def known_schemes() -> list[str]:
    """Schemes that a recorded row may have: those with a codec, those of backends and of other programs, classes."""
    offered: list[str] = []
    for name in backend_names():
        with suppress(InputError):  # `list backends` tells of one that cannot be imported
            offered += load_backend(name).INFO.schemes
    return list(dict.fromkeys([*SCHEMES, *offered, *FOREIGN_SCHEMES, *SCHEME_CLASSES]))


class Names:
    """Whether the names of rows can be; what is known is collected once."""

    def __init__(self, store: str | os.PathLike[str], *, as_named: bool) -> None:
        used_hardware, used_models = recorded_names(store)
        inventory = load_inventory()
        machines = [host.hardware for host in inventory.hosts.values()]
        machines += [phone.hardware for phone in inventory.phones.values()]
        here = [item.name for item in local_hardware()]
        self._hardware = [*hardware_names(), *here, *machines, *inventory.names(), *used_hardware]
        self._models = [*model_names(), *used_models]
        self._schemes = known_schemes()
        self._as_named = as_named
        self._passed: set[tuple[str, ...]] = set()

    def check(self, where: str, hardware: str, scheme: str, model: str) -> None:
        """Raises :class:`ImportProblem` with the nearest right name."""
        if (hardware, scheme, model) in self._passed:
            return
        if hardware in ("local", "all"):
            raise ImportProblem(f"{where}: hardware {hardware!r} names no machine; give the one the figures come from")
        self._near("hardware", hardware, self._hardware, where)
        self._near("model", model, self._models, where)
        if scheme not in self._schemes:
            hint = did_you_mean(scheme, self._schemes)
            raise ImportProblem(f"{where}: no scheme {scheme!r}; {hint}there are {', '.join(self._schemes)}")
        self._passed.add((hardware, scheme, model))

    def _near(self, what: str, name: str, known: Sequence[str], where: str) -> None:
        hint = "" if name in known or self._as_named else did_you_mean(name, known)
        if hint:
            raise ImportProblem(f"{where}: no {what} {name!r} is known; {hint}--as-named takes it as it is")
