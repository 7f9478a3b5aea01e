"""All planted faults, by name."""

from __future__ import annotations

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

#: Where they are.
MODULES = (
    wrong_wkv,
    wrong_inputs,
    wrong_products,
    wrong_stream,
    wrong_storage,
    wrong_storage_ggml,
    wrong_calls,
    wrong_lengths,
)

FAULTS: dict[str, Fault] = {fault.name: fault for module in MODULES for fault in module.FAULTS}
