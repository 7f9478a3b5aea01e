"""All planted faults, by name."""

from __future__ import annotations

from collections.abc import Iterable

from suites.selftest.planted import (
    wrong_calls,
    wrong_inputs,
    wrong_lengths,
    wrong_products,
    wrong_storage,
    wrong_storage_ggml,
    wrong_stream,
    wrong_wkv,
)
from suites.selftest.planted.fault import Fault

#: Kind -> where its faults are.
GROUPS = {
    "wkv": (wrong_wkv,),
    "inputs": (wrong_inputs,),
    "products": (wrong_products,),
    "stream": (wrong_stream,),
    "storage": (wrong_storage, wrong_storage_ggml),
    "state": (wrong_calls,),
    "calls": (wrong_lengths,),
}

#: Where they are.
MODULES = tuple(module for group in GROUPS.values() for module in group)

FAULTS: dict[str, Fault] = {fault.name: fault for module in MODULES for fault in module.FAULTS}


def names_of(groups: Iterable[str]) -> set[str]:
    """Names of the faults of some kinds. Raises KeyError for a kind that there is not."""
    return {fault.name for group in groups for module in GROUPS[group] for fault in module.FAULTS}
